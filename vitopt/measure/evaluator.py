"""The shared evaluator: prepared variants and images in, one record and its predictions each out."""

import functools
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from vitopt import progress
from vitopt.data.images import ImageSet
from vitopt.data.pixels import random_pixels
from vitopt.environment import launch, machine
from vitopt.errors import DataError, MeasurementError
from vitopt.measure import accuracy
from vitopt.measure.chance import explain_guessing, is_guessing
from vitopt.measure.comparison import adjusted_for_all
from vitopt.measure.conditions import Conditions, watched
from vitopt.measure.end_to_end import time_end_to_end
from vitopt.measure.failures import attempt, explain_failure
from vitopt.measure.invariance import batch_invariance
from vitopt.measure.latency import clock_for
from vitopt.measure.latency_rows import Rows, call_of, time_rows
from vitopt.measure.memory import peak_memory
from vitopt.measure.overlap import HashedImages, warning
from vitopt.measure.own_metrics import Compute, OwnMetrics, measure_metrics
from vitopt.measure.predictions import Predictions
from vitopt.measure.rates import floor_ms, roofline, utilisation_percent
from vitopt.measure.runnable import CountsFlops, HasSeenImages, Routes, Runnable, ShowsKernel, input_size
from vitopt.measure.throughput import energy_per_image, find_throughput
from vitopt.recipe import EvaluateSpec, VariantSpec
from vitopt.records import Dataset, EndToEnd, Latency, Overlap, Record, Roofline, Variant


@dataclass(frozen=True)
class Measured:
    """A variant's record and, where accuracy was measured, its predictions."""

    record: Record
    predictions: Predictions | None


def evaluate(
    runnables: Sequence[Runnable],
    spec: EvaluateSpec,
    *,
    images: ImageSet | None = None,
    skip_bad: bool = False,
    baseline: str | None = None,
    untrained: bool = False,
    metrics: Mapping[str, Compute] = MappingProxyType({}),
    ready: Callable[[Measured], None] = lambda result: None,
    predict: Callable[..., accuracy.Outcome] = accuracy.predict,
) -> list[Measured]:
    """Measure accuracy (where `images` are given), latency, size and memory of all runnables together.

    Each sees the images as its own preprocessor makes them. One that cannot be measured gets a record with a
    `failure`, a figure that cannot be had a reason in `unmeasured`; all else goes on.
    `ready` gets each result as soon as it holds accuracy and a row of latency, and again with each later figure; what
    it gets at once was timed together. Processes other than the main one do their share of accuracy only, and get an
    empty list.
    Without the baseline's own figures the others are measured and compared with nothing. `untrained` weights are
    expected to guess, which is a warning then. `metrics` are computed of all outputs and labels, see `own_metrics`.
    `predict` runs all of them over the images, as `accuracy.predict` does in this process.

    Raises:
        MeasurementError: the baseline, or without one the first runnable, only guesses the images' classes; or one of
            `metrics` fails on it.
        DataError: no image can be decoded, or a label is no output of a runnable.
    """
    outcome, own_metrics = None, dict[str, OwnMetrics]()
    if images is not None:
        outcome = predict(runnables, images, batch_size=spec.batch_size, workers=spec.workers, skip_bad=skip_bad)
        images = images.without(outcome.skipped)
        _refuse_labels_without_output(outcome, images)
        _refuse_guessing(outcome, baseline or runnables[0].name, untrained)
    if not launch.is_main_process():
        launch.wait_for_all()
        return []
    failures = dict(outcome.failures) if outcome else {}
    if outcome is not None:
        own_metrics = measure_metrics(metrics, outcome.predictions, baseline)  # before minutes of timing
    running = [runnable for runnable in runnables if runnable.name not in failures]
    tested = HashedImages.of(images, spec.look_alikes) if images is not None else None

    def first(rows: Mapping[str, Rows], conditions: Conditions) -> dict[str, Measured]:
        """The results of all runnables with these rows of latency, which were timed together."""
        results, together = {}, uuid.uuid4().hex
        for runnable in runnables:
            notes = outcome.notes.get(runnable.name, []) if outcome else []
            own: dict[str, Any] = {}
            if images is not None and outcome is not None and tested is not None:
                overlaps = tested.overlaps(runnable.images_seen() if isinstance(runnable, HasSeenImages) else ())
                own["dataset"] = _describe_dataset(images, runnable, outcome.skipped, overlaps)
                notes = [*notes, *(warning(overlap, len(images)) for overlap in overlaps)]
            own["warnings"] = (*conditions.warnings, *notes)
            if runnable.name in rows:
                own |= {"measured_together": together, "gpu_load": conditions.gpu}
            figures = own_metrics.get(runnable.name)
            known = _first_figures(runnable, own, outcome, images, rows.get(runnable.name), baseline)
            results[runnable.name] = (
                known if figures is None else _with(known, metrics=figures.figures, unmeasured=figures.missing)
            )
        adjusted = adjusted_for_all([result.record for result in results.values()])
        return {record.variant.name: replace(results[record.variant.name], record=record) for record in adjusted}

    def tell(rows: Mapping[str, Rows]) -> None:
        """A run that is stopped keeps the rows that there were; what was not timed yet has no record."""
        for result in first(rows, conditions).values():
            if result.record.latency or result.record.latency_failures or result.record.failure:
                ready(result)

    with watched(runnables[0].device) as conditions:
        rows = time_rows(running, spec.latency, baseline, images, so_far=tell)
    measured = first(rows, conditions)

    def gain(figures: Callable[[Runnable, Measured], dict[str, Any]]) -> None:
        for runnable in running:
            result = measured[runnable.name]
            if result.record.failure is None:
                measured[runnable.name] = _with(result, **figures(runnable, result))
            ready(measured[runnable.name])

    for result in measured.values():
        ready(result)
    if outcome is not None and images is not None:
        if spec.end_to_end:
            end_to_end = _end_to_end(running, images, rows)
            gain(lambda runnable, result: end_to_end[runnable.name])
        gain(functools.partial(_invariance, images=images, batch_sizes=outcome.batch_sizes))
    gain(functools.partial(_device_figures, spec=spec, images=images))
    # A profiler slows later calls down, so it comes when nothing is left to be timed.
    gain(_kernel)
    launch.wait_for_all()
    return list(measured.values())


