"""What a server counts, as Prometheus reads it: from the counts that the models keep anyway."""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

from vitopt.serve.model import ServedModel

__all__ = ["CONTENT_TYPE", "metrics_text"]


class _Models(Collector):
    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("vitopt_requests", "requests that ended", labels=["model", "result"])
        restarts = CounterMetricFamily("vitopt_model_restarts", "starts after its process ended", labels=["model"])
        waiting = GaugeMetricFamily("vitopt_requests_waiting", "requests with a place and no answer", labels=["model"])
        ready = GaugeMetricFamily("vitopt_model_ready", "1 where the model is warm", labels=["model"])
        batches = HistogramMetricFamily("vitopt_batch_images", "requests answered by one call", labels=["model"])
        stages = HistogramMetricFamily(
            "vitopt_request_seconds", "time of answered requests in each stage", labels=["model", "stage"]
        )
        for model in self._models:
            counts, name = model.counts, model.name
            for result in ("answered", "refused", "failed"):
                requests.add_metric([name, result], getattr(counts, result))
            restarts.add_metric([name], counts.restarts)
            waiting.add_metric([name], model.waiting)
            ready.add_metric([name], int(model.is_ready))
            batches.add_metric([name], counts.batches.buckets, counts.batches.total)
            for stage, histogram in counts.seconds.items():
                stages.add_metric([name, stage], histogram.buckets, histogram.total)
        return [requests, restarts, waiting, ready, batches, stages]


def metrics_text(models: Sequence[ServedModel]) -> bytes:
    """The page of metrics."""
    registry = CollectorRegistry()
    registry.register(_Models(models))
    return generate_latest(registry)
