"""The waterfall: variants that add one technique at a time, in the order that the recipe's `waterfall` gives."""

from collections.abc import Sequence
from dataclasses import dataclass

from vitopt.measure.comparison import speed_ratio
from vitopt.measure.latency_statistics import Speedup
from vitopt.records import Latency, Record
from vitopt.report.summary import listed
from vitopt.report.table import batch_sizes, milliseconds


@dataclass(frozen=True)
class Step:
    """One bar: a variant and its speed-up over the step before."""

    record: Record
    latency: Latency
    speedup: Speedup | None  # None for the first step

    @property
    def ratio_words(self) -> str:
        """As in `1.50x (1.42 to 1.58)`; "" for the first step."""
        if self.speedup is None:
            return ""
        within = self.speedup.interval
        return f"{self.speedup.ratio:.2f}x" + (f" ({within.low:.2f} to {within.high:.2f})" if within else "")


def chain_of(records: Sequence[Record], names: Sequence[str]) -> list[Record]:
    """The records called `names`, in that order, without those that failed."""
    ran = {record.variant.name: record for record in records if record.failure is None}
    return [ran[name] for name in names if name in ran]


def steps(chain: Sequence[Record], batch_size: int) -> list[Step]:
    """The bars of a chain at one batch size; empty where a variant of it was not timed there."""
    found: list[Step] = []
    for record in chain:
        latency = record.latency_at(batch_size)
        if latency is None:
            return []
        found.append(Step(record, latency, speed_ratio(found[-1].record, record, batch_size) if found else None))
    return found


def floor_words(chain: Sequence[Record]) -> str:
    """How far the last step of a chain is from its floor at each batch size; "" where no floor is known."""
    last = [found[-1].latency for size in batch_sizes(chain) if (found := steps(chain, size))]
    known = [(latency, latency.floor_ms) for latency in last if latency.floor_ms]
    parts = [
        f"{latency.p50_ms / floor:.1f} times {'its floor ' if number == 0 else ''}at batch {latency.batch_size} "
        f"({milliseconds(floor)} ms)"
        for number, (latency, floor) in enumerate(known)
    ]
    return f"{chain[-1].variant.name} takes {listed(parts)}." if parts else ""
