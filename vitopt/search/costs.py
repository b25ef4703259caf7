"""What keeping a unit in 16 bit costs: bytes of weights, and milliseconds measured on this device."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from vitopt.measure.latency import clock_for, time_interleaved
from vitopt.models.checkpoint import weight_bytes
from vitopt.optimize.hybrid import Hybrid
from vitopt.recipe import LatencySpec
from vitopt.search.sensitivity import Unit

LATENCY = LatencySpec(batch_sizes=(1,), iterations=60, rounds=10, warmup_seconds=5)


def extra_bytes(hybrid: Hybrid, unit: Unit) -> int:
    """Weight bytes that the donor's layers of `unit` take beyond those of the base, which is quantized."""
    return sum(
        weight_bytes(hybrid.donor.get_submodule(layer.module)) - weight_bytes(hybrid.base.get_submodule(layer.module))
        for layer in unit.layers
    )


def extra_ms(hybrid: Hybrid, chosen: Sequence[Unit], pixels: torch.Tensor) -> dict[str, float | None]:
    """Milliseconds per call that each unit takes more with the donor's layers, for one image (1, 3, height, width).

    Units of the same shapes take the same time: one block of each kind is timed with and without it, and a unit of
    several blocks takes the sum. None where a block cannot be called by itself.
    """
    by_kind: dict[tuple[object, ...], float | None] = {}
    by_name: dict[str, float | None] = {}
    for unit in chosen:
        milliseconds = []
        for block in dict.fromkeys(layer.block or 0 for layer in unit.layers):
            part = Unit(unit.name, block, tuple(layer for layer in unit.layers if layer.block == block))
            kind = tuple((layer.logical.rsplit(".", 1)[-1], layer.parameters) for layer in part.layers)
            if kind not in by_kind:
                by_kind[kind] = _time_unit(hybrid, part, pixels)
            milliseconds.append(by_kind[kind])
        by_name[unit.name] = None if None in milliseconds else sum(ms for ms in milliseconds if ms is not None)
    return by_name


def _time_unit(hybrid: Hybrid, unit: Unit, pixels: torch.Tensor) -> float | None:
    run = hybrid.block_call(pixels, unit.block)
    name = hybrid.blocks[unit.block]
    packed = hybrid.base.get_submodule(name)
    # Both blocks stand side by side: exchanging layers takes longer than some of them run.
    lent = {layer.module.removeprefix(f"{name}."): hybrid.donor.get_submodule(layer.module) for layer in unit.layers}
    kept = _with_layers(packed, lent)

    def call(block: nn.Module) -> object:
        with torch.inference_mode():
            return run(block)

    calls = {"packed": lambda: call(packed), "kept": lambda: call(kept)}
    timings = time_interleaved(calls, LATENCY, clock_for(pixels.device), "cost")
    if any(timing.failure for timing in timings.values()):
        return None
    medians = {name: float(np.median(timing.samples_ms)) for name, timing in timings.items()}
    return medians["kept"] - medians["packed"]


def _with_layers(block: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """A second block of the same weights, with other modules in the places named."""
    second = _sharing(block)
    for name, layer in layers.items():
        second.set_submodule(name, layer)
    return second


def _sharing(module: nn.Module) -> nn.Module:
    second = copy.copy(module)
    children = {name: None if child is None else _sharing(child) for name, child in module._modules.items()}
    second.__dict__["_modules"] = children
    return second
