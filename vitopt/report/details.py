"""The tables beside the comparison: agreement, other timings, what the images can show, changed classes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vitopt.records import Record
from vitopt.report.classes import ClassChanges
from vitopt.report.table import UNKNOWN, Table, milliseconds, percent, rate

_SETTLED = {True: "yes", False: "no", None: UNKNOWN}


def agreement(records: Sequence[Record]) -> Table | None:
    """How close each variant stays to the baseline, image by image; None where no accuracy was measured."""
    rows = []
    for record in records:
        accuracy, versus = record.accuracy, record.versus_baseline
        if accuracy is None:
            continue
        top5 = UNKNOWN if accuracy.top5_percent is None else f"{accuracy.top5_percent:.1f}"
        compared = [UNKNOWN] * 6
        if versus is not None:
            compared = [
                _with(percent, versus.agreement_percent, versus.agreement_ci95_percent),
                f"{versus.right_to_wrong:,}",
                f"{versus.wrong_to_right:,}",
                p_value(versus.mcnemar_p if versus.mcnemar_holm_p is None else versus.mcnemar_holm_p),
                _with("{:.4f}".format, versus.mean_kl_divergence, versus.kl_ci95),
                f"{versus.normalised_logit_error:.3f}",
            ]
        noise = accuracy.calibration_noise
        calibration = f"{accuracy.expected_calibration_error:.3f}" + ("" if noise is None else f" ({noise:.3f})")
        rows.append(
            (
                record.variant.name,
                _with("{:.1f}".format, accuracy.top1_percent, accuracy.top1_ci95_percent),
                top5,
                *compared,
                calibration,
            )
        )
    headings = (
        "variant",
        "top-1 % (95 %)",
        "top-5 %",
        "agree % (95 %)",
        "right to wrong",
        "wrong to right",
        "McNemar p",
        "KL, nats (95 %)",
        "logit error",
        "calibration error (by chance)",
    )
    return Table("Accuracy and agreement in detail", headings, tuple(rows)).known() if rows else None


def batch_invariance(records: Sequence[Record]) -> Table | None:
    """Whether an image gets the same answer alone as in a batch; None where it was not tried."""
    rows = tuple(
        (
            record.variant.name,
            f"{found.images:,}",
            str(found.batch_size),
            percent(found.agreement_percent),
            f"{found.max_logit_difference:.2g}",
        )
        for record in records
        if (found := record.batch_invariance) is not None
    )
    headings = ("variant", "images", "batch", "same class alone, %", "largest difference of a logit")
    return Table("One image alone against the same image in a batch", headings, rows) if rows else None


def end_to_end(records: Sequence[Record]) -> list[Table]:
    """Per batch size, the mean milliseconds of each part of a call from file to class."""
    tables = []
    for size in sorted({one.batch_size for record in records for one in record.end_to_end}):
        rows = tuple(
            (
                record.variant.name,
                *map(milliseconds, (one.decode_ms, one.preprocess_ms, one.copy_ms, one.model_ms, one.postprocess_ms)),
                milliseconds(one.total_p50_ms),
                milliseconds(one.total_p95_ms),
                rate(one.images_per_second),
            )
            for record in records
            for one in record.end_to_end
            if one.batch_size == size
        )
        headings = (
            "variant",
            "decode",
            "preprocess",
            "copy",
            "model",
            "postprocess",
            "total p50",
            "total p95",
            "images/s",
        )
        tables.append(Table(f"From image file to class at batch {size}, in ms", headings, rows).known())
    return tables


def other_timings(records: Sequence[Record]) -> Table | None:
    """Warm-up, device time, highest rate and energy; None where nothing was timed."""
    rows = []
    for record in records:
        for number, latency in enumerate(record.latency):
            most, energy = record.throughput, record.energy_joules_per_image
            # What belongs to the variant and to no batch size stands in its first row.
            once = number == 0
            rows.append(
                (
                    record.variant.name,
                    str(latency.batch_size),
                    f"{latency.warmup_ms / 1000:.2f}",
                    f"{latency.iterations:,}",
                    str(latency.rounds),
                    f"{latency.discarded_calls:,}",
                    _SETTLED[latency.settled],
                    milliseconds(latency.device_p50_ms),
                    f"{rate(most.images_per_second)} at batch {most.batch_size}" if most and once else UNKNOWN,
                    f"{energy:.3g}" if energy is not None and once else UNKNOWN,
                )
            )
    headings = (
        "variant",
        "batch",
        "warm-up, s",
        "timed calls",
        "rounds",
        "discarded calls",
        "warm-up settled",
        "device p50, ms",
        "highest images/s",
        "joules/image",
    )
    return Table("How latency was timed", headings, tuple(rows)).known() if rows else None


def changed_classes(changes: ClassChanges) -> Table:
    """The most changed classes of one variant."""
    rows = tuple(
        (
            change.name,
            f"{change.images:,}",
            f"{change.baseline_percent:.1f}",
            f"{change.variant_percent:.1f}",
            f"{change.points:+.1f}",
            f"{change.images_changed:+d}",
        )
        for change in changes.shown
    )
    headings = ("class", "images", "baseline %", "variant %", "points", "images won or lost")
    return Table(f"Classes of {changes.variant} that changed most", headings, rows)


def environment_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of everything known about where something was measured."""
    facts = dict(environment)
    libraries, gpu = facts.pop("libraries", None) or {}, facts.pop("gpu", None) or {}
    facts |= {f"gpu {key}": value for key, value in gpu.items()} | libraries
    return [(key.replace("_", " "), str(value)) for key, value in facts.items() if value is not None]


def _with(words: Callable[[float], str], figure: float, interval: tuple[float, float] | None) -> str:
    """A figure with its interval where there is one."""
    return words(figure) + (f" ({words(interval[0])} to {words(interval[1])})" if interval else "")


def p_value(p: float) -> str:
    """Three decimals, or that it is below the last of them."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
