"""Calibrated rounding of a whole model, block by block, on the inputs that its already rounded blocks give."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from vitopt import progress, storage
from vitopt.errors import MeasurementError
from vitopt.models.names import Layer, block_names
from vitopt.optimize.hybrid import Boundary, Hybrid
from vitopt.optimize.rounding import Grid, Moments, Rounded, compensated, descended
from vitopt.recipe import RoundingSpec

logger = logging.getLogger(__name__)

_MEMORY_BYTES = 2_000_000_000  # of the hidden states of all images; what is more lies in files
_EVEN = 0.1  # share of a token's weight that all have alike; the rest is its importance


@torch.no_grad()
def round_blocks(
    model: nn.Module,
    model_type: str,
    layers: Iterable[Layer],
    grids: Mapping[str, Grid],
    pixels: Iterable[torch.Tensor],
    spec: RoundingSpec,
    importance: Mapping[str, Sequence[torch.Tensor]] | None = None,
) -> dict[str, Rounded]:
    """Round the weights of `layers` in place, in fp32, and let their biases keep the mean outputs.

    `grids`: logical name -> what its weight can hold. `pixels`: batches (images, 3, height, width). `importance`: of
    the tokens of each batch, all alike without it. Returns logical name -> codes and scales. One pass over a block
    gathers the covariances of all its inputs, a second one moves the hidden states on: beside the model, memory holds
    these of one block.

    Raises:
        MeasurementError: an input of a layer is not all finite numbers.
    """
    blocks = block_names(model, model_type)
    hybrid, chosen = Hybrid(model, model, blocks), list(layers)
    rounded: dict[str, Rounded] = {}
    with storage.temporary_folder() as folder, progress.task("rounding blocks", len(blocks)) as bar:
        hidden, count = _first_inputs(hybrid, pixels, folder)
        for block in range(len(blocks)):
            inside = [layer for layer in chosen if layer.block == block]
            moments = _gather(hybrid, block, inside, hidden, count, importance) if inside else {}
            for layer in inside:
                linear, grid = model.get_submodule(layer.module), grids[layer.logical]
                rounded[layer.logical] = _round(linear, moments[layer.logical], grid, spec)
            for index in range(count if block + 1 < len(blocks) else 0):
                hidden[index] = hybrid.advance(hidden[index], block)
            bar.advance()
    return rounded


def _first_inputs(hybrid: Hybrid, pixels: Iterable[torch.Tensor], folder: Path) -> tuple[Boundary, int]:
    hidden, count = Boundary(folder, _MEMORY_BYTES), 0
    for count, batch in enumerate(pixels, start=1):
        hidden[count - 1] = hybrid.block_input(batch, 0)
    hybrid.logits_from(hidden[0][:1], 0)  # the first such call runs the model once more, which no hook may see
    return hidden, count


def _gather(
    hybrid: Hybrid,
    block: int,
    layers: list[Layer],
    hidden: Boundary,
    count: int,
    importance: Mapping[str, Sequence[torch.Tensor]] | None,
) -> dict[str, Moments]:
    """Logical name -> moments of the inputs of each of `layers`, all of `block`."""
    moments: dict[str, Moments] = {}
    weights = {layer.logical: iter(_weights(importance[layer.logical])) for layer in layers} if importance else {}
    run = hybrid.logits_from if block + 1 == len(hybrid.blocks) else hybrid.advance
    with ExitStack() as hooks:
        for layer in layers:
            linear = hybrid.base.get_submodule(layer.module)
            moments[layer.logical] = Moments(linear.in_features, linear.weight.device)

            def look(module: nn.Module, given: tuple[torch.Tensor], name: str = layer.logical) -> None:
                if not torch.isfinite(given[0].sum()):
                    raise MeasurementError(
                        f"the input of {name} is not all finite numbers: weights or images are broken, or the model "
                        "overflows; keep the layers before it in 16 bit"
                    )
                moments[name].add(given[0], next(weights[name]) if weights else None)

            hooks.callback(linear.register_forward_pre_hook(look).remove)
        for index in range(count):
            run(hidden[index], block)
    for name, found in moments.items():
        if found.tokens <= len(found.mean):
            logger.warning(
                "%s: %d tokens of calibration images do not determine how its %d inputs depend on each other; "
                "damping fills the gap, more images round better",
                *(name, found.tokens, len(found.mean)),
            )
    return moments


def _weights(importance: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Of the tokens of each batch, 1 on average; all alike where the importance is not known."""
    mean = torch.cat(tuple(importance)).mean()
    if not torch.isfinite(mean) or mean <= 0:
        return [torch.ones_like(batch) for batch in importance]
    return [(1 - _EVEN) * batch / mean + _EVEN for batch in importance]


def _round(linear: nn.Linear, moments: Moments, grid: Grid, spec: RoundingSpec) -> Rounded:
    weight = linear.weight.detach().clone()
    hessian = moments.hessian(spec.damping)
    rounded = compensated(weight, hessian, grid, search=spec.search_scales)
    if spec.search_scales:
        rounded = descended(weight, hessian, rounded)
    linear.weight.copy_(rounded.values())
    if linear.bias is not None:
        linear.bias += (weight - linear.weight) @ moments.mean
    return rounded
