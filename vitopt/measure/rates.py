"""What a device can give at most, measured in the same run: the floor under every latency.

A model cannot be faster than its arithmetic at the rate of a large matrix product, nor than reading its weights at
the rate of a large copy (the roofline of Williams et al., doi 10.1145/1498765.1498785). Utilisation is the share of
that matrix product's rate which the model's own arithmetic reaches.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from vitopt.formats import FORMATS
from vitopt.measure.latency import clock_for
from vitopt.records import Roofline

_GEMM_SIDE = {"cuda": 8192, "cpu": 2048}
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}
_CALLS = 10
_WARM_SECONDS = 1.0  # of work until clocks are those that power and heat allow
_FP8_MAX = 448.0


def roofline(format: str, device: torch.device) -> Roofline | None:
    """The device's rates for a variant most of whose layers are held in `format`; None for a format not known here."""
    computes_in = next((facts.computes_in for name, facts in FORMATS.items() if name == format), None)
    if computes_in is None:
        return None
    gemm = gemm_rate(computes_in, device)
    return Roofline(
        gemm_format=computes_in,
        gemm_flops_per_second=gemm.warm,
        gemm_flops_per_second_cold=gemm.cold,
        copy_bytes_per_second=copy_rate(device),
    )


class GemmRate(NamedTuple):
    """FLOP per second of a queue of products: on a device that was idle before, and on one that has worked."""

    cold: float
    warm: float


@functools.cache
def gemm_rate(format: str, device: torch.device) -> GemmRate:
    """Rates of a large square matrix product in a format."""
    side, clock = _GEMM_SIDE[device.type], clock_for(device)
    product = _PRODUCTS[format](side, device)
    with torch.inference_mode():
        product()  # libraries load their kernels
        cold_ms = clock.queued(product, _CALLS)
        clock.sustained(product, _WARM_SECONDS)
        warm_ms = clock.queued(product, _CALLS)
    return GemmRate(*(2 * side**3 / (milliseconds / 1000) for milliseconds in (cold_ms, warm_ms)))


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy within the device's memory."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the first writes to memory that was not there yet
    return 2 * source.numel() / (clock_for(device).queued(lambda: target.copy_(source), _CALLS) / 1000)


def floor_ms(batch_size: int, flops: int, weight_bytes: int, rates: Roofline) -> float:
    """The fewest milliseconds that a call with this many images can take at these rates."""
    fastest = max(rates.gemm_flops_per_second, rates.gemm_flops_per_second_cold or 0)
    computing = batch_size * flops / fastest
    reading = weight_bytes / rates.copy_bytes_per_second
    return 1000 * max(computing, reading)


def utilisation_percent(batch_size: int, flops: int, milliseconds: float, rates: Roofline) -> float:
    """Share of the rate of a matrix product, on a device that has worked, that the model's arithmetic reaches."""
    return 100 * batch_size * flops / (milliseconds / 1000) / rates.gemm_flops_per_second


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
