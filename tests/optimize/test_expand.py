"""Packed checkpoints that expand while they load: exactly what they hold, in a format that computes fast."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from vitopt.data.pixels import random_pixels
from vitopt.environment import libraries, support
from vitopt.errors import UnsupportedError
from vitopt.layers import LINEARS
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.models.names import linear_layers
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import RunSpec, VariantSpec

CPU = torch.device("cpu")
PIXELS = random_pixels(4, (32, 32))
KEPT = {"classifier", *(f"block.1.{linear}" for linear in LINEARS)}


@pytest.fixture(scope="module")
def stored(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The small ViT in each format that expands, packed ones with block.1 in 16 bit."""
    root = tmp_path_factory.mktemp("stored")
    plain = open_checkpoint(str(tiny_checkpoint))
    for format in ("nf4", "int8", "w8a8", "fp32", "bf16", "fp16"):
        skip = ["block.1"] if format in ("nf4", "int8", "w8a8") else []
        quantize(plain, VariantSpec(name="v", format=format, skip=skip), root / format, "cpu")
    return {folder.name: open_checkpoint(str(folder)) for folder in root.iterdir()}


def running(checkpoint: Checkpoint, run_as: str | None, **run: object) -> TorchRunnable:
    return prepare(checkpoint, name="v", device=CPU, run=RunSpec(run_as=run_as, **run))


def modules_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Logical name -> module."""
    return {layer.logical: layer.module for layer in linear_layers(load_model(checkpoint), "vit")}


def unpacked(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Module -> its weight in bf16, for the packed layers, by bitsandbytes itself and by hand."""
    libraries.import_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit

    model = load_model(checkpoint)  # a fresh one: the first call of a model on the CPU repacks its weights
    weights = {}
    for logical, name in modules_of(checkpoint).items():
        if logical in KEPT:
            continue
        weight = model.get_submodule(name).weight
        if hasattr(weight, "quant_state"):
            weights[name] = dequantize_4bit(weight.data, weight.quant_state)
        else:
            weights[name] = (weight.data.float() * weight.SCB.float()[:, None] / 127).bfloat16()
    return weights


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_packed_layers_run_as_bf16_with_the_weights_that_they_hold(format: str, stored: dict[str, Checkpoint]) -> None:
    runnable = running(stored[format], "bf16")
    assert set(runnable.layers.values()) == {"bf16"}
    for name, weight in unpacked(stored[format]).items():
        live = runnable.model.get_submodule(name)
        assert type(live) is nn.Linear and live.weight.dtype == torch.bfloat16
        if format == "nf4":
            assert torch.equal(live.weight, weight), name
        else:  # a product of three factors: the last bit of bf16 depends on their order
            torch.testing.assert_close(live.weight, weight, rtol=2**-7, atol=0)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("run_as", ["bf16", "w8a8"])
def test_an_expanded_model_answers_like_the_packed_one(run_as: str, format: str, stored: dict[str, Checkpoint]) -> None:
    expected = running(stored[format], None)(PIXELS).float()
    got = running(stored[format], run_as)(PIXELS).float()
    # The error of NF4 itself, 11 % here, is in both.
    assert 0 < (got - expected).norm() < 0.03 * expected.norm()


