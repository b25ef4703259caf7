"""The shared evaluator: prepared variants and images in, one record and its predictions each out."""

import datetime
import functools
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitopt import environment, progress
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor, random_pixels
from vitopt.measure import accuracy, statistics
from vitopt.measure.conditions import watched
from vitopt.measure.end_to_end import time_end_to_end
from vitopt.measure.failures import explain_failure, is_out_of_memory
from vitopt.measure.latency import Timing, clock_for, time_interleaved
from vitopt.measure.memory import peak_memory
from vitopt.measure.overlap import HashedImages, warning
from vitopt.measure.predictions import Predictions
from vitopt.measure.rates import floor_ms, flops_per_image, roofline, utilisation_percent
from vitopt.measure.subject import Subject
from vitopt.measure.throughput import energy_per_image, find_throughput
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import disk_bytes, empty_model, parameter_count, weight_bytes
from vitopt.recipe import EvaluateSpec, LatencySpec, VariantSpec
from vitopt.records import Dataset, EndToEnd, FailedLatency, Latency, Model, Record, Roofline, Size, Variant


@dataclass(frozen=True)
class Measured:
    """A variant's record and, where accuracy was measured, its predictions."""

    record: Record
    predictions: Predictions | None


def evaluate(
    subjects: Sequence[Subject],
    specs: Sequence[VariantSpec | None],
    spec: EvaluateSpec,
    *,
    images: ImageSet | None = None,
    preprocess: Preprocessor | None = None,
    skip_bad: bool = False,
    baseline: str | None = None,
) -> list[Measured]:
    """Measure accuracy (where `images` are given), latency, size and memory of all subjects together.

    `specs` tell what was asked for, None for a checkpoint that came from elsewhere. A subject that cannot be
    measured gets a record with a `failure`; the others finish. In processes other than the main one only the
    share of accuracy is done, and the list is empty.
    Without the baseline's own figures the others are measured and compared with nothing.
    """
    outcome = None
    if images is not None and preprocess is not None:
        outcome = accuracy.predict(
            subjects, images, preprocess, batch_size=spec.batch_size, workers=spec.workers, skip_bad=skip_bad
        )
        images = images.without(outcome.skipped)
    if not environment.is_main_process():
        environment.wait_for_all()
        return []
    failures = dict(outcome.failures) if outcome else {}
    running = [subject for subject in subjects if subject.name not in failures]
    with watched(subjects[0].device) as warnings:
        timings = {size: _time_all(running, size, spec.latency) for size in spec.latency.batch_sizes}
    dataset = _describe_dataset(images, preprocess, outcome) if outcome and images and preprocess else None
    tested = HashedImages.of(images, spec.look_alikes) if images is not None else None
    measured = []
    for subject, asked in zip(subjects, specs, strict=True):
        own = outcome.notes.get(subject.name, []) if outcome else []
        common = _common_fields(subject, asked) | {"dataset": dataset}
        if dataset is not None and tested is not None:
            overlaps = tested.overlaps(load_uses(subject.checkpoint.folder))
            common["dataset"] = dataset.model_copy(update={"overlaps": overlaps})
            own = [*own, *(warning(overlap, dataset.images) for overlap in overlaps)]
        common["warnings"] = (*warnings, *own)
        if subject.name in failures:
            measured.append(Measured(Record(**common, failure=failures[subject.name]), None))
            continue
        fields = _speed_fields(subject, spec, timings, baseline, common["model"].flops_per_image)
        if images is not None and preprocess is not None and spec.end_to_end:
            fields["end_to_end"] = _end_to_end(subject, images, preprocess, fields["latency"])
        predictions = outcome.predictions[subject.name] if outcome else None
        if predictions is not None and outcome is not None and images is not None:
            fields["accuracy"] = accuracy.summarise(predictions, images.class_names or ())
            reference = outcome.predictions.get(baseline or "") if baseline != subject.name else None
            if baseline is not None and reference is not None:
                fields["versus_baseline"] = accuracy.compare(baseline, reference, predictions)
        measured.append(Measured(Record(**common, **fields), predictions))
    # A profiler slows later calls down, so it comes when nothing is left to be timed.
    measured = [_with_kernel(one, subject) for one, subject in zip(measured, subjects, strict=True)]
    environment.wait_for_all()
    return measured


