"""What a device can give at most, measured in the same run: the floor under every latency.

A model cannot be faster than its arithmetic at the rate of a large matrix product, nor than reading its weights at
the rate of a large copy (the roofline of Williams et al., doi 10.1145/1498765.1498785). Utilisation is the share of
that matrix product's rate which the model's own arithmetic reaches.
"""

import functools
import statistics
from collections.abc import Callable

import torch

from vitopt.formats import FORMATS
from vitopt.measure.latency import clock_for
from vitopt.records import Roofline

_GEMM_SIDE = {"cuda": 8192, "cpu": 2048}
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
_CALLS = 15
_FP8_MAX = 448.0


def roofline(format: str, device: torch.device) -> Roofline | None:
    """The device's rates for a variant most of whose layers are held in `format`; None for a format not known here."""
    computes_in = next((facts.computes_in for name, facts in FORMATS.items() if name == format), None)
    if computes_in is None:
        return None
    return Roofline(
        gemm_format=computes_in,
        gemm_flops_per_second=gemm_rate(computes_in, device),
        copy_bytes_per_second=copy_rate(device),
    )


@functools.cache
def gemm_rate(format: str, device: torch.device) -> float:
    """FLOP per second of a large square matrix product in a format."""
    side = _GEMM_SIDE[device.type]
    return 2 * side**3 / _seconds(_PRODUCTS[format](side, device), device)


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy within the device's memory."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device)


def floor_ms(batch_size: int, flops: int, weight_bytes: int, rates: Roofline) -> float:
    """Milliseconds under which no call with so many images can be at these rates."""
    computing = batch_size * flops / rates.gemm_flops_per_second
    reading = weight_bytes / rates.copy_bytes_per_second
    return 1000 * max(computing, reading)


def utilisation_percent(batch_size: int, flops: int, milliseconds: float, rates: Roofline) -> float:
    """Share of the matrix product's rate that the model's arithmetic reaches."""
    return 100 * batch_size * flops / (milliseconds / 1000) / rates.gemm_flops_per_second


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    clock = clock_for(device)
    with torch.inference_mode():
        samples = [clock.time(call)[0] for _ in range(_CALLS)]
    return statistics.median(samples[len(samples) // 3 :]) / 1000  # the first warm up


def _floating(dtype: torch.dtype, side: int, device: torch.device) -> Callable[[], object]:
    # Random numbers: zeros draw less power, and compute faster for it.
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return lambda: left @ right


def _int8(side: int, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(left, right.t())


def _fp8(side: int, device: torch.device) -> Callable[[], object]:
    left, right = (
        torch.randn(side, side, device=device).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn) for _ in range(2)
    )
    rows, columns = torch.ones(side, 1, device=device), torch.ones(1, side, device=device)
    return lambda: torch._scaled_mm(
        left, right.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
    )


_PRODUCTS: dict[str, Callable[[int, torch.device], Callable[[], object]]] = {
    "fp32": functools.partial(_floating, torch.float32),
    "fp16": functools.partial(_floating, torch.float16),
    "bf16": functools.partial(_floating, torch.bfloat16),
    "int8": _int8,
    "fp8": _fp8,
}
