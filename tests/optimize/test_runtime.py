"""Preparation of a runnable model: attention, formats and what is remembered about both."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vitopt.data.pixels import random_pixels
from vitopt.environment import support
from vitopt.errors import UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import prepare
from vitopt.recipe import RunSpec, VariantSpec

CPU = torch.device("cpu")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_asked_for_runs(tiny: Checkpoint, attention: str) -> None:
    runnable = prepare(tiny, name="v", device=CPU, run=RunSpec(attention=attention))
    assert runnable.run.attention == runnable.attention_used == attention
    assert runnable.reasons.get("attention") is None


def test_sdpa_and_eager_attention_agree_with_each_other_and_with_the_bare_model(tiny: Checkpoint) -> None:
    pixels = random_pixels(4, (32, 32))
    with torch.inference_mode():
        expected = load_model(tiny, attention="eager")(pixel_values=pixels).logits
    for attention in ("sdpa", "eager"):
        logits = prepare(tiny, name="v", device=CPU, run=RunSpec(attention=attention))(pixels)
        assert logits.shape == (4, 4)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_flash_attention_falls_back_says_so_once_and_keeps_both(
    tiny: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        runnable = prepare(tiny, name="mine", device=CPU, run=RunSpec(attention="flash_attention_2"))
    assert runnable.run.attention == "flash_attention_2"
    assert runnable.attention_used == "sdpa"
    assert runnable.reasons.get("attention") == "FlashAttention-2 needs a CUDA device"
    said = [record.getMessage() for record in caplog.records if "flash" in record.getMessage()]
    assert said == ["mine: flash_attention_2 cannot run (FlashAttention-2 needs a CUDA device); using sdpa"]
    pixels = random_pixels(2, (32, 32))
    torch.testing.assert_close(runnable(pixels), prepare(tiny, name="s", device=CPU)(pixels), rtol=0, atol=0)


def test_strict_refuses_instead_of_falling_back(tiny: Checkpoint) -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"mine: flash_attention_2 cannot run: FlashAttention-2 needs a CUDA device; without --strict",
    ):
        prepare(tiny, name="mine", device=CPU, run=RunSpec(attention="flash_attention_2"), strict=True)


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


@pytest.mark.parametrize("run", [{}, {"fuse_qkv": True}, {"sdpa_kernel": "math"}])
def test_channels_last_changes_the_memory_order_and_not_the_answers(run: dict[str, object], tiny: Checkpoint) -> None:
    plain = prepare(tiny, name="v", device=CPU, run=RunSpec(**run))
    turned = prepare(tiny, name="v", device=CPU, run=RunSpec(channels_last=True, **run))
    kernels = [next(m for m in one.model.modules() if isinstance(m, torch.nn.Conv2d)) for one in (plain, turned)]
    orders = [kernel.weight.is_contiguous(memory_format=torch.channels_last) for kernel in kernels]
    assert orders == [False, True]
    seen: list[torch.Tensor] = []
    kernels[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = random_pixels(3, (32, 32))
    torch.testing.assert_close(turned(pixels), plain(pixels), rtol=1e-5, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and torch.equal(seen[0], pixels)
    assert pixels.is_contiguous()  # the caller's stay as they were


def test_random_weights_are_the_same_in_every_type() -> None:
    checkpoint = open_checkpoint("random:vit-tiny-patch16-32")
    wide = prepare(checkpoint, name="v", device=CPU).model.state_dict()
    for dtype in (torch.bfloat16, torch.float16):
        rounded = load_model(checkpoint, dtype=dtype).state_dict()
        assert rounded.keys() == wide.keys()
        assert all(torch.equal(rounded[name], wide[name].to(dtype)) for name in wide)
    again = load_model(checkpoint, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], wide[name]) for name in wide)
    as_bf16 = prepare(checkpoint, name="v", device=CPU, run=RunSpec(run_as="bf16")).model.state_dict()
    assert all(torch.equal(as_bf16[name], wide[name].bfloat16()) for name in wide)


def test_the_command_of_a_process_of_its_own_runs_the_same_uncompiled(tiny: Checkpoint) -> None:
    run = RunSpec(sdpa_kernel="math", run_as="bf16", fuse_qkv=True, channels_last=True)
    runnable = prepare(
        tiny, name="v", device=CPU, run=RunSpec(**run.model_dump() | {"compile": True, "autotune": True})
    )
    python, *module, source, described, batch_size = runnable.alone(7)
    assert (python, module) == (sys.executable, ["-m", "vitopt.optimize.alone"])
    assert (source, batch_size) == (tiny.source, "7")
    assert RunSpec.model_validate_json(described) == run


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
    installed = support.installed
    monkeypatch.setattr(support, "installed", lambda name: name != package and installed(name))
    with pytest.raises(
        UnsupportedError, match=rf"format {format} cannot run on cpu: {package} is not installed .*is {nearest}"
    ):
        prepare(open_checkpoint(str(tmp_path / "v")), name="v", device=CPU)


def test_a_family_without_sdpa_runs_eager_and_says_so_once(
    make_family: Callable[..., Checkpoint], caplog: pytest.LogCaptureFixture
) -> None:
    reason = "transformers has no sdpa for Swinv2ForImageClassification"
    with caplog.at_level(logging.WARNING):
        runnable = prepare(make_family("swinv2"), name="mine", device=CPU, run=RunSpec(sdpa_kernel="math"))
    assert caplog.messages == [
        f"mine: sdpa cannot run ({reason}); using eager",
        f"mine: sdpa kernel math cannot run ({reason}); using the one torch chooses",
    ]
    assert (runnable.attention_used, runnable.reasons.get("attention"), runnable.reasons.get("sdpa_kernel")) == (
        "eager",
        reason,
        reason,
    )
    with pytest.raises(UnsupportedError, match="falls back to eager"):
        prepare(runnable.checkpoint, name="mine", device=CPU, strict=True)
    caplog.clear()
    prepare(runnable.checkpoint, name="mine", device=CPU, run=RunSpec(attention="eager"), strict=True)
    assert caplog.messages == []


def test_what_is_for_a_gpu_alone_is_left_out_and_said_on_a_cpu(
    tiny: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunSpec(compile=True, fuse_qkv=True, fused_kernels=True, dependent_launch=True)
    plain = prepare(tiny, name="plain", device=CPU, run=RunSpec(compile=True, fuse_qkv=True))
    left = prepare(tiny, name="left", device=CPU, run=run)
    assert set(left.reasons) == {"fused_kernels", "dependent_launch"}
    assert all("cpu" in reason and reason in caplog.text for reason in left.reasons.values())
    variant = left.describe()["variant"]
    assert variant.asked["fused_kernels"] and variant.asked["dependent_launch"]
    assert not variant.ran["fused_kernels"] and not variant.ran["dependent_launch"]
    assert [type(module) for module in left.model.modules()] == [type(module) for module in plain.model.modules()]