def _refuse_labels_without_output(outcome: accuracy.Outcome, images: ImageSet) -> None:
    for name, predictions in outcome.predictions.items():
        highest, width = max(images.used_labels, default=0), predictions.logits.shape[1]
        if predictions.outputs != "embedding" and highest >= width:
            raise DataError(f"{images.name} has label {highest}, and the outputs of {name} are 0 to {width - 1}")


def _refuse_guessing(outcome: accuracy.Outcome, name: str, untrained: bool) -> None:
    """Stop before minutes of timing where images and model do not belong together."""
    predictions = outcome.predictions.get(name)
    if predictions is None or predictions.why_no_classes:
        return
    right, classes = int(predictions.correct.sum()), predictions.logits.shape[1]
    if not is_guessing(right, len(predictions.labels), classes):
        return
    line = explain_guessing(name, right, len(predictions.labels), classes)
    if not untrained:
        raise MeasurementError(f"{line}; `vitopt benchmark` measures speed without images")
    outcome.notes.setdefault(name, []).append(line)


def _first_figures(
    runnable: Runnable,
    own: dict[str, Any],
    outcome: accuracy.Outcome | None,
    images: ImageSet | None,
    rows: Rows | None,
    baseline: str | None,
) -> Measured:
    """The figures that are known once all images were seen and all calls were timed."""
    fields = own | _provenance(runnable.device)
    unmeasured: dict[str, str] = {}
    try:
        fields |= runnable.describe()
    except Exception as error:  # the other rows go on
        variant = Variant(name=runnable.name, format="unknown")
        return Measured(Record(**fields, variant=variant, failure=explain_failure(error)), None)
    if isinstance(runnable, CountsFlops) and "model" in fields:
        flops = attempt("flops_per_image", runnable.flops_per_image, unmeasured)
        fields["model"] = fields["model"].model_copy(update={"flops_per_image": flops})
    if rows is None:  # it failed over the images, and was timed no more
        assert outcome is not None
        return Measured(Record(**fields, failure=outcome.failures[runnable.name], unmeasured=unmeasured), None)
    fields |= {"latency": rows.latency, "latency_failures": rows.failures}
    fields["warnings"] = (*fields["warnings"], *rows.warnings)
    predictions = outcome.predictions[runnable.name] if outcome else None
    if isinstance(runnable, Routes) and predictions is None:
        caution = "timed on random pixels, and how many of those get the second pass says nothing of images"
        fields["warnings"] = (*fields["warnings"], caution)
    elif predictions is not None and predictions.escalated is not None and "routing" in fields:
        share = {"escalated_percent": 100 * float(predictions.escalated.mean())}
        fields["routing"] = fields["routing"].model_copy(update=share)
    if predictions is not None and (reason := predictions.why_no_classes):
        compared = baseline not in (None, runnable.name)
        unmeasured |= dict.fromkeys(["accuracy", *(["versus_baseline"] if compared else [])], reason)
    elif predictions is not None and outcome is not None and images is not None:
        names = images.class_names or ()
        fields["accuracy"] = attempt("accuracy", lambda: accuracy.summarise(predictions, names), unmeasured)
        reference = outcome.predictions.get(baseline or "") if baseline != runnable.name else None
        if baseline is not None and reference is not None:
            fields["versus_baseline"] = attempt(
                "versus_baseline", lambda: accuracy.compare(baseline, reference, predictions), unmeasured
            )
    return Measured(Record(**fields, unmeasured=unmeasured), predictions)


