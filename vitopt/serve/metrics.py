"""What a server counts, as Prometheus reads it."""

from collections.abc import Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "RESULTS", "STAGES", "Metrics"]

RESULTS = "answered", "refused", "failed"
STAGES = "decode", "wait", "model", "all"
_SECONDS = tuple(base * 10**power for power in (-3, -2, -1, 0, 1) for base in (1, 2, 5))

disable_created_metrics()  # a line more for each count, which nobody reads


class Metrics:
    """The counts of all models of a server, by the model's name, and of the server's own process."""

    def __init__(self, batch_sizes: Sequence[int]) -> None:
        self.registry = CollectorRegistry()

        def made(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"vitopt_{name}", text, ["model", *labels], registry=self.registry, **options)

        self.requests = made(Counter, "requests", "requests that ended", "result")
        self.seconds = made(
            Histogram, "request_seconds", "time of answered requests in each stage", "stage", buckets=_SECONDS
        )
        self.batches = made(Histogram, "batch_images", "requests answered by one call", buckets=batch_sizes)
        self.busy = made(Counter, "model_busy_seconds", "time in which the model computed")
        self.restarts = made(Counter, "model_restarts", "starts after its process ended")
        self.waiting = made(Gauge, "requests_waiting", "requests with a place and no answer")
        self.ready = made(Gauge, "model_ready", "1 where the model is warm")
        self.processor = made(Gauge, "model_cpu_seconds", "of the model's process since its start")
        self.memory = made(Gauge, "model_resident_bytes", "of the model's process")
        self.energy = made(Gauge, "gpu_joules", "energy of the model's GPU since its driver was loaded; NaN: not told")
        self.utilisation = made(Gauge, "gpu_percent", "share of time in which the model's GPU was busy; NaN: not told")
        ProcessCollector(registry=self.registry)

    def page(self) -> bytes:
        """All of it, as text."""
        return generate_latest(self.registry)
