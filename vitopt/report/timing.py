"""Latency of a record at one batch size."""

from vitopt.records import Latency, Record


def latency_at(record: Record, batch_size: int | None) -> Latency | None:
    """Latency at one batch size (None: the first measured); None where it was not measured."""
    if batch_size is None:
        return record.latency[0] if record.latency else None
    return next((latency for latency in record.latency if latency.batch_size == batch_size), None)
