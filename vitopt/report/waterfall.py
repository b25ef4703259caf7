"""The waterfall: variants that add one technique at a time, in the order that the recipe's `waterfall` gives."""

from collections.abc import Sequence
from typing import NamedTuple

from vitopt.measure.comparison import speed_ratio
from vitopt.measure.latency_statistics import Speedup
from vitopt.records import Latency, Record


class Step(NamedTuple):
    """One bar: a variant and its speed-up over the step before."""

    record: Record
    latency: Latency
    speedup: Speedup | None  # None for the first step


def chain_of(records: Sequence[Record], names: Sequence[str]) -> list[Record]:
    """The records called `names`, in that order, without those that failed."""
    ran = {record.variant.name: record for record in records if record.failure is None}
    return [ran[name] for name in names if name in ran]


def steps(chain: Sequence[Record], batch_size: int) -> list[Step]:
    """The bars of a chain at one batch size; empty where a variant of it was not timed there."""
    bars: list[Step] = []
    for record in chain:
        latency = record.latency_at(batch_size)
        if latency is None:
            return []
        bars.append(Step(record, latency, speed_ratio(bars[-1].record, record, batch_size) if bars else None))
    return bars
