"""Latency of one variant against another, from the samples in their records."""

import numpy as np

from vitopt.measure import statistics
from vitopt.measure.statistics import Speedup
from vitopt.records import Latency, Record


def latency_at(record: Record, batch_size: int | None) -> Latency | None:
    """Latency at one batch size (None: the first measured); None where it was not measured."""
    if batch_size is None:
        return record.latency[0] if record.latency else None
    return next((latency for latency in record.latency if latency.batch_size == batch_size), None)


def speedup_between(before: Latency, after: Latency) -> Speedup:
    """How many times faster `after` is; with an interval where both were timed in the same number of rounds."""
    if before.rounds == after.rounds and _splits(before) and _splits(after):
        return statistics.speedup_interval(_rounds(before), _rounds(after))
    return Speedup(before.p50_ms / after.p50_ms, None)


def _splits(latency: Latency) -> bool:
    return len(latency.samples_ms) > 0 and len(latency.samples_ms) % latency.rounds == 0


def _rounds(latency: Latency) -> list[np.ndarray]:
    return np.split(np.asarray(latency.samples_ms), latency.rounds)
