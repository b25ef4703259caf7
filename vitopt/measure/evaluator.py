"""The shared evaluator: prepared variants and images in, one record and its predictions each out."""

import datetime
import functools
import shlex
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitopt import environment, progress
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor, random_pixels
from vitopt.errors import MeasurementError
from vitopt.measure import accuracy
from vitopt.measure.chance import explain_guessing, is_guessing
from vitopt.measure.conditions import watched
from vitopt.measure.end_to_end import time_end_to_end
from vitopt.measure.failures import attempt, explain_failure
from vitopt.measure.invariance import batch_invariance
from vitopt.measure.latency import clock_for
from vitopt.measure.latency_rows import Rows, call_of, time_rows
from vitopt.measure.memory import peak_memory
from vitopt.measure.overlap import HashedImages, warning
from vitopt.measure.predictions import Predictions
from vitopt.measure.rates import floor_ms, flops_per_image, roofline, utilisation_percent
from vitopt.measure.subject import Subject
from vitopt.measure.throughput import energy_per_image, find_throughput
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import disk_bytes, empty_model, parameter_count, weight_bytes
from vitopt.recipe import EvaluateSpec, VariantSpec
from vitopt.records import Dataset, EndToEnd, Latency, Model, Record, Roofline, Size, Variant


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
    untrained: bool = False,
    ready: Callable[[Measured], None] = lambda one: None,
) -> list[Measured]:
    """Measure accuracy (where `images` are given), latency, size and memory of all subjects together.

    `specs` tell what was asked for, None for a checkpoint that came from elsewhere. A subject that cannot be
    measured gets a record with a `failure`, a figure that cannot be had a reason in `unmeasured`; all else goes on.
    `ready` gets each result as soon as it holds accuracy and latency, and again whenever it has gained figures. In
    processes other than the main one only the share of accuracy is done, and the list is empty.
    Without the baseline's own figures the others are measured and compared with nothing. `untrained` weights are
    expected to guess, which is a warning then.

    Raises:
        MeasurementError: the baseline, or without one the first subject, only guesses the images' classes.
    """
    outcome = None
    if images is not None and preprocess is not None:
        outcome = accuracy.predict(
            subjects, images, preprocess, batch_size=spec.batch_size, workers=spec.workers, skip_bad=skip_bad
        )
        images = images.without(outcome.skipped)
        _refuse_guessing(outcome, baseline or subjects[0].name, untrained)
    if not environment.is_main_process():
        environment.wait_for_all()
        return []
    failures = dict(outcome.failures) if outcome else {}
    running = [subject for subject in subjects if subject.name not in failures]
    with watched(subjects[0].device) as warnings:
        rows = time_rows(running, spec.latency, baseline)
    dataset = _describe_dataset(images, preprocess, outcome) if outcome and images and preprocess else None
    tested = HashedImages.of(images, spec.look_alikes) if images is not None else None
    together = uuid.uuid4().hex
    measured = {}
    for subject, asked in zip(subjects, specs, strict=True):
        notes = outcome.notes.get(subject.name, []) if outcome else []
        own: dict[str, Any] = {"dataset": dataset}
        if dataset is not None and tested is not None:
            overlaps = tested.overlaps(load_uses(subject.checkpoint.folder))
            own["dataset"] = dataset.model_copy(update={"overlaps": overlaps})
            notes = [*notes, *(warning(overlap, dataset.images) for overlap in overlaps)]
        own["warnings"] = (*warnings, *notes)
        if subject.name in rows:
            own["measured_together"] = together
        measured[subject.name] = _first_figures(subject, asked, own, outcome, images, rows.get(subject.name), baseline)

    measured = _adjusted(measured)

    def gain(figures: Callable[[Subject, Measured], dict[str, Any]]) -> None:
        for subject in running:
            one = measured[subject.name]
            if one.record.failure is None:
                measured[subject.name] = _with(one, **figures(subject, one))
            ready(measured[subject.name])

    for one in measured.values():
        ready(one)
    if outcome is not None and images is not None and preprocess is not None:
        if spec.end_to_end:
            found = _end_to_end(running, images, preprocess, rows)
            gain(lambda subject, one: found[subject.name])
        sizes = outcome.batch_sizes
        gain(functools.partial(_invariance, images=images, preprocess=preprocess, batch_sizes=sizes))
    gain(functools.partial(_device_figures, spec=spec))
    # A profiler slows later calls down, so it comes when nothing is left to be timed.
    gain(_kernel)
    environment.wait_for_all()
    return list(measured.values())


def _refuse_guessing(outcome: accuracy.Outcome, name: str, untrained: bool) -> None:
    """Stop before minutes of timing where images and model do not belong together."""
    predictions = outcome.predictions.get(name)
    if predictions is None:
        return
    right, classes = int(predictions.correct.sum()), predictions.logits.shape[1]
    if not is_guessing(right, len(predictions.labels), classes):
        return
    line = explain_guessing(name, right, len(predictions.labels), classes)
    if not untrained:
        raise MeasurementError(f"{line}; `vitopt benchmark` measures speed without images")
    outcome.notes.setdefault(name, []).append(line)