def _with(
    result: Measured, *, unmeasured: dict[str, str] | None = None, warnings: Sequence[str] = (), **figures: Any
) -> Measured:
    """The same with more figures, more reasons why others are missing, and more warnings."""
    record = result.record
    more = {"unmeasured": record.unmeasured | (unmeasured or {}), "warnings": (*record.warnings, *warnings)}
    return Measured(record.model_copy(update=figures | more), result.predictions)


def _end_to_end(runnables: Sequence[Runnable], images: ImageSet, rows: Mapping[str, Rows]) -> dict[str, dict[str, Any]]:
    """Rows of all runnables, which take turns at each batch size; name -> figures."""
    end_to_end: dict[str, list[EndToEnd]] = {runnable.name: [] for runnable in runnables}
    unmeasured: dict[str, dict[str, str]] = {runnable.name: {} for runnable in runnables}
    # At batch sizes that are known to run.
    timed = {name: [row.batch_size for row in rows[name].latency] for name in end_to_end}
    for size in sorted({size for sizes in timed.values() for size in sizes}):
        able = [runnable for runnable in runnables if size in timed[runnable.name]]
        with progress.task(f"end to end at batch {size}", None):
            ended, failures = time_end_to_end(able, images, size)
        for name, row in ended.items():
            end_to_end[name].append(row)
        for name, reason in failures.items():
            unmeasured[name][f"end_to_end at batch {size}"] = reason
    return {name: {"end_to_end": tuple(end_to_end[name]), "unmeasured": unmeasured[name]} for name in end_to_end}


