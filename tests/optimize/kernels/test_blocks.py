"""Blocks of fused products where torch computes them, and the choice of who does; the kernels: `interpreted.py`."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs triton")

from vitopt.data.pixels import random_pixels
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.models.families import FAMILIES
from vitopt.models.names import block_names
from vitopt.optimize.kernels import blocks
from vitopt.optimize.kernels.blocks import FusedLinear, choose_tiles, folded, fuse_products, fused_layers
from vitopt.optimize.kernels.product import Tile
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import RunSpec

CPU = torch.device("cpu")
PIXELS = random_pixels(3, (32, 32))
TILE = Tile(64, 64, 64, 4, 4)


def prepared(checkpoint: Checkpoint, **run: object) -> TorchRunnable:
    return prepare(checkpoint, name="mine", device=CPU, run=RunSpec(**run))


def fused(runnable: TorchRunnable) -> int:
    return fuse_products(runnable.model, block_names(runnable.model, runnable.checkpoint.config.model_type))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_every_family_keeps_its_answers_and_layers_and_some_are_fused(
    family: str, make_family: Callable[..., Checkpoint]
) -> None:
    checkpoint = make_family(family)
    plain, changed = prepared(checkpoint), prepared(checkpoint, fuse_qkv=True)
    done = fused(changed)
    assert done == len(fused_layers(changed.model))
    assert done == (4 * checkpoint.config.num_hidden_layers if family in ("vit", "deit", "vit_msn", "ijepa") else 0)
    torch.testing.assert_close(changed(PIXELS), plain(PIXELS), rtol=0, atol=1e-5)
    assert prepared(checkpoint, fuse_qkv=True).layers == changed.layers


@torch.inference_mode()
def test_what_is_quantized_or_of_another_kind_keeps_its_product(tiny_checkpoint: Any) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert fused(prepared(checkpoint, run_as="w8a8", fuse_qkv=True)) == 0
    assert fused(prepared(checkpoint)) == 2 * 3  # MLPs: queries, keys and values are three products
    narrow = prepared(checkpoint, fuse_qkv=True, class_token_last=True, gelu_epilogue=True)
    expected = narrow(PIXELS)
    assert fused(narrow) == 4 * 2 + 2  # the last attention is of one token
    torch.testing.assert_close(narrow(PIXELS), expected, rtol=0, atol=1e-5)
    assert {layer.gelu for layer in fused_layers(narrow.model)} == {"none", "tanh"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_folded_into_a_layer_is_that_norm_and_that_layer(affine: bool, bias: bool) -> None:
    torch.manual_seed(0)
    norm, host = nn.LayerNorm(16, elementwise_affine=affine), nn.Linear(16, 24, bias=bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    inputs = torch.randn(3, 5, 16)
    weight, shift = folded(host, norm)
    layer = FusedLinear(host, norm)
    expected = host(norm(inputs))
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=1e-5)
    assert (shift is None) is (not bias and not affine) and weight.dtype == host.weight.dtype
    torch.testing.assert_close(layer.weight_sums, weight.sum(1))
    torch.testing.assert_close(layer(inputs, expected), 2 * expected, rtol=0, atol=1e-5)


class Choices:
    """Stands for measuring: notes what is asked, runs torch's way once, and lets `wins` decide."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wins: Callable[[str], bool] = lambda key: True):
        self.keys: list[str] = []
        self.outputs: list[torch.Tensor] = []
        self.wins = wins
        facts = types.SimpleNamespace(multi_processor_count=132, L2_cache_size=1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        monkeypatch.setattr(blocks, "fastest", self.fastest)
        monkeypatch.setattr(blocks, "fused_linear", lambda *args: nn.functional.linear(*args[:3]))

    def fastest(self, key: str, device: object, tiles: list[Tile], ours: object, torchs: Callable[[], Any]) -> Any:
        self.keys.append(key)
        self.outputs.append(torchs()[0])
        assert tiles
        return TILE if self.wins(key) else None


@torch.inference_mode()
def test_layers_of_one_shape_are_measured_once_against_compiled_code(
    tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs: list[str] = []
    real = torch.compile

    def backend(module: torch.fx.GraphModule, inputs: object) -> Any:
        programs.append(" ".join(str(node.target) for node in module.graph.nodes))
        return module.forward

    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic, options: real(function, dynamic=dynamic, backend=backend)
    )
    runnable = prepared(open_checkpoint(str(tiny_checkpoint)), fuse_qkv=True)
    fused(runnable)
    choices = Choices(monkeypatch, wins=lambda key: "erf" not in key)
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):  # as the whole model runs meanwhile
        kept = choose_tiles(runnable.model, lambda: runnable(PIXELS), dependent=True)
    torch._dynamo.reset()
    assert len(choices.keys) == len(set(choices.keys)) == 4 == len(programs)
    # Torch joins the addition to attention's output with the norm behind it, so it is not charged for it.
    assert sum("add" in program for program in programs) == 1
    assert sum("layer_norm" in program for program in programs) == 2
    assert [name.rpartition(".")[2] for name in kept] == ["fc1"] * 3
    assert all(layer.tiles == {3 * 17: None if layer.gelu == "erf" else TILE} for layer in fused_layers(runnable.model))
    assert all(layer.dependent and not layer._forward_pre_hooks for layer in fused_layers(runnable.model))
    with torch.compiler.set_stance("force_eager"):
        choose_tiles(runnable.model, lambda: runnable(PIXELS[:1]))
    assert len(choices.keys) == 8  # other rows
    assert set(fused_layers(runnable.model)[0].tiles) == {3 * 17, 17}


@torch.inference_mode()
def test_a_run_chooses_before_it_compiles_a_shape_and_says_what_torch_keeps(
    tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitopt.optimize.rewrites._NEEDS", {"fused_kernels": lambda device: None})
    events: list[object] = []

    def choose(model: nn.Module, call: Callable[[], object], **how: bool) -> tuple[str, ...]:
        call()
        rows = 17 * (1 if events else 3)
        events.append(how)
        for layer in fused_layers(model):
            layer.tiles[rows] = TILE if layer.gelu == "none" else None
        return tuple(name for name, layer in model.named_modules() if getattr(layer, "gelu", "none") == "erf")

    class Plainly:
        def __init__(self, path: nn.Module, *args: object, **how: object):
            self.shapes: set[torch.Size] = set()

        def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
            events.append("compiled" if pixels.shape not in self.shapes else "called")
            self.shapes.add(pixels.shape)
            return pixels.flatten(1)[:, :4]

        def knows(self, shape: torch.Size) -> bool:
            return shape in self.shapes

    monkeypatch.setattr(blocks, "choose_tiles", choose)
    monkeypatch.setattr("vitopt.optimize.runtime.compiled", Plainly)
    run = {"compile": True, "fuse_qkv": True, "fused_kernels": True}
    runnable = prepared(open_checkpoint(str(tiny_checkpoint)), **run)
    assert runnable.describe()["variant"].ran["fused_kernels"] is False  # nothing is chosen yet
    for pixels in (PIXELS, PIXELS, PIXELS[:1]):
        runnable(pixels)
    how = {"autotune": False, "dependent": False}
    assert events == [how, "compiled", "called", how, "compiled"]
    assert runnable.describe()["variant"].ran["fused_kernels"] == "9 products"
    reason = runnable.reasons["fused_kernels"]
    assert "batch 3: " in reason and "batch 1: " in reason and "3 products" in reason and "fc1" in reason
