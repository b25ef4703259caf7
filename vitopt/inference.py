"""Checkpoints prepared and called: measured together, or asked for the classes of images."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitopt import progress
from vitopt.data.images import ImageSet, image_files
from vitopt.data.labels import fit_labels
from vitopt.environment import devices
from vitopt.errors import DataError, MeasurementError, UnsupportedError
from vitopt.measure.evaluator import Measured, evaluate, failed
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import EvaluateSpec, RunSpec, VariantSpec


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to measure and how to run it; `failure` says why it could not even be made."""

    name: str
    source: str
    run: RunSpec = field(default_factory=RunSpec)
    asked: VariantSpec | None = None
    failure: str | None = None


def measure(
    candidates: Sequence[Candidate],
    spec: EvaluateSpec,
    *,
    images: ImageSet | None = None,
    skip_bad: bool = False,
    baseline: str | None = None,
    device: str = "auto",
    strict: bool = False,
    untrained: bool = False,
    ready: Callable[[Measured], None] = lambda one: None,
) -> list[Measured]:
    """Prepare checkpoints and measure them together; results in the order of `candidates`.

    `ready` gets each result as soon as there is something in it, and again with more, see `evaluate`.

    Raises:
        UnsupportedError: none of them can run here, or, with `strict`, one of them cannot.
        DataError: the labels do not fit a model's head.
        MeasurementError: the baseline or first only guesses, and its weights are not `untrained` or `random:`.
    """
    target = devices.resolve_device(device)
    runnables: list[TorchRunnable] = []
    failures = {one.name: one.failure for one in candidates if one.failure is not None}
    for one in candidates:
        if one.name in failures:
            continue
        try:
            checkpoint = open_checkpoint(one.source)
            runnable = prepare(checkpoint, name=one.name, device=target, run=one.run, asked=one.asked, strict=strict)
        except UnsupportedError as error:
            if strict or one.asked is None:
                raise
            failures[one.name] = str(error)
        else:
            runnables.append(runnable)
    if not runnables:
        raise UnsupportedError("no variant can run here: " + "; ".join(f"{k}: {v}" for k, v in failures.items()))
    measured = evaluate(
        runnables,
        spec,
        images=None if images is None else _fit_all(images, [runnable.checkpoint for runnable in runnables]),
        skip_bad=skip_bad,
        baseline=baseline,
        untrained=untrained or any(runnable.checkpoint.is_random for runnable in runnables),
        ready=ready,
    )
    results = {one.record.variant.name: one for one in measured}
    for candidate in candidates:
        if candidate.name in failures and candidate.asked is not None:
            results[candidate.name] = failed(candidate.name, candidate.asked, failures[candidate.name], target)
    return [results[one.name] for one in candidates if one.name in results]


def _fit_all(images: ImageSet, checkpoints: Sequence[Checkpoint]) -> ImageSet:
    """Labels as the first head orders them; all heads must have the same classes."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.label_names != first.label_names:
            raise DataError(f"{other.source} and {first.source} have different classes, so they cannot be compared")
    return fit_labels(images, first.label_names)


def predict(
    source: str, paths: Sequence[Path], *, top: int, run: RunSpec | None = None, device: str = "auto"
) -> list[dict[str, Any]]:
    """Classify image files: per image its path and the `top` classes with their probabilities in percent.

    Raises:
        BadImageError: a file is missing or cannot be decoded.
        MeasurementError: the model gives no finite numbers for an image.
    """
    checkpoint = open_checkpoint(source)
    runnable = prepare(checkpoint, name=source, device=devices.resolve_device(device), run=run)
    images = image_files(paths)
    # Names that stand twice, as two of ImageNet's do, are told apart by their outputs.
    counts = Counter(checkpoint.label_names)
    names = [
        f"{name} (output {index})" if counts[name] > 1 else name for index, name in enumerate(checkpoint.label_names)
    ]
    results = []
    for index, path in enumerate(progress.track(paths, "predicting", len(paths))):
        pixels = runnable.preprocess(images.image(index)).unsqueeze(0).to(runnable.device)
        logits = runnable(pixels)[0].float()
        if not torch.isfinite(logits).all():
            raise MeasurementError(
                f"{source} gives logits that are not finite for {path}: its 16-bit type may overflow"
            )
        probabilities = logits.softmax(-1)
        best = probabilities.topk(min(top, len(probabilities)))
        classes = [
            {"label": names[label], "index": label, "percent": 100 * share}
            for share, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        results.append({"image": str(path), "classes": classes})
    return results
