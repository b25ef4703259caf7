"""What only a GPU can show; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from vitopt import environment, pipeline
from vitopt.data.images import open_images
from vitopt.models.checkpoint import open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import prepare
from vitopt.pipeline import Candidate
from vitopt.recipe import DataSpec, EvaluateSpec, LatencySpec, VariantSpec

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _needs_no_packages_beyond(request: pytest.FixtureRequest) -> None:
    format = getattr(request.node, "callspec", None) and request.node.callspec.params.get("format")
    reason = environment.why_not_format(format, CUDA) if format else None
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("format", ["bf16", "fp16", "nf4", "int8", "w8a8", "fp8"])
def test_formats_run_and_agree_with_fp32(format: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny_checkpoint))
    plan = quantize(source, VariantSpec(name="v", format=format), tmp_path / "v", "cuda")
    exact = prepare(source, name="fp32", device=CUDA)
    runnable = prepare(open_checkpoint(str(tmp_path / "v")), name=format, device=CUDA)
    assert set(runnable.layers.values()) == set(plan.counts())
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(CUDA)
    expected, found = exact(pixels).float(), runnable(pixels).float()
    error = (found - expected).norm() / expected.norm()
    assert error < {"nf4": 0.5}.get(format, 0.1)


def test_flash_attention_runs_or_says_why_not(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="v", format="bf16"), tmp_path / "v", "cuda")
    half = open_checkpoint(str(tmp_path / "v"))
    flash = prepare(half, name="flash", device=CUDA, attention="flash_attention_2")
    if environment.installed("flash_attn"):
        assert (flash.attention_used, flash.attention_reason) == ("flash_attention_2", None)
    else:
        assert (flash.attention_used, flash.attention_reason) == (
            "sdpa",
            "flash_attn is not installed (pip install flash-attn)",
        )
    full = prepare(open_checkpoint(str(tiny_checkpoint)), name="full", device=CUDA, attention="flash_attention_2")
    assert full.attention_used == "sdpa"


def test_records_hold_device_time_memory_and_the_gpu(tiny_checkpoint: Path, shapes: Path) -> None:
    spec = EvaluateSpec(batch_size=8, latency=LatencySpec(batch_sizes=(1, 8), iterations=20, rounds=4))
    images = open_images(DataSpec(source=str(shapes)), "test")
    (measured,) = pipeline.measure([Candidate("v", str(tiny_checkpoint))], spec, images=images, device="cuda")
    record = measured.record
    assert record.failure is None
    assert record.environment["gpu"]["name"] == torch.cuda.get_device_name(0)
    assert record.memory is not None and record.size is not None
    assert record.memory.kind == "cuda_allocated"
    assert record.memory.peak_bytes > record.size.weight_bytes
    for row in record.latency:
        assert row.device_p50_ms is not None
        assert 0 < row.device_p50_ms <= row.p50_ms
