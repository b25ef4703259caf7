"""Checkpoints prepared and measured together."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vitopt import progress, storage
from vitopt.adaptive.runtime import AnyPrepared, prepare
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.engines.runtime import make
from vitopt.environment import devices
from vitopt.environment.cluster import answers_of_cluster
from vitopt.errors import CheckpointError, DataError, MeasurementError, UnsupportedError
from vitopt.measure import accuracy
from vitopt.measure.evaluator import Measured, evaluate, failed
from vitopt.measure.own_metrics import Compute
from vitopt.measure.runnable import NamesOutputs, Preprocess, Runnable, outputs_of
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.recipe import ENGINES, EvaluateSpec, RunSpec, VariantSpec

IMAGES_PER_PART = 500  # of what one process of Ray does at a time


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to measure and how to run it, or what can be called already; `failure` says why it could not even be
    made. `preprocess` stands instead of the checkpoint's own."""

    name: str
    source: str | Checkpoint | Runnable
    run: RunSpec = field(default_factory=RunSpec)
    asked: VariantSpec | None = None
    failure: str | None = None
    preprocess: Preprocess | None = None


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
    metrics: Mapping[str, Compute] = MappingProxyType({}),
    ready: Callable[[Measured], None] = lambda one: None,
    ray: bool = False,
) -> list[Measured]:
    """Prepare checkpoints and measure them together; results in the order of `candidates`.

    `ready` gets each result as soon as there is something in it, and again with more, see `evaluate`; there also
    `metrics`. With `ray` accuracy is the work of Ray's processes (`vitopt.environment.cluster`), all else of this one.

    Raises:
        UnsupportedError: none of them can run here, or, with `strict`, one of them cannot.
        DataError: the labels do not fit a model's head.
        MeasurementError: the baseline or first only guesses, and its weights are not `untrained` or `random:`.
    """
    target = devices.resolve_device(device)
    runnables: list[Runnable] = []
    able: list[Candidate] = []
    failures = {one.name: one.failure for one in candidates if one.failure is not None}
    for one in candidates:
        if one.name in failures:
            continue
        try:
            runnable = _called(one, target, strict)
        except UnsupportedError as error:
            if strict or one.asked is None:
                raise
            failures[one.name] = str(error)
        else:
            runnables.append(runnable)
            able.append(one)
    if not runnables:
        raise UnsupportedError("no variant can run here: " + "; ".join(f"{k}: {v}" for k, v in failures.items()))
    measured = evaluate(
        runnables,
        spec,
        images=None if images is None else _fit_all(images, runnables),
        skip_bad=skip_bad,
        baseline=baseline,
        untrained=untrained or any(isinstance(one, AnyPrepared) and one.checkpoint.is_random for one in runnables),
        metrics=metrics,
        ready=ready,
        predict=functools.partial(_predict_by_ray, able, device, strict) if ray else accuracy.predict,
    )
    results = {one.record.variant.name: one for one in measured}
    for candidate in candidates:
        if candidate.name in failures and candidate.asked is not None:
            results[candidate.name] = failed(candidate.name, candidate.asked, failures[candidate.name], target)
    return [results[one.name] for one in candidates if one.name in results]


def made(
    checkpoint: Checkpoint, variants: Sequence[VariantSpec], folder: Path, device: str, scales: ImageSet | None = None
) -> Iterator[Candidate]:
    """Each variant with its checkpoint, made in `folder`, or with the reason why that could not be made.

    `scales`: images that give engines their static scales.

    Raises:
        CheckpointError, MeasurementError, UnsupportedError: the first could not be made, which is the baseline.
    """
    failures: dict[str, str] = {}
    for variant in variants:
        held = what = str(variant.format)
        if variant.engine in ENGINES:
            compiled_in = variant.model_dump(mode="json", include=set(ENGINES[variant.engine].options))
            what = f"{variant.engine}-{variant.format}"
            held = f"{what}-{storage.sha256_of_json(compiled_in)[:8]}"
        output = folder / held
        if not output.exists() and held not in failures:
            try:
                with progress.task(f"making {what}", None):
                    make(checkpoint, variant, output, device, scales=scales)
            except (CheckpointError, MeasurementError, UnsupportedError) as error:
                if variant is variants[0]:
                    raise
                failures[held] = str(error)
        yield Candidate(variant.name, str(output), variant.run, variant, failures.get(held))


def _called(candidate: Candidate, device: torch.device, strict: bool) -> Runnable:
    source = candidate.source
    if not isinstance(source, str | Checkpoint):
        if source.name != candidate.name:
            source = copy.copy(source)
            source.name = candidate.name
        return source
    checkpoint = open_checkpoint(source) if isinstance(source, str) else source
    run, asked = candidate.run, candidate.asked
    runnable = prepare(checkpoint, name=candidate.name, device=device, run=run, asked=asked, strict=strict)
    if candidate.preprocess is not None:
        runnable.preprocess = candidate.preprocess
    return runnable


class _Shares:
    """Variants that are loaded once and answer for one part of the images after another."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        device: str,
        strict: bool,
        images: ImageSet,
        parts: int,
        options: dict[str, Any],
    ) -> None:
        target = devices.resolve_device(device)
        self._runnables = [_called(one, target, strict) for one in candidates]
        self._images, self._parts, self._options = images, parts, options

    def __call__(self, part: str) -> accuracy.Share:
        return accuracy.predict_share(self._runnables, self._images, (int(part), self._parts), **self._options)


def _predict_by_ray(
    candidates: Sequence[Candidate],
    device: str,
    strict: bool,
    runnables: Sequence[Runnable],
    images: ImageSet,
    **options: Any,
) -> accuracy.Outcome:
    """`accuracy.predict` for runnables that other processes make of their candidates."""
    parts = -(-len(images) // IMAGES_PER_PART)
    make = functools.partial(_Shares, candidates, device, strict, images, parts, options)
    answers = answers_of_cluster(make, list(map(str, range(parts))), device)
    shares = list(progress.track(answers, "accuracy, parts of the images", parts))
    outcome = accuracy.merged(runnables, images, shares, options["batch_size"])
    for one in runnables:
        note = "accuracy is the work of Ray's processes, whose devices may differ from the one that was timed"
        outcome.notes.setdefault(one.name, []).append(note)
    return outcome


def _fit_all(images: ImageSet, runnables: Sequence[Runnable]) -> ImageSet:
    """Labels as the first head orders them; all that name their outputs must have the same."""
    naming = [one for one in runnables if isinstance(one, NamesOutputs) and one.label_names]
    named = [(one.name, list(one.label_names or ())) for one in naming]
    for name, labels in named[1:]:
        if labels != named[0][1]:
            raise DataError(f"{name} and {named[0][0]} have different classes, so they cannot be compared")
    if named:
        return fit_labels(images, named[0][1])
    if images.class_names is not None and (one := next((o for o in runnables if outputs_of(o) != "embedding"), None)):
        raise DataError(
            f"{images.name} names its classes, and {one.name} does not say what its outputs are called: "
            "give it `label_names`, or give labels that count its outputs from 0"
        )
    return images