def _first_figures(
    subject: Subject,
    asked: VariantSpec | None,
    own: dict[str, Any],
    outcome: accuracy.Outcome | None,
    images: ImageSet | None,
    rows: Rows | None,
    baseline: str | None,
) -> Measured:
    """What is known once all images were seen and all calls were timed."""
    fields = own | {"variant": _variant(subject, asked), **_provenance(subject.device)}
    unmeasured: dict[str, str] = {}
    try:
        fields |= _model_fields(subject, unmeasured)
    except Exception as error:  # the other rows go on
        return Measured(Record(**fields, failure=explain_failure(error)), None)
    if rows is None:  # it failed over the images, and was timed no more
        assert outcome is not None
        return Measured(Record(**fields, failure=outcome.failures[subject.name], unmeasured=unmeasured), None)
    fields |= {"latency": rows.latency, "latency_failures": rows.failures, "size": _size(subject)}
    fields["warnings"] = (*fields["warnings"], *rows.warnings)
    predictions = outcome.predictions[subject.name] if outcome else None
    if predictions is not None and outcome is not None and images is not None:
        names = images.class_names or ()
        fields["accuracy"] = attempt("accuracy", lambda: accuracy.summarise(predictions, names), unmeasured)
        reference = outcome.predictions.get(baseline or "") if baseline != subject.name else None
        if baseline is not None and reference is not None:
            fields["versus_baseline"] = attempt(
                "versus_baseline", lambda: accuracy.compare(baseline, reference, predictions), unmeasured
            )
    return Measured(Record(**fields, unmeasured=unmeasured), predictions)


def _with(
    one: Measured, *, unmeasured: dict[str, str] | None = None, warnings: Sequence[str] = (), **figures: Any
) -> Measured:
    """The same with more figures, more reasons why others are missing, and more warnings."""
    record = one.record
    more = {"unmeasured": record.unmeasured | (unmeasured or {}), "warnings": (*record.warnings, *warnings)}
    return Measured(record.model_copy(update=figures | more), one.predictions)


def _adjusted(measured: dict[str, Measured]) -> dict[str, Measured]:
    """The same with p-values and verdicts that allow for the number of variants compared."""
    compared = {name: one.record.versus_baseline for name, one in measured.items() if one.record.versus_baseline}
    images = next((one.record.accuracy.images for one in measured.values() if one.record.accuracy), 0)
    found = dict(zip(compared, accuracy.adjusted(list(compared.values()), images), strict=True))
    return {name: _with(one, versus_baseline=found[name]) if name in found else one for name, one in measured.items()}


def _end_to_end(
    subjects: Sequence[Subject], images: ImageSet, preprocess: Preprocessor, rows: Mapping[str, Rows]
) -> dict[str, dict[str, Any]]:
    """Rows of all subjects, those of one batch size in turns; name -> figures."""
    found: dict[str, list[EndToEnd]] = {subject.name: [] for subject in subjects}
    unmeasured: dict[str, dict[str, str]] = {subject.name: {} for subject in subjects}
    # At batch sizes that are known to run.
    timed = {name: [row.batch_size for row in rows[name].latency] for name in found}
    for size in sorted({size for sizes in timed.values() for size in sizes}):
        able = [subject for subject in subjects if size in timed[subject.name]]
        with progress.task(f"end to end at batch {size}", None):
            ended, failures = time_end_to_end(able, images, preprocess, size)
        for name, row in ended.items():
            found[name].append(row)
        for name, reason in failures.items():
            unmeasured[name][f"end_to_end at batch {size}"] = reason
    return {name: {"end_to_end": tuple(found[name]), "unmeasured": unmeasured[name]} for name in found}


