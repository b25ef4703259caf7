"""What callers of a server felt: the best rate of each variant, and all that were tried."""

from collections.abc import Sequence
from typing import NamedTuple

from vitopt.records import Record
from vitopt.report.table import Cell, Table, human_bytes, milliseconds, of, rate, tabulate, tail, with_interval
from vitopt.serving_record import CallerLatency, ServedRate


class _Served(NamedTuple):
    record: Record
    of: ServedRate | None  # at the highest rate that keeps the target


def best_rates(records: Sequence[Record]) -> Table:
    """A row for each variant that was served: what it keeps, and what that costs."""
    rows = [_Served(record, record.serving.best) for record in records if record.serving]
    return tabulate("Served over HTTP", _BEST, rows)


def all_rates(records: Sequence[Record]) -> list[Table]:
    """A table for each variant that was served: a row for each rate."""
    return [
        tabulate(f"{record.variant.name}: what callers felt at each rate", _RATES, record.serving.rates)
        for record in records
        if record.serving
    ]


def _p99(latency: CallerLatency) -> str | None:
    return tail(latency.p99_ms, latency.p99_ci95_ms)


def _refused(one: ServedRate) -> str:
    return f"{one.refused:,}" + (f" (≤ {milliseconds(one.slowest_refusal_ms)} ms)" if one.slowest_refusal_ms else "")


def _top1(record: Record) -> str | None:
    if record.accuracy is None:
        return None
    return with_interval("{:.1f}".format, record.accuracy.top1_percent, record.accuracy.top1_ci95_percent)


_USED: dict[str, Cell] = {
    "model busy %": of("busy_percent", "{:.0f}".format),
    "CPU %": of("cpu_percent", "{:.0f}".format),
    "GPU %": of("gpu_percent", "{:.0f}".format),
    "joules/answer": of("joules_per_answer", "{:.3g}".format),
    "memory": of("peak_bytes", human_bytes),
}
_BEST: dict[str, Cell] = {
    "variant": of("record.variant.name"),
    "target p99 ms": of("record.serving.target_p99_ms", milliseconds),
    "requests/s that keep it": of("of.rate", rate),
    "p50 ms": of("of.latency.p50_ms", milliseconds),
    "p99 ms": of("of.latency", _p99),
    "top-1 % (95 %)": of("record", _top1),
    "batch": of("of.mean_batch", "{:.1f}".format),
    **{heading: of("of", cell) for heading, cell in _USED.items()},
    "a million cost": of("record.serving.cost_per_million", "{:.2f}".format),
    "alone p50 ms": of("record.serving.alone.p50_ms", milliseconds),
    "alone p99 ms": of("record.serving.alone", _p99),
}
_RATES: dict[str, Cell] = {
    "requests/s": of("rate", rate),
    "answered/s": of("answered_rate", rate),
    "p50 ms": of("latency.p50_ms", milliseconds),
    "p99 ms": of("latency", _p99),
    "refused": _refused,
    "errors": lambda one: f"{sum(one.errors.values()):,}",
    "top-1 %": of("top1_percent", "{:.1f}".format),
    "not its own": of("differing", "{:,}".format),
    "batch": of("mean_batch", "{:.1f}".format),
    **_USED,
}
