"""The section of a record that tells what callers of a server felt. Imports no torch."""

from pydantic import Field

from vitopt.section import Section

Limits = tuple[float | None, float | None]  # a limit that so few requests cannot give is null


class CallerLatency(Section):
    """Milliseconds from when a request was due to its answer; a percentile that so few cannot show is null."""

    count: int = Field(description="of requests")
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p95_ms: float | None
    p99_ms: float | None
    p50_ci95_ms: Limits = Field(description="by order statistics, as the next two")
    p95_ci95_ms: Limits
    p99_ci95_ms: Limits

    @property
    def highest(self) -> float:
        """p99, or what so few answers can show of it."""
        return self.p99_ms or self.p95_ms or self.p50_ms


class ServedRate(Section):
    """What happened at one rate."""

    rate: float = Field(description="requests per second, at random times that do not wait for answers")
    seconds: float = Field(description="until the last answer")
    sent: int = Field(description="requests that were due in that time")
    answered: int = Field(description="with 200")
    refused: int = Field(description="with 503")
    errors: dict[str, int] = Field(description="requests by what else went wrong")
    latency: CallerLatency | None = Field(description="of answered requests")
    p99_of_sent_ms: float | None = Field(
        None,
        description="of all that were sent (p95 of under 100), one without an answer being slower than any; null where "
        "it is such a one",
    )
    slowest_refusal_ms: float | None
    right: int = Field(description="answers whose class is the image's label")
    differing: int | None = Field(
        None,
        description="answers that are not the image's own: another class or percent than without a load",
    )
    mean_batch: float | None = Field(description="requests in the batch of an answer")
    busy_percent: float | None = Field(None, description="time in which the model computed")
    cpu_percent: float | None = Field(None, description="of all cores of the server's machine, by server and model")
    gpu_percent: float | None = Field(None, description="mean over looks at the model's GPU, one a second")
    joules_per_answer: float | None = Field(None, description="of the model's GPU")
    peak_bytes: int | None = Field(None, description="resident memory of server and model, the highest that was seen")

    @property
    def answered_rate(self) -> float:
        """Answers per second."""
        return self.answered / self.seconds

    @property
    def top1_percent(self) -> float | None:
        """Share of the answers that are right."""
        return 100 * self.right / self.answered if self.answered else None

    def keeps(self, target_ms: float) -> bool:
        """Whether 99 % of what was sent (95 % of under 100) was answered within `target_ms`, and nothing broke."""
        return not self.errors and self.p99_of_sent_ms is not None and self.p99_of_sent_ms <= target_ms


class Serving(Section):
    """A server under load, from its clients' side."""

    alone: CallerLatency = Field(description="one request after another, nothing else under way")
    batch_ms: dict[int, float] = Field(description="batch size -> what the model takes for it, at the end")
    rates: tuple[ServedRate, ...] = Field(description="ascending")
    target_p99_ms: float | None = None
    highest_rate: float | None = Field(None, description="of `rates`, that keeps the target")
    price_per_hour: float | None = Field(None, description="of the server's machine, in any currency")
    cost_per_million: float | None = Field(None, description="requests, at `highest_rate`")

    @property
    def best(self) -> ServedRate | None:
        """That at `highest_rate`."""
        return next((one for one in self.rates if one.rate == self.highest_rate), None)