def _speed_fields(
    subject: Subject, spec: EvaluateSpec, timings: dict[int, dict[str, Timing]], baseline: str | None, flops: int
) -> dict[str, Any]:
    latency, latency_failures = _latency_rows(subject.name, baseline, timings)
    size = _size(subject)
    fields: dict[str, Any] = {"latency_failures": latency_failures, "size": size}
    if latency:
        # At a batch size that is known to fit.
        with progress.task(f"memory of {subject.name}", None):
            fields["memory"] = peak_memory(subject, latency[0].batch_size)
        call = _call(subject, latency[-1].batch_size)
        fields["energy_joules_per_image"] = energy_per_image(call, latency[-1].batch_size, subject.device)
    if spec.throughput:
        with progress.task(f"throughput of {subject.name}", None):
            fields["throughput"] = find_throughput(lambda size: _call(subject, size), clock_for(subject.device))
    rates = roofline(_format(subject), subject.device) if spec.roofline else None
    limits = [_limits(row, subject, size, rates, flops) for row in latency]
    rows = tuple(row.model_copy(update=limit) for row, limit in zip(latency, limits, strict=True))
    return fields | {"roofline": rates, "latency": rows}


def _limits(row: Latency, subject: Subject, size: Size, rates: Roofline | None, flops: int) -> dict[str, Any]:
    """What a batch size takes of the device: its memory, and against its rates the floor and the utilisation."""
    limits: dict[str, Any] = {}
    if subject.device.type == "cuda":
        peak = peak_memory(subject, row.batch_size)
        limits["peak_bytes"] = peak.peak_bytes if peak else None
    if rates is not None:
        limits["floor_ms"] = floor_ms(row.batch_size, flops, size.weight_bytes, rates)
        reached = utilisation_percent(row.batch_size, flops, row.p50_ms, rates)
        limits["model_flop_utilisation_percent"] = reached
    return limits


def _with_kernel(one: Measured, subject: Subject) -> Measured:
    """The same with the attention kernel that ran, read from a profile at a batch size that has run before."""
    if not one.record.latency:
        return one
    pixels = random_pixels(one.record.latency[0].batch_size, subject.checkpoint.image_size).to(subject.device)
    variant = one.record.variant.model_copy(update={"sdpa_kernel_used": subject.kernel_used(pixels)})
    return Measured(one.record.model_copy(update={"variant": variant}), one.predictions)


def _end_to_end(
    subject: Subject, images: ImageSet, preprocess: Preprocessor, latency: Sequence[Latency]
) -> tuple[EndToEnd, ...]:
    sizes = [row.batch_size for row in latency]
    with progress.task(f"end to end of {subject.name}", None):
        return tuple(time_end_to_end(subject, images, preprocess, size) for size in sizes)


def failed(name: str, asked: VariantSpec, reason: str, device: torch.device) -> Measured:
    """The record of a variant that could not even be made or loaded."""
    variant = Variant(
        name=name,
        format=asked.format,
        half=asked.half,
        skip=asked.skip,
        layers=dict(asked.layers),
        attention_requested=asked.attention,
        attention_used=None,
        sdpa_kernel_requested=asked.sdpa_kernel,
        channels_last=asked.channels_last,
        compile_requested=asked.compile,
        autotune=asked.autotune,
    )
    return Measured(Record(variant=variant, failure=reason, **_provenance(device)), None)


def _common_fields(subject: Subject, asked: VariantSpec | None) -> dict[str, Any]:
    checkpoint = subject.checkpoint
    return {
        "variant": Variant(
            name=subject.name,
            format=_format(subject),
            half=asked.half if asked else None,
            skip=asked.skip if asked else (),
            layers=dict(asked.layers) if asked else {},
            attention_requested=subject.run.attention,
            attention_used=subject.attention_used,
            attention_reason=subject.attention_reason,
            sdpa_kernel_requested=subject.run.sdpa_kernel,
            sdpa_kernel_reason=subject.kernel_reason,
            stored_format=subject.stored_format,
            fused_attentions=subject.fused_attentions,
            channels_last=subject.run.channels_last,
            compile_requested=subject.run.compile,
            compile_used=subject.compiled,
            compile_reason=subject.compile_reason,
            autotune=subject.run.autotune,
        ),
        "model": Model(
            source=checkpoint.source,
            sha256=checkpoint.fingerprint() if checkpoint.folder else None,
            architecture=str((checkpoint.config.architectures or ["unknown"])[0]),
            parameters=parameter_count(empty_model(checkpoint)),
            image_size=checkpoint.image_size,
            classes=checkpoint.config.num_labels,
            flops_per_image=flops_per_image(checkpoint),
        ),
        "layer_plan": dict(Counter(subject.layers.values())),
        "layers": subject.layers,
        **_provenance(subject.device),
    }


