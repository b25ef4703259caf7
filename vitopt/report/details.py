"""The tables beside the comparison: against the baseline, requirements, agreement, batches, and timing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vitopt.records import Record
from vitopt.report.requirements import requirement_parts
from vitopt.report.summary import times_smaller
from vitopt.report.table import Cell, Table, batch_sizes, milliseconds, of, percent, rate, tabulate, with_interval


def against_baseline(records: Sequence[Record], baseline: Record | None) -> Table:
    """Whether each variant lost accuracy, its speed-ups with their intervals, and how much smaller it is."""

    def speedup(batch_size: int) -> Cell:
        words = _with("{:.2f}x".format, "speedup_vs_baseline", "speedup_ci95")
        return lambda record: words(row) if (row := record.latency_at(batch_size)) else None

    compared = [record for record in records if baseline and record is not baseline and not record.failure]
    accuracy = {"accuracy": of("versus_baseline.verdict")} if any(r.versus_baseline for r in compared) else {}
    columns: dict[str, Cell] = {
        "variant": of("variant.name"),
        **accuracy,
        **{f"speed-up at batch {size} (95 %)": speedup(size) for size in batch_sizes(compared)},
        "times smaller": lambda record: f"{ratio:.1f}x" if (ratio := times_smaller(record, baseline)) else None,
    }
    caption = f"Against {baseline.variant.name}" if baseline else ""
    return tabulate(caption, columns, compared, 1 + len(accuracy))


def requirements(records: Sequence[Record]) -> Table:
    """What each variant shows of what is required."""

    def finding(required: str) -> Cell:
        return lambda record: dict(map(requirement_parts, record.requirements)).get(required)

    judged = [record for record in records if record.requirements]
    asked = dict.fromkeys(requirement_parts(requirement)[0] for record in judged for requirement in record.requirements)
    columns = {"variant": of("variant.name"), **{required: finding(required) for required in asked}}
    return tabulate("Requirements", columns, judged)


def agreement(records: Sequence[Record]) -> Table:
    """How close each variant stays to the baseline, image by image."""
    return tabulate("Accuracy and agreement in detail", _AGREEMENT, [record for record in records if record.accuracy])


def batch_invariance(records: Sequence[Record]) -> Table:
    """Whether an image gets the same answer alone as in a batch."""
    tried = [record for record in records if record.batch_invariance]
    return tabulate("One image alone against the same image in a batch", _BATCH_INVARIANCE, tried)


def end_to_end(records: Sequence[Record]) -> list[Table]:
    """Per batch size, the mean milliseconds of each part of a call from file to class."""
    calls = [_Row(record, call) for record in records for call in record.end_to_end]
    return [
        tabulate(
            f"From file to class at batch {size}, in ms", _END_TO_END, [c for c in calls if c.of.batch_size == size]
        )
        for size in sorted({call.of.batch_size for call in calls})
    ]


def other_timings(records: Sequence[Record]) -> Table:
    """Warm-up, device time, highest rate and energy."""
    # What belongs to the variant and to no batch size stands in its first row.
    rows = [_Row(record, row, None if at else record) for record in records for at, row in enumerate(record.latency)]
    return tabulate("How latency was timed", _TIMINGS, rows)


def environment_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of everything known about where something was measured."""
    facts = dict(environment)
    libraries, gpu = facts.pop("libraries", None) or {}, facts.pop("gpu", None) or {}
    facts |= {f"gpu {key}": value for key, value in gpu.items()} | libraries
    return [(key.replace("_", " "), str(value)) for key, value in facts.items() if value is not None]


class _Row(NamedTuple):
    """A part of a record as a row of its own; `first` is the record in the first row of it."""

    record: Record
    of: Any
    first: Record | None = None


def _with(words: Callable[[float], str], figure: str, interval: str) -> Cell:
    """A figure with its interval where there is one; both by the names of their fields."""

    def cell(item: Any) -> str | None:
        value = getattr(item, figure)
        return None if value is None else with_interval(words, value, getattr(item, interval))

    return cell


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


_AGREEMENT: dict[str, Cell] = {
    "variant": of("variant.name"),
    "top-1 % (95 %)": of("accuracy", _with("{:.1f}".format, "top1_percent", "top1_ci95_percent")),
    "top-5 %": of("accuracy.top5_percent", "{:.1f}".format),
    "agree % (95 %)": of("versus_baseline", _with(percent, "agreement_percent", "agreement_ci95_percent")),
    "right to wrong": of("versus_baseline.right_to_wrong", "{:,}".format),
    "wrong to right": of("versus_baseline.wrong_to_right", "{:,}".format),
    "McNemar p": of("versus_baseline", lambda v: _p(v.mcnemar_p if v.mcnemar_holm_p is None else v.mcnemar_holm_p)),
    "KL, nats (95 %)": of("versus_baseline", _with("{:.4f}".format, "mean_kl_divergence", "kl_ci95")),
    "logit error": of("versus_baseline.normalised_logit_error", "{:.3f}".format),
    "calibration error": of("accuracy.expected_calibration_error", "{:.3f}".format),
    "that by chance": of("accuracy.calibration_noise", "{:.3f}".format),
}
_BATCH_INVARIANCE: dict[str, Cell] = {
    "variant": of("variant.name"),
    "images": of("batch_invariance.images", "{:,}".format),
    "batch": of("batch_invariance.batch_size"),
    "same class alone, %": of("batch_invariance.agreement_percent", percent),
    "largest difference of a logit": of("batch_invariance.max_logit_difference", "{:.2g}".format),
}
_END_TO_END: dict[str, Cell] = {
    "variant": of("record.variant.name"),
    **{part: of(f"of.{part}_ms", milliseconds) for part in ("decode", "preprocess", "copy", "model", "postprocess")},
    "total p50": of("of.total_p50_ms", milliseconds),
    "total p95": of("of.total_p95_ms", milliseconds),
    "images/s": of("of.images_per_second", rate),
}
_TIMINGS: dict[str, Cell] = {
    "variant": of("record.variant.name"),
    "batch": of("of.batch_size"),
    "warm-up, s": of("of.warmup_ms", lambda value: f"{value / 1000:.2f}"),
    "timed calls": of("of.iterations", "{:,}".format),
    "rounds": of("of.rounds"),
    "discarded calls": of("of.discarded_calls", "{:,}".format),
    "warm-up settled": of("of.settled", lambda settled: "yes" if settled else "no"),
    "device p50, ms": of("of.device_p50_ms", milliseconds),
    "highest images/s": of("first.throughput", lambda t: f"{rate(t.images_per_second)} at batch {t.batch_size}"),
    "joules/image": of("first.energy_joules_per_image", "{:.3g}".format),
}
