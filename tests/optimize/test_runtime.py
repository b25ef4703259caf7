"""Preparation of a runnable model: attention, formats and what is remembered about both."""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitopt import environment
from vitopt.data.pixels import random_pixels
from vitopt.errors import UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import prepare
from vitopt.recipe import VariantSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_asked_for_runs(tiny: Checkpoint, attention: str) -> None:
    runnable = prepare(tiny, name="v", device=CPU, attention=attention)
    assert runnable.attention_requested == runnable.attention_used == attention
    assert runnable.attention_reason is None


def test_sdpa_and_eager_attention_agree_with_each_other_and_with_the_bare_model(tiny: Checkpoint) -> None:
    pixels = random_pixels(4, (32, 32))
    with torch.inference_mode():
        expected = load_model(tiny, attention="eager")(pixel_values=pixels).logits
    for attention in ("sdpa", "eager"):
        logits = prepare(tiny, name="v", device=CPU, attention=attention)(pixels)
        assert logits.shape == (4, 4)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_flash_attention_falls_back_says_so_once_and_keeps_both(
    tiny: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        runnable = prepare(tiny, name="mine", device=CPU, attention="flash_attention_2")
    assert runnable.attention_requested == "flash_attention_2"
    assert runnable.attention_used == "sdpa"
    assert runnable.attention_reason == "FlashAttention-2 needs a CUDA device"
    said = [record.getMessage() for record in caplog.records if "flash" in record.getMessage()]
    assert said == ["mine: flash_attention_2 cannot run (FlashAttention-2 needs a CUDA device); using sdpa"]
    pixels = random_pixels(2, (32, 32))
    torch.testing.assert_close(runnable(pixels), prepare(tiny, name="s", device=CPU)(pixels), rtol=0, atol=0)


def test_strict_refuses_instead_of_falling_back(tiny: Checkpoint) -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"mine: flash_attention_2 cannot run: FlashAttention-2 needs a CUDA device; without --strict",
    ):
        prepare(tiny, name="mine", device=CPU, attention="flash_attention_2", strict=True)


def test_attention_used_is_read_from_the_live_model(tiny: Checkpoint) -> None:
    runnable = prepare(tiny, name="v", device=CPU)
    runnable.model.set_attn_implementation("eager")
    assert runnable.attention_used == "eager"


def test_formats_are_read_from_the_live_model(tiny: Checkpoint, tmp_path: Path) -> None:
    variant = VariantSpec(name="v", format="nf4", skip=["block.1"])
    quantize(tiny, variant, tmp_path / "nf4", "cpu")
    layers = prepare(open_checkpoint(str(tmp_path / "nf4")), name="v", device=CPU).layers
    assert {name for name, format in layers.items() if format == "bf16"} == {
        "classifier",
        *(f"block.1.{linear}" for linear in ("query", "key", "value", "output", "fc1", "fc2")),
    }
    assert list(layers.values()).count("nf4") == 12
    assert set(prepare(tiny, name="v", device=CPU).layers.values()) == {"fp32"}


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp16", "nf4", "int8", "w8a8"])
def test_float_pixels_go_into_every_format_without_gradients(format: str, tiny: Checkpoint, tmp_path: Path) -> None:
    quantize(tiny, VariantSpec(name="v", format=format), tmp_path / "v", "cpu")
    runnable = prepare(open_checkpoint(str(tmp_path / "v")), name="v", device=CPU)
    logits = runnable(random_pixels(3, (32, 32)))
    assert logits.shape == (3, 4) and torch.isfinite(logits).all()
    assert logits.is_inference()
    assert not any(parameter.requires_grad for parameter in runnable.model.parameters())
    # the second call of a packed model takes another path than the first
    torch.testing.assert_close(runnable(random_pixels(3, (32, 32))), logits, rtol=0, atol=0)


def test_random_weights_run(tiny: Checkpoint) -> None:
    runnable = prepare(open_checkpoint("random:vit-tiny-patch16-32"), name="v", device=CPU)
    assert runnable(random_pixels(1, (32, 32))).shape == (1, 1000)


def test_a_compiled_model_gives_the_same_answers(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real compiler takes half a minute; what is tested here is that calls go through it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    runnable = prepare(tiny, name="v", device=CPU, compile=True)
    pixels = random_pixels(2, (32, 32))
    torch.testing.assert_close(runnable(pixels), prepare(tiny, name="v", device=CPU)(pixels))
    assert runnable.compiled and runnable.compile_requested and runnable.compile_reason is None


def test_a_model_that_cannot_be_compiled_runs_all_the_same_and_keeps_the_reason(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[int] = []

    def no_compiler(**_: torch.Tensor) -> None:
        tries.append(1)
        raise RuntimeError("no C++\ncompiler")

    monkeypatch.setattr(torch, "compile", lambda model: no_compiler)
    runnable = prepare(tiny, name="mine", device=CPU, compile=True)
    assert runnable.compiled
    pixels = random_pixels(2, (32, 32))
    expected = prepare(tiny, name="v", device=CPU)(pixels)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(runnable(pixels), expected, rtol=0, atol=0)
    assert len(tries) == 1
    assert runnable.compile_requested and not runnable.compiled
    assert runnable.compile_reason == "RuntimeError: no C++ compiler"
    assert caplog.messages == ["mine: compilation failed (RuntimeError: no C++ compiler); running eager"]


def test_an_error_of_the_model_is_not_blamed_on_the_compiler(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)
    runnable = prepare(tiny, name="v", device=CPU, compile=True)
    with pytest.raises(ValueError, match="Input image size"):
        runnable(random_pixels(1, (64, 64)))


def with_quantization(folder: Path, config: dict[str, object]) -> Checkpoint:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": config}))
    return open_checkpoint(str(folder))


def test_a_checkpoint_in_a_format_that_cannot_run_here_is_refused(
    tiny_checkpoint: Path, copy_of: Callable[[Path], Path]
) -> None:
    fp8 = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Float8DynamicActivationFloat8WeightConfig", "_data": {}}},
    }
    checkpoint = with_quantization(copy_of(tiny_checkpoint), fp8)
    with pytest.raises(UnsupportedError, match=r"format fp8 cannot run on cpu: .*; the nearest that can is w8a8"):
        prepare(checkpoint, name="v", device=CPU)


@pytest.mark.parametrize(
    ("format", "package", "nearest"),
    [("nf4", "bitsandbytes", "bf16"), ("int8", "bitsandbytes", "bf16"), ("w8a8", "torchao", "int8")],
)
def test_a_missing_library_is_named_before_loading(
    format: str, package: str, nearest: str, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny, VariantSpec(name="v", format=format), tmp_path / "v", "cpu")
    installed = environment.installed
    monkeypatch.setattr(environment, "installed", lambda name: name != package and installed(name))
    with pytest.raises(
        UnsupportedError, match=rf"format {format} cannot run on cpu: {package} is not installed .*is {nearest}"
    ):
        prepare(open_checkpoint(str(tmp_path / "v")), name="v", device=CPU)
