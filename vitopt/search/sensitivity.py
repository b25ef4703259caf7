"""How much each block or linear layer suffers from a format, and how much keeping it in 16 bit brings back.

*Damage*: only this unit is quantized. *Recovery*: only this unit is kept in 16 bit. Top-1 on a thousand
images cannot rank units, so each also gets the KL divergence and the normalised error of the logits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from vitopt import progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor, batches, on_device
from vitopt.measure.predictions import Predictions
from vitopt.models.names import Layer
from vitopt.optimize.hybrid import Boundary, Hybrid

Granularity = Literal["block", "linear", "kind"]
Scoring = Literal["damage", "recovery"]
DEFAULT_MEMORY_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Unit:
    """A block, a linear layer of it, or a kind of layer in all blocks, under its logical name; `block`: the first."""

    name: str
    block: int
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Calibration:
    """Images in fixed batches, read anew at each pass so that never all pixels are held, with what identifies them.

    `stream` starts a pass: tensors (batch, 3, height, width) on the models' device, `count` of them.
    """

    ids: tuple[str, ...]
    image_sha256: tuple[str, ...]
    labels: np.ndarray
    stream: Callable[[], Iterable[torch.Tensor]]
    count: int

    def predictions(self, logits: Sequence[torch.Tensor]) -> Predictions:
        """Logits per batch as predictions over these images."""
        return Predictions(self.ids, self.image_sha256, self.labels, torch.cat(list(logits)).numpy())


def calibration_of(images: ImageSet, preprocess: Preprocessor, device: torch.device, batch_size: int) -> Calibration:
    """Images whose labels fit the head, ready for the models on `device`."""

    def stream() -> Iterator[torch.Tensor]:
        for batch in on_device(batches(images, preprocess, batch_size), device):
            yield batch.pixel_values

    count = -(-len(images) // batch_size)
    return Calibration(images.ids, images.image_hashes, np.array(images.labels), stream, count)


def units(layers: Sequence[Layer], granularity: Granularity) -> list[Unit]:
    """All blocks, all linear layers in blocks, or all kinds of these, in order."""
    inside = [layer for layer in layers if layer.block is not None]
    if granularity == "linear":
        return [Unit(layer.logical, layer.block or 0, (layer,)) for layer in inside]
    if granularity == "kind":
        kinds: dict[str, list[Layer]] = {}
        for layer in inside:
            kinds.setdefault(layer.logical.rpartition(".")[2], []).append(layer)
        return [Unit(kind, min(one.block or 0 for one in of), tuple(of)) for kind, of in kinds.items()]
    numbers = sorted({layer.block for layer in inside if layer.block is not None})
    return [Unit(f"block.{n}", n, tuple(layer for layer in inside if layer.block == n)) for n in numbers]


def mixture_logits(
    hybrid: Hybrid,
    calibration: Calibration,
    chosen: Sequence[Unit],
    *,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    done: Callable[[str, list[torch.Tensor]], None],
    description: str = "sensitivity",
) -> list[torch.Tensor]:
    """Call `done(unit, logits per batch)` for each of `chosen` lent by the donor, in order of blocks.

    Returns the base model's own logits per batch, which the boundary gives when it has reached the end.

    With L blocks this runs (L + 3) / (2 L + 2) of the blocks that evaluating the base and each mixture anew would,
    0.54 at 24 blocks: a block boundary is kept for all images, each unit of that block starts there, then the
    boundary moves on.
    """
    if not chosen:
        return [hybrid.logits(pixels) for pixels in calibration.stream()]
    every = range(calibration.count)
    last = max(unit.block for unit in chosen)
    start = min(unit.block for unit in chosen)
    blocks = len(hybrid.blocks)
    steps = sum(blocks - unit.block for unit in chosen) + blocks
    with storage.temporary_folder() as folder, progress.task(description, steps * len(every)) as bar:
        boundary = Boundary(folder, memory_bytes)
        for index, pixels in enumerate(calibration.stream()):
            boundary[index] = hybrid.block_input(pixels, start)
            bar.advance(start)
        for block in range(start, last + 1):
            for unit in (unit for unit in chosen if unit.block == block):
                with hybrid.lending(unit.layers):
                    logits = []
                    for index in every:
                        logits.append(hybrid.logits_from(boundary[index], block))
                        bar.advance(blocks - block)
                done(unit.name, logits)
            if block < last:
                for index in every:
                    boundary[index] = hybrid.advance(boundary[index], block)
                    bar.advance()
        base = []
        for index in every:
            base.append(hybrid.logits_from(boundary[index], last))
            bar.advance(blocks - last)
    return base