def test_an_expanded_model_answers_exactly_like_a_plain_one_with_its_weights(
    tiny_checkpoint: Path, stored: dict[str, Checkpoint]
) -> None:
    plain = load_model(open_checkpoint(str(tiny_checkpoint)), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, weight in unpacked(stored["nf4"]).items():
            plain.get_submodule(name).weight.copy_(weight)
        expected = plain(PIXELS.bfloat16()).logits
    torch.testing.assert_close(running(stored["nf4"], "bf16")(PIXELS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_packed_layers_run_as_w8a8_within_its_own_rounding(format: str, stored: dict[str, Checkpoint]) -> None:
    runnable = running(stored[format], "w8a8")
    assert {name for name, live in runnable.layers.items() if live == "bf16"} == KEPT
    assert set(runnable.layers.values()) == {"bf16", "w8a8"}
    for name, weight in unpacked(stored[format]).items():
        rows = weight.float()
        # Each row of 8-bit integers has one scale, here bf16: half a step, and what rounding the scale adds.
        half_step = rows.abs().amax(dim=1, keepdim=True) * (0.5 / 127 + 2**-8)
        error = (runnable.model.get_submodule(name).weight.dequantize().float() - rows).abs()
        assert (error <= half_step).all(), name


@pytest.mark.parametrize("run_as", ["bf16", "w8a8"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_layers_of_the_skip_list_are_the_same_to_the_bit(
    format: str, run_as: str, stored: dict[str, Checkpoint]
) -> None:
    packed, expanded = load_model(stored[format]), running(stored[format], run_as).model
    modules = modules_of(stored[format])
    for logical in KEPT:
        before, after = (model.get_submodule(modules[logical]) for model in (packed, expanded))
        assert type(after) is nn.Linear and after.weight.dtype == torch.bfloat16
        assert torch.equal(before.weight, after.weight) and torch.equal(before.bias, after.bias), logical


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16"])
def test_weights_that_are_not_packed_are_rounded_to_bf16(format: str, stored: dict[str, Checkpoint]) -> None:
    runnable = running(stored[format], "bf16")
    assert set(runnable.layers.values()) == {"bf16"}
    held = dict(load_model(stored[format]).named_parameters())
    for name, live in runnable.model.named_parameters():
        assert torch.equal(live, held[name].bfloat16()), name
    expected = running(stored[format], None)(PIXELS).float()
    assert (runnable(PIXELS).float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("format", ["fp32", "bf16"])
def test_weights_that_are_not_packed_run_as_w8a8_all_but_the_head(format: str, stored: dict[str, Checkpoint]) -> None:
    runnable = running(stored[format], "w8a8")
    assert {name for name, live in runnable.layers.items() if live != "w8a8"} == {"classifier"}
    assert runnable.layers["classifier"] == "bf16"
    expected = running(stored[format], None)(PIXELS).float()
    assert 0 < (runnable(PIXELS).float() - expected).norm() < 0.05 * expected.norm()


def test_the_same_integers_as_a_checkpoint_that_is_stored_in_w8a8(stored: dict[str, Checkpoint]) -> None:
    at_load, on_disk = running(stored["bf16"], "w8a8").model, load_model(stored["w8a8"])
    name = modules_of(stored["bf16"])["block.0.fc1"]
    assert torch.equal(at_load.get_submodule(name).weight.qdata, on_disk.get_submodule(name).weight.qdata)


def test_expanded_layers_are_fused_too(stored: dict[str, Checkpoint]) -> None:
    for run_as in ("bf16", "w8a8"):
        plain, fused = (running(stored["nf4"], run_as, fuse_qkv=fuse) for fuse in (False, True))
        assert fused.fused_attentions == 3 and fused.layers == plain.layers
        expected = plain(PIXELS).float()
        assert (fused(PIXELS).float() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("format", ["nf4", "int8", "fp32", "bf16", "fp16"])
def test_the_stored_format_is_that_of_the_file_however_it_runs(format: str, stored: dict[str, Checkpoint]) -> None:
    assert running(stored[format], "bf16").stored_format == format
    assert running(stored[format], None).stored_format == format


@pytest.mark.parametrize("run_as", ["bf16", "w8a8"])
def test_w8a8_does_not_expand(run_as: str, stored: dict[str, Checkpoint]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        running(stored["w8a8"], run_as)
    assert str(caught.value) == (
        f"{stored['w8a8'].source} is stored in w8a8, which does not expand to {run_as}; "
        "run_as takes fp32, fp16, bf16, nf4, int8"
    )


def test_running_as_fp8_on_the_cpu_is_refused_with_the_nearest_format(stored: dict[str, Checkpoint]) -> None:
    with pytest.raises(UnsupportedError, match=r"^format fp8 cannot run on cpu: .*; the nearest that can is w8a8$"):
        running(stored["nf4"], "fp8")


def test_a_missing_library_is_named_before_loading(
    stored: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = support.installed
    monkeypatch.setattr(support, "installed", lambda name: name != "torchao" and installed(name))
    with pytest.raises(UnsupportedError, match=r"^format w8a8 cannot run on cpu: torchao is not installed"):
        running(stored["nf4"], "w8a8")


def test_a_packing_that_is_not_known_does_not_expand(
    stored: dict[str, Checkpoint], copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(Path(stored["bf16"].source))
    content = json.loads((folder / "config.json").read_text())
    foreign = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": foreign}))
    with pytest.raises(UnsupportedError, match="stored in a format unknown to vitopt, which does not expand"):
        running(open_checkpoint(str(folder)), "bf16")


def test_the_file_stays_as_it_was(stored: dict[str, Checkpoint]) -> None:
    path = Path(stored["nf4"].source) / "model.safetensors"
    before = path.stat().st_mtime_ns, path.stat().st_size
    running(stored["nf4"], "w8a8")(PIXELS)
    assert (path.stat().st_mtime_ns, path.stat().st_size) == before
