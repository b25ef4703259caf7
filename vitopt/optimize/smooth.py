"""A step that makes the columns of layers' inputs alike, the model's function unchanged: 8 bits then lose less of them.

SmoothQuant (arXiv 2211.10438): a column is divided by a factor in what makes it, and its weights are multiplied by it.
What makes it must be linear: a LayerNorm before query, key and value or before fc1, or the value projection, whose
columns attention does not mix, before the output projection. Behind GELU there is no such place.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vitopt import progress
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor, batches
from vitopt.errors import UnsupportedError
from vitopt.layers import QKV
from vitopt.models.checkpoint import Checkpoint
from vitopt.models.families import FAMILIES
from vitopt.models.names import block_names
from vitopt.optimize.equivalent import write_equivalent
from vitopt.optimize.inputs import Inputs, collect
from vitopt.steps import SmoothSpec
from vitopt.transformation import require_images

_BATCH = 16
_STRENGTHS = (0.25, 0.5, 0.75, 0.9, 1.0)


@dataclass(frozen=True)
class Smoothed:
    """How many inputs of layers were evened out, and how many there are."""

    folded: int
    inputs: int

    def summary(self) -> str:
        """In a few words, for the line that a run prints."""
        return f"evened out {self.folded} of {self.inputs} inputs of layers"


def smooth(
    checkpoint: Checkpoint,
    spec: SmoothSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet | None = None,
    seed: int = 0,
) -> Smoothed:
    """Write a checkpoint with the same answers, the columns of whose layers' inputs are alike over `images`.

    The images are noted as seen.

    Raises:
        DataError: there are no images.
        CheckpointError: the checkpoint is quantized already.
        UnsupportedError: the blocks of this model are of another kind: none has a place for factors, or answers change.
        MeasurementError: an input is no finite number.
        StorageError: the output would replace something else, is in use, or cannot be written.
    """
    images = require_images(images, "`smooth`")

    def change(model: PreTrainedModel, processor: Any) -> Smoothed:
        stream = progress.track(
            batches(images, Preprocessor(processor), _BATCH), "smoothing", -(-len(images) // _BATCH)
        )
        made = even_out(model, checkpoint.config.model_type, (batch.pixel_values for batch in stream))
        if made.folded == 0:
            raise UnsupportedError(
                f"the blocks of {checkpoint.source} cannot be smoothed: no LayerNorm or value projection fits; leave "
                "the step out"
            )
        return made

    return write_equivalent(checkpoint, output, device, "smooth", change, images, "smoothing")


@torch.inference_mode()
def even_out(model: nn.Module, model_type: str, pixels: Iterable[torch.Tensor]) -> Smoothed:
    """Smooth a live model in place over `pixels`, (batch, 3, height, width) each, as far as its blocks allow."""
    found, folded = collect(model, model_type, pixels), 0
    blocks, norms = block_names(model, model_type), _norms(model_type)
    layers = {layer.logical: layer.module for one in found for layer in one.layers}
    for one in found:
        block, kind = one.layers[0].block, one.layers[0].logical.rpartition(".")[2]
        assert block is not None
        if kind == "output":
            source = layers.get(f"block.{block}.value", layers.get(f"block.{block}.{QKV}"))
            maker = model.get_submodule(source) if source else None
        elif kind != "fc2" and norms is not None:
            maker = getattr(model.get_submodule(blocks[block]), norms[kind == "fc1"], None)
        else:
            maker = None
        if isinstance(maker, nn.Linear | nn.LayerNorm) and maker.weight is not None:
            factors = best_factors(one)
            # Of a layer that makes query, key and value the last third is value.
            for parameter in filter(lambda parameter: parameter is not None, (maker.weight, maker.bias)):
                part = parameter[len(parameter) - len(factors) :]
                part.copy_((part.t() / factors).t())
            for name in dict.fromkeys(layer.module for layer in one.layers):
                weight = model.get_submodule(name).weight
                weight.copy_(weight * factors)
            folded += 1
    return Smoothed(folded, len(found))


def _norms(model_type: str) -> tuple[str, str] | None:
    return FAMILIES[model_type].norms


def best_factors(inputs: Inputs) -> torch.Tensor:
    """(columns,): factors of the strength with which static int8 scales lose least, of what patches or another group
    of tokens gives, whichever loses more."""

    def factors(strength: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ranges: factors_of(ranges[:, -1], inputs.weight, strength)

    strength = min(_STRENGTHS, key=lambda strength: max(inputs.lost("w8a8", factors(strength))))
    return factors(strength)(inputs.ranges)


def factors_of(ranges: torch.Tensor, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """(columns,): range^strength / weight^(1 - strength), of largest magnitudes (SmoothQuant, eq. 4); 1 on average.

    `ranges`: (2, columns), the smallest and the largest input. `weight`: (out features, columns).
    """
    factors = _positive(ranges[1] - ranges[0]) ** strength / _positive(weight.abs().amax(0)) ** (1 - strength)
    return factors / factors.log().mean().exp()


def _positive(sizes: torch.Tensor) -> torch.Tensor:
    """`sizes`, none of them below a thousandth of their mean."""
    return torch.maximum(sizes, 1e-3 * sizes.mean()).clamp(min=1e-12)
