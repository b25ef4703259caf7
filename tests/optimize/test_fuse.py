"""Query, key and value as one matrix product: the same answers and formats, or left alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vitopt.data.pixels import random_pixels
from vitopt.models.checkpoint import Checkpoint, open_checkpoint, parameter_count, weight_bytes
from vitopt.models.families import FAMILIES, FUSED_LEAF, TIMM
from vitopt.models.names import block_names
from vitopt.optimize.fuse import FusedAttention
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import RunSpec, VariantSpec

CPU = torch.device("cpu")
PIXELS = random_pixels(3, (32, 32))
# Their weights can be stacked; both Swins add a bias of their own, timm's are stacked already.
STACKED = [family for family in sorted(FAMILIES) if not family.startswith("swin") and family != TIMM]


def both(checkpoint: Checkpoint, **run: object) -> tuple[TorchRunnable, TorchRunnable]:
    """The same checkpoint as it is, and fused."""
    plain = prepare(checkpoint, name="plain", device=CPU, run=RunSpec(**run))
    return plain, prepare(checkpoint, name="fused", device=CPU, run=RunSpec(fuse_qkv=True, **run))


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """The small ViT of three blocks in a format."""

    def made(format: str, **held: object) -> Checkpoint:
        folder = tmp_path_factory.mktemp("fused") / format
        quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="v", format=format, **held), folder, "cpu")
        return open_checkpoint(str(folder))

    return made


@pytest.mark.parametrize("family", STACKED)
def test_every_attention_of_a_family_is_fused_and_answers_the_same(
    family: str, make_family: Callable[..., Checkpoint]
) -> None:
    plain, fused = both(make_family(family))
    assert (plain.fused_attentions, fused.fused_attentions) == (0, 2)
    torch.testing.assert_close(fused(PIXELS), plain(PIXELS), rtol=0, atol=1e-5)
    assert fused.attention_used == plain.attention_used == "sdpa"
    assert block_names(fused.model, family) == block_names(plain.model, family)


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_attention_with_a_bias_of_its_own_is_left_alone(family: str, make_family: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make_family(family))
    assert fused.fused_attentions == 0
    torch.testing.assert_close(fused(PIXELS), plain(PIXELS), rtol=0, atol=0)


@pytest.mark.parametrize("option", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_a_bias_that_comes_from_outside_is_kept(option: str, make_family: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make_family("beit", **{option: True}))
    assert fused.fused_attentions == 2
    torch.testing.assert_close(fused(PIXELS), plain(PIXELS), rtol=0, atol=1e-5)
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            if "relative_position_bias" in name:
                parameter.zero_()
    assert (fused(PIXELS) - plain(PIXELS)).abs().max() > 1e-3  # it matters, so it was there


def test_projections_without_a_bias_are_fused_without_one(make_family: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make_family("vit", qkv_bias=False))
    assert fused.model.get_submodule(f"vit.layers.0.attention.{FUSED_LEAF}").bias is None
    torch.testing.assert_close(fused(PIXELS), plain(PIXELS), rtol=0, atol=1e-5)


def test_a_key_without_a_bias_gets_zeros(make_family: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make_family("beit"))
    host = plain.model.get_submodule("beit.layers.1.attention")
    assert host.k_proj.bias is None
    stacked = fused.model.get_submodule(f"beit.layers.1.attention.{FUSED_LEAF}")
    torch.testing.assert_close(
        stacked.bias, torch.cat([host.q_proj.bias, torch.zeros(64), host.v_proj.bias]), rtol=0, atol=0
    )


@pytest.mark.parametrize(("format", "error"), [("fp32", 1e-6), ("bf16", 1e-2), ("fp16", 1e-3), ("w8a8", 1e-2)])
def test_formats_scaled_per_row_are_fused_and_keep_their_answers(
    format: str, error: float, make: Callable[..., Checkpoint]
) -> None:
    plain, fused = both(make(format))
    assert fused.fused_attentions == 3
    expected, got = plain(PIXELS).float(), fused(PIXELS).float()
    assert (got - expected).norm() <= error * expected.norm()


def test_rows_of_w8a8_keep_their_integers_and_scales(make: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make("w8a8"))
    parts = [plain.model.get_submodule(f"vit.layers.2.attention.{name}_proj").weight for name in "qkv"]
    stacked = fused.model.get_submodule(f"vit.layers.2.attention.{FUSED_LEAF}").weight
    assert type(stacked.data) is type(parts[0].data)
    assert tuple(stacked.shape) == (192, 64)
    assert torch.equal(stacked.qdata, torch.cat([part.qdata for part in parts]))
    assert torch.equal(stacked.scale, torch.cat([part.scale for part in parts]))
    assert torch.equal(stacked.dequantize(), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize("format", ["fp32", "bf16", "w8a8"])
def test_live_formats_name_query_key_and_value_as_before(format: str, make: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make(format))
    assert fused.layers == plain.layers
    assert [fused.layers[f"block.1.{name}"] for name in ("query", "key", "value")] == [format] * 3


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_weights_packed_across_rows_are_left_alone(
    format: str, make: Callable[..., Checkpoint], caplog: pytest.LogCaptureFixture
) -> None:
    plain, fused = both(make(format))
    assert any("no query, key and value here can be fused" in message for message in caplog.messages)
    assert fused.fused_attentions == 0 and fused.layers == plain.layers
    torch.testing.assert_close(fused(PIXELS), plain(PIXELS), rtol=0, atol=0)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_blocks_that_a_skip_list_keeps_are_fused_beside_packed_ones(
    format: str, make: Callable[..., Checkpoint]
) -> None:
    plain, fused = both(make(format, skip=["block.1"]))
    hosts = [name for name, module in fused.model.named_modules() if isinstance(module, FusedAttention)]
    assert hosts == ["vit.layers.1.attention"]
    assert fused.layers == plain.layers
    expected, got = plain(PIXELS).float(), fused(PIXELS).float()
    assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_eager_attention_is_left_alone(make: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make("fp32"), attention="eager")
    assert fused.fused_attentions == 0 and fused.attention_used == "eager"
    torch.testing.assert_close(fused(PIXELS), plain(PIXELS), rtol=0, atol=0)


def test_projections_of_different_formats_are_left_alone(make: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make("w8a8", skip=["block.1.query"]))
    hosts = [name for name, module in fused.model.named_modules() if isinstance(module, FusedAttention)]
    assert hosts == ["vit.layers.0.attention", "vit.layers.2.attention"]
    assert fused.layers == plain.layers and fused.layers["block.1.query"] == "bf16"
    assert type(fused.model.get_submodule("vit.layers.1.attention.q_proj")) is nn.Linear
    expected, got = plain(PIXELS).float(), fused(PIXELS).float()
    assert (got - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("format", ["fp32", "bf16", "w8a8"])
def test_the_model_is_as_large_as_before(format: str, make: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make(format))
    assert weight_bytes(fused.model) == weight_bytes(plain.model)
    assert parameter_count(fused.model) == parameter_count(plain.model)


@pytest.mark.parametrize("family", [family for family in STACKED if family != "beit"])
def test_a_family_is_as_large_as_before(family: str, make_family: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make_family(family))
    assert weight_bytes(fused.model) == weight_bytes(plain.model)
    assert parameter_count(fused.model) == parameter_count(plain.model)


def test_the_zeros_for_a_key_without_a_bias_are_held(make_family: Callable[..., Checkpoint]) -> None:
    plain, fused = both(make_family("beit"))
    assert weight_bytes(fused.model) == weight_bytes(plain.model) + 2 * 64 * 4
