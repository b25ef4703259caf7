"""Blocks with less work between their matrix products: the same answers, or within the stated bound."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vitopt.data.pixels import random_pixels
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.models.families import FAMILIES
from vitopt.optimize.blocks import Block, ClassTokenAttention, GeluMlp, linear_gelu
from vitopt.optimize.patches import PatchProduct
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import RunSpec

CPU = torch.device("cpu")
PIXELS = random_pixels(3, (32, 32))
EXACT = ("class_token_last", "carry_residual", "patch_product")
REWRITTEN = {"class_token_last": ClassTokenAttention, "carry_residual": Block, "patch_product": PatchProduct}


def prepared(checkpoint: Checkpoint, **run: object) -> TorchRunnable:
    return prepare(checkpoint, name="mine", device=CPU, run=RunSpec(**run))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("option", EXACT)
def test_an_exact_option_keeps_every_familys_answers_or_says_why_it_does_nothing(
    option: str, family: str, make_family: Callable[..., Checkpoint]
) -> None:
    checkpoint = make_family(family)
    plain, changed = prepared(checkpoint), prepared(checkpoint, **{option: True})
    torch.testing.assert_close(changed(PIXELS), plain(PIXELS), rtol=0, atol=1e-5)
    did = any(isinstance(module, REWRITTEN[option]) for module in changed.model.modules())
    assert did is (option not in changed.reasons) is changed.describe()["variant"].ran[option]
    assert did or family not in ("vit", "deit", "vit_msn")
    assert changed.layers == plain.layers and changed.weight_bytes() == plain.weight_bytes()


def test_a_head_that_looks_at_two_tokens_gets_both(make_family: Callable[..., Checkpoint]) -> None:
    checkpoint = make_family("deit", with_teacher=True)
    plain, narrow = prepared(checkpoint), prepared(checkpoint, class_token_last=True)
    assert "class_token_last" in narrow.reasons
    torch.testing.assert_close(narrow(PIXELS), plain(PIXELS), rtol=0, atol=0)


@pytest.mark.parametrize("run_as", ["bf16", "w8a8"])
def test_all_exact_options_together_keep_the_answers_of_16_and_8_bit(run_as: str, tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    plain = prepared(checkpoint, run_as=run_as)
    changed = prepared(checkpoint, run_as=run_as, fuse_qkv=True, **dict.fromkeys(EXACT, True))
    assert changed.reasons == {} and changed.fused_attentions == 2  # the last is that of the class token
    expected, found = plain(PIXELS).float(), changed(PIXELS).float()
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert changed.layers == plain.layers


def test_the_last_block_multiplies_one_token_but_for_keys_and_values(tiny_checkpoint: Path) -> None:
    narrow = prepared(open_checkpoint(str(tiny_checkpoint)), class_token_last=True)
    rows: dict[str, int] = {}
    for name, module in narrow.model.named_modules():
        if isinstance(module, nn.Linear) and ".layers.2." in name:
            module.register_forward_hook(
                lambda _, inputs, __, name=name: rows.update({name.rpartition(".")[2]: inputs[0].shape[1]})
            )
    narrow(PIXELS)
    assert rows == {"q_proj": 1, "k_proj": 17, "v_proj": 17, "o_proj": 1, "fc1": 1, "fc2": 1}


def test_eager_attention_is_left_alone(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    narrow = prepared(checkpoint, class_token_last=True, attention="eager")
    assert "eager" in narrow.reasons["class_token_last"]
    torch.testing.assert_close(narrow(PIXELS), prepared(checkpoint, attention="eager")(PIXELS), rtol=0, atol=0)


def test_a_carried_sum_is_the_same_to_the_bit(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    carrying = prepared(checkpoint, carry_residual=True)
    blocks = [module for module in carrying.model.modules() if isinstance(module, Block)]
    assert [block.carries for block in blocks] == [True, True, False]
    torch.testing.assert_close(carrying(PIXELS), prepared(checkpoint)(PIXELS), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_in_the_epilogue_is_that_of_tanh(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, weight, bias = torch.randn(2, 5, 16), torch.randn(24, 16), torch.randn(24)
    x = inputs.double() @ weight.double().t() + bias.double()
    expected = x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    found = linear_gelu(inputs.to(dtype), weight.to(dtype), bias.to(dtype))
    assert found.dtype == dtype and found.shape == (2, 5, 24)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.15)
    assert (expected - nn.functional.gelu(x)).abs().max() < 5e-4  # the bound of the approximation
    torch.library.opcheck(linear_gelu, (inputs, weight, bias))


def test_gelu_joins_every_unquantized_product_and_changes_the_answers_little(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    plain, joined = prepared(checkpoint), prepared(checkpoint, gelu_epilogue=True)
    assert sum(isinstance(module, GeluMlp) for module in joined.model.modules()) == 3
    expected, found = plain(PIXELS), joined(PIXELS)
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()
    assert "gelu_epilogue" in prepared(checkpoint, gelu_epilogue=True, run_as="w8a8").reasons
