"""The two passes of an adaptive model, prepared alike, and what the first sees of the second's pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vitopt.adaptive.pixels import PixelMap, pixel_map
from vitopt.engines import runtime
from vitopt.engines.runtime import Prepared
from vitopt.errors import CheckpointError
from vitopt.models.checkpoint import Checkpoint
from vitopt.recipe import HeldSpec, RunSpec


@dataclass(frozen=True)
class Passes:
    """`first` runs for all images, on what `pixels` makes of the second's."""

    first: Prepared
    second: Prepared
    pixels: PixelMap

    def first_logits(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`pixel_values`: (batch, 3, height, width), of the second pass. Returns logits (batch, classes), float32, and
        the steps of the class token (batch,) where they are watched."""
        outputs = self.first(self.pixels(pixel_values)).float()
        classes = self.first.checkpoint.config.num_labels
        return (outputs, None) if outputs.shape[1] == classes else (outputs[:, :classes], outputs[:, classes])


def prepare_passes(
    first: Checkpoint,
    second: Checkpoint,
    *,
    name: str,
    device: torch.device,
    run_first: RunSpec,
    run: RunSpec,
    watched: bool,
    asked: HeldSpec | None = None,
    strict: bool = False,
) -> Passes:
    """Both passes ready to be called; `watched`: the first tells how its class token moves, see `optimize.class_token`.

    Raises:
        CheckpointError: they have other classes.
        UnsupportedError: one of them cannot run here.
    """
    require_same_classes(first, second)
    one = runtime.prepare(
        first,
        name=f"{name} (first pass)",
        device=device,
        run=run_first,
        asked=asked,
        strict=strict,
        watch_class_token=watched,
    )
    other = runtime.prepare(second, name=name, device=device, run=run, asked=asked, strict=strict)
    return Passes(one, other, pixel_map(one.preprocess, other.preprocess, one.input_size, device))


def require_same_classes(first: Checkpoint, second: Checkpoint) -> None:
    """Refuse passes whose answers cannot stand for each other's.

    Raises:
        CheckpointError: their classes differ, or are labels that do not exclude each other.
    """
    require_same_labels(first.source, first.label_names, second.source, second.label_names)
    if any(c.config.problem_type == "multi_label_classification" for c in (first, second)):
        raise CheckpointError(f"{second.source} has labels that do not exclude each other, so no class is its answer")


def require_same_labels(first: str, of_first: Sequence[str], second: str, of_second: Sequence[str]) -> None:
    """Refuse a `first` and a `second` pass, in words, whose classes have these different names.

    Raises:
        CheckpointError: they do.
    """
    counts = len(of_first), len(of_second)
    if counts[0] != counts[1]:
        raise CheckpointError(
            f"{first} has {counts[0]} classes and {second} {counts[1]}: take a draft that was fine-tuned on the same "
            "data"
        )
    # A head without names of its own has the order of who trained it.
    if any(all(name.startswith("LABEL_") for name in names) for names in (of_first, of_second)):
        return
    if differ := [pair for pair in zip(of_first, of_second, strict=True) if pair[0] != pair[1]]:
        raise CheckpointError(
            f"{first} and {second} have different classes, first {differ[0][0]!r} and {differ[0][1]!r}: "
            "take a draft that was fine-tuned on the same data"
        )