def _invariance(
    runnable: Runnable, result: Measured, *, images: ImageSet, batch_sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Whether single images get the answers that they got in batches."""
    predictions = result.predictions
    assert predictions is not None
    timed_at = [row.batch_size for row in result.record.latency]
    unmeasured: dict[str, str] = {}
    with progress.task(f"single images of {runnable.name}", None):
        invariance = attempt(
            "batch_invariance",
            lambda: batch_invariance(runnable, images, predictions, batch_sizes[runnable.name], timed_at=timed_at),
            unmeasured,
        )
    warnings = []
    if invariance is not None and invariance.agreement_percent is not None and invariance.agreement_percent < 100:
        warnings.append(
            f"an image's class depends on the other images of its batch: {100 - invariance.agreement_percent:.1f} % of "
            f"{invariance.images} images get another class alone than in batches of {invariance.batch_size}"
        )
    return {"batch_invariance": invariance, "unmeasured": unmeasured, "warnings": warnings}


def _device_figures(
    runnable: Runnable, result: Measured, *, spec: EvaluateSpec, images: ImageSet | None
) -> dict[str, Any]:
    """Memory, energy, throughput, and latency against the limits of the device."""
    images = images if isinstance(runnable, Routes) else None
    record, unmeasured = result.record, dict[str, str]()
    fields: dict[str, Any] = {"unmeasured": unmeasured}
    if record.latency:
        # At batch sizes that are known to fit.
        smallest, largest = record.latency[0].batch_size, record.latency[-1].batch_size
        with progress.task(f"memory of {runnable.name}", None):
            fields["memory"] = attempt("memory", lambda: peak_memory(runnable, smallest), unmeasured)
        fields["energy_joules_per_image"] = attempt(
            "energy_joules_per_image",
            lambda: energy_per_image(call_of(runnable, largest, images), largest, runnable.device),
            unmeasured,
        )
    if spec.throughput:
        with progress.task(f"throughput of {runnable.name}", None):
            fields["throughput"] = attempt(
                "throughput",
                lambda: find_throughput(lambda size: call_of(runnable, size, images), clock_for(runnable.device)),
                unmeasured,
            )
    rates = None
    if spec.roofline and record.layer_plan:
        # Arithmetic runs in the format of most layers.
        most = max(record.layer_plan, key=lambda format: record.layer_plan[format])
        rates = attempt("roofline", lambda: roofline(most, runnable.device), unmeasured)
    limits = [_limits(row, runnable, record, rates, unmeasured) for row in record.latency]
    rows = tuple(row.model_copy(update=limit) for row, limit in zip(record.latency, limits, strict=True))
    return fields | {"roofline": rates, "latency": rows}


def _limits(
    row: Latency, runnable: Runnable, record: Record, rates: Roofline | None, unmeasured: dict[str, str]
) -> dict[str, Any]:
    """Peak memory at a batch size, and the floor and the utilisation by the device's rates."""
    limits: dict[str, Any] = {}
    if runnable.device.type == "cuda":
        figure = f"peak_bytes at batch {row.batch_size}"
        peak = attempt(figure, lambda: peak_memory(runnable, row.batch_size), unmeasured)
        limits["peak_bytes"] = peak.peak_bytes if peak else None
    flops = record.model.flops_per_image if record.model else None
    if rates is not None and flops is not None and record.size is not None:
        limits["floor_ms"] = floor_ms(row.batch_size, flops, record.size.weight_bytes, rates)
        reached = utilisation_percent(row.batch_size, flops, row.typical_ms, rates)
        limits["model_flop_utilisation_percent"] = reached
    return limits


def _kernel(runnable: Runnable, result: Measured) -> dict[str, Any]:
    """The attention kernel that ran, read from a profile at a batch size that has run before."""
    if not result.record.latency or not isinstance(runnable, ShowsKernel):
        return {}
    unmeasured: dict[str, str] = {}
    variant = result.record.variant
    pixels = random_pixels(result.record.latency[0].batch_size, input_size(runnable))
    kernel = attempt("sdpa_kernel", lambda: runnable.kernel_used(pixels.to(runnable.device)), unmeasured)
    ran = variant.ran | {"sdpa_kernel": kernel}
    return {"variant": variant.model_copy(update={"ran": ran}), "unmeasured": unmeasured}


def failed(name: str, asked: VariantSpec, reason: str, device: torch.device) -> Measured:
    """The record of a variant that could not even be made or loaded."""
    variant = Variant(
        name=name,
        format=asked.run_as or asked.format,
        stored_format=asked.format if asked.run_as else None,
        half=asked.half,
        skip=asked.skip,
        layers=dict(asked.layers),
        asked=asked.options,
    )
    return Measured(Record(variant=variant, failure=reason, **_provenance(device)), None)


def _provenance(device: torch.device) -> dict[str, Any]:
    return {"environment": machine.describe(device)} | machine.occasion()


def _describe_dataset(
    images: ImageSet, runnable: Runnable, skipped: tuple[str, ...], overlaps: tuple[Overlap, ...]
) -> Dataset:
    preprocess = runnable.preprocess
    return Dataset(
        name=images.name,
        split=images.split,
        images=len(images),
        sha256=images.sha256,
        skipped=skipped,
        preprocessor=getattr(preprocess, "name", None) or getattr(preprocess, "__name__", type(preprocess).__name__),
        groups=None if images.groups is None else len(set(images.groups)),
        overlaps=overlaps,
    )