def _format(subject: Subject) -> str:
    """Format of most layers of the live model."""
    return Counter(subject.layers.values()).most_common(1)[0][0]


def _provenance(device: torch.device) -> dict[str, Any]:
    return {
        "environment": environment.describe(device),
        "command": shlex.join(["vitopt", *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _time_all(subjects: Sequence[Subject], batch_size: int, spec: LatencySpec) -> dict[str, Timing]:
    if not subjects:
        return {}
    calls = {subject.name: _call(subject, batch_size) for subject in subjects}
    timings = time_interleaved(calls, spec, clock_for(subjects[0].device), f"latency at batch {batch_size}")
    calls.clear()  # and with them pixels that may be what did not fit
    for subject in subjects:
        timing = timings[subject.name]
        if timing.out_of_memory:
            timing.failure = f"out of memory; {_largest_that_fits(subject, batch_size // 2)}"
    return timings


def _largest_that_fits(subject: Subject, batch_size: int) -> str:
    """The batch halved until it fits, in words."""
    while batch_size >= 1:
        try:
            _call(subject, batch_size)()
        except Exception as error:
            if not is_out_of_memory(error):
                return f"at batch {batch_size}: {explain_failure(error)}"
            batch_size //= 2
        else:
            return f"batch {batch_size} fits"
    return "not even one image fits"


def _call(subject: Subject, batch_size: int) -> Callable[[], object]:
    @functools.cache
    def pixels() -> torch.Tensor:
        # Made by the first call, where a batch that does not fit is this row's failure and not the run's.
        return random_pixels(batch_size, subject.checkpoint.image_size).to(subject.device)

    return lambda: subject(pixels())


def _latency_rows(
    name: str, baseline: str | None, timings: dict[int, dict[str, Timing]]
) -> tuple[tuple[Latency, ...], tuple[FailedLatency, ...]]:
    rows, failures = [], []
    for batch_size, by_name in timings.items():
        timing = by_name[name]
        if timing.failure is not None:
            failures.append(FailedLatency(batch_size=batch_size, reason=timing.failure))
            continue
        reference = by_name.get(baseline or "") if baseline != name else None
        rows.append(_latency_row(batch_size, timing, reference))
    return tuple(rows), tuple(failures)


def _latency_row(batch_size: int, timing: Timing, baseline: Timing | None) -> Latency:
    samples = timing.samples_ms
    summary = statistics.latency_summary(samples)
    speedup = interval = None
    if baseline is not None and baseline.failure is None:
        compared = statistics.speedup_interval(baseline.rounds_ms, timing.rounds_ms)
        speedup = compared.ratio
        interval = (compared.interval.low, compared.interval.high) if compared.interval else None
    device = statistics.latency_summary(timing.device_ms) if timing.device_ms else None
    return Latency(
        batch_size=batch_size,
        iterations=summary.count,
        rounds=len(timing.rounds_ms),
        mean_ms=summary.mean_ms,
        std_ms=summary.std_ms,
        min_ms=summary.min_ms,
        p50_ms=summary.p50_ms,
        p95_ms=summary.p95_ms,
        p99_ms=summary.p99_ms,
        device_p50_ms=device.p50_ms if device else None,
        images_per_second=1000 * batch_size / summary.p50_ms,
        speedup_vs_baseline=speedup,
        speedup_ci95=interval,
        warmup_ms=timing.warmup_ms,
        warmup_iterations=timing.warmup_iterations,
        samples_ms=tuple(round(sample, 4) for sample in samples),
        device_samples_ms=tuple(round(sample, 4) for sample in timing.device_ms) or None,
    )


def _size(subject: Subject) -> Size:
    folder = subject.checkpoint.folder
    disk = disk_bytes(folder) if folder else None
    return Size(weight_bytes=weight_bytes(subject.model), disk_bytes=disk)


def _describe_dataset(images: ImageSet, preprocess: Preprocessor, outcome: accuracy.Outcome) -> Dataset:
    return Dataset(
        name=images.name,
        split=images.split,
        images=len(images),
        sha256=images.sha256,
        skipped=outcome.skipped,
        preprocessor=preprocess.name,
        groups=None if images.groups is None else len(set(images.groups)),
    )