def _invariance(
    subject: Subject, one: Measured, *, images: ImageSet, preprocess: Preprocessor, batch_sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Whether single images get the answers that they got in batches."""
    predictions = one.predictions
    assert predictions is not None
    timed_at = [row.batch_size for row in one.record.latency]
    unmeasured: dict[str, str] = {}
    with progress.task(f"single images of {subject.name}", None):
        found = attempt(
            "batch_invariance",
            lambda: batch_invariance(
                subject, images, preprocess, predictions, batch_sizes[subject.name], timed_at=timed_at
            ),
            unmeasured,
        )
    warnings = []
    if found is not None and found.agreement_percent < 100:
        warnings.append(
            f"an image's class depends on the others of its batch: {100 - found.agreement_percent:.1f} % of "
            f"{found.images} images have another one alone than in batches of {found.batch_size}"
        )
    return {"batch_invariance": found, "unmeasured": unmeasured, "warnings": warnings}


def _device_figures(subject: Subject, one: Measured, *, spec: EvaluateSpec) -> dict[str, Any]:
    """Memory, energy, throughput, and what the latency is of what the device can give."""
    record, unmeasured = one.record, dict[str, str]()
    fields: dict[str, Any] = {"unmeasured": unmeasured}
    if record.latency:
        # At batch sizes that are known to fit.
        smallest, largest = record.latency[0].batch_size, record.latency[-1].batch_size
        with progress.task(f"memory of {subject.name}", None):
            fields["memory"] = attempt("memory", lambda: peak_memory(subject, smallest), unmeasured)
        fields["energy_joules_per_image"] = attempt(
            "energy_joules_per_image",
            lambda: energy_per_image(call_of(subject, largest), largest, subject.device),
            unmeasured,
        )
    if spec.throughput:
        with progress.task(f"throughput of {subject.name}", None):
            fields["throughput"] = attempt(
                "throughput",
                lambda: find_throughput(lambda size: call_of(subject, size), clock_for(subject.device)),
                unmeasured,
            )
    rates = None
    if spec.roofline:
        rates = attempt("roofline", lambda: roofline(_most_layers(subject), subject.device), unmeasured)
    limits = [_limits(row, subject, record, rates, unmeasured) for row in record.latency]
    rows = tuple(row.model_copy(update=limit) for row, limit in zip(record.latency, limits, strict=True))
    return fields | {"roofline": rates, "latency": rows}


def _limits(
    row: Latency, subject: Subject, record: Record, rates: Roofline | None, unmeasured: dict[str, str]
) -> dict[str, Any]:
    """What a batch size takes of the device: its memory, and against its rates the floor and the utilisation."""
    limits: dict[str, Any] = {}
    if subject.device.type == "cuda":
        figure = f"peak_bytes at batch {row.batch_size}"
        peak = attempt(figure, lambda: peak_memory(subject, row.batch_size), unmeasured)
        limits["peak_bytes"] = peak.peak_bytes if peak else None
    flops = record.model.flops_per_image if record.model else None
    if rates is not None and flops is not None and record.size is not None:
        limits["floor_ms"] = floor_ms(row.batch_size, flops, record.size.weight_bytes, rates)
        reached = utilisation_percent(row.batch_size, flops, row.p50_ms, rates)
        limits["model_flop_utilisation_percent"] = reached
    return limits


def _kernel(subject: Subject, one: Measured) -> dict[str, Any]:
    """The attention kernel that ran, read from a profile at a batch size that has run before."""
    if not one.record.latency:
        return {}
    unmeasured: dict[str, str] = {}

    def profiled() -> str | None:
        pixels = random_pixels(one.record.latency[0].batch_size, subject.checkpoint.image_size)
        return subject.kernel_used(pixels.to(subject.device))

    kernel = attempt("sdpa_kernel_used", profiled, unmeasured)
    return {"variant": one.record.variant.model_copy(update={"sdpa_kernel_used": kernel}), "unmeasured": unmeasured}


def failed(name: str, asked: VariantSpec, reason: str, device: torch.device) -> Measured:
    """The record of a variant that could not even be made or loaded."""
    variant = Variant(
        name=name,
        format=asked.run_as or asked.format,
        stored_format=asked.format if asked.run_as else None,
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


def _variant(subject: Subject, asked: VariantSpec | None) -> Variant:
    return Variant(
        name=subject.name,
        format=_asked_format(subject, asked),
        half=asked.half if asked else None,
        skip=asked.skip if asked else (),
        layers=dict(asked.layers) if asked else {},
        attention_requested=subject.run.attention,
        attention_used=subject.attention_used,
        attention_reason=subject.attention_reason,
        sdpa_kernel_requested=subject.run.sdpa_kernel,
        sdpa_kernel_reason=subject.kernel_reason,
        stored_format=subject.stored_format if subject.run.run_as else None,
        fused_attentions=subject.fused_attentions,
        channels_last=subject.run.channels_last,
        compile_requested=subject.run.compile,
        compile_used=subject.compiled,
        compile_reason=subject.compile_reason,
        autotune=subject.run.autotune,
    )


def _model_fields(subject: Subject, unmeasured: dict[str, str]) -> dict[str, Any]:
    checkpoint = subject.checkpoint
    return {
        "model": Model(
            source=checkpoint.source,
            sha256=checkpoint.fingerprint() if checkpoint.folder else None,
            architecture=str((checkpoint.config.architectures or ["unknown"])[0]),
            parameters=parameter_count(empty_model(checkpoint)),
            image_size=checkpoint.image_size,
            classes=checkpoint.config.num_labels,
            flops_per_image=attempt("flops_per_image", lambda: flops_per_image(checkpoint), unmeasured),
        ),
        "layer_plan": dict(Counter(subject.layers.values())),
        "layers": subject.layers,
    }


def _asked_format(subject: Subject, asked: VariantSpec | None) -> str:
    """What was asked for, however many layers a skip list keeps; of a checkpoint from elsewhere, as it is stored."""
    if subject.run.run_as is not None:
        return subject.run.run_as
    return asked.format if asked else subject.stored_format or _most_layers(subject)


def _most_layers(subject: Subject) -> str:
    """Format of most layers of the live model, which is what its arithmetic runs in."""
    return Counter(subject.layers.values()).most_common(1)[0][0]


def _provenance(device: torch.device) -> dict[str, Any]:
    return {
        "environment": environment.describe(device),
        "command": shlex.join(["vitopt", *sys.argv[1:]]),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


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
