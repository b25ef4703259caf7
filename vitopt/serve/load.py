"""An open load on a server: requests at random times that do not wait for answers, as many users send them.

Latency counts from the moment at which a request was due, not at which the client got round to sending it: a client
that waits for a slow server before it sends the next request measures the server's slowness once where a thousand users
would have felt it ("coordinated omission", Tene, "How NOT to Measure Latency").
"""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import psutil

from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.errors import MeasurementError, UnsupportedError
from vitopt.measure.intervals import Interval, wilson_interval
from vitopt.measure.latency_statistics import LatencySummary, latency_summary

_FIRST_RATE = 1.0
_FIRST_S = 30.0  # that rate needs time for enough samples
_HALVINGS = 5  # of the gap between a rate that keeps the target and one that misses it: to 2**(1/32), 2 %
_CONNECT_S = 5.0


@dataclass(frozen=True)
class Step:
    """What happened at one rate.

    `latency`: of answered requests, from when they were due; None where none was answered. `errors`: requests by what
    went wrong, refusals apart. `cpu_percent`: of all cores of this machine.
    """

    rate: float
    seconds: float
    sent: int
    answered: int
    refused: int
    errors: dict[str, int]
    latency: LatencySummary | None
    slowest_refusal_ms: float | None
    right: int
    cpu_percent: float
    mean_batch: float | None

    @property
    def answered_rate(self) -> float:
        """Answers per second."""
        return self.answered / self.seconds

    def keeps(self, target_ms: float) -> bool:
        """Whether all were answered, 99 % of them within `target_ms` (95 % where under 100 were sent)."""
        if self.latency is None or self.answered < self.sent:
            return False
        return (self.latency.p99_ms or self.latency.p95_ms or target_ms) <= target_ms

    @property
    def top1(self) -> Interval | None:
        """Share of answers whose class is the label, in percent, with Wilson's interval."""
        if not self.answered:
            return None
        found = wilson_interval(self.right, self.answered)
        return Interval(100 * found.low, 100 * found.high)


@dataclass(frozen=True)
class _Reply:
    status: int
    done: float
    index: int | None = None
    batch: int = 0
    error: str = ""


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Times in seconds, ascending, of a Poisson process: exponential gaps with mean 1 / `rate`."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(rate * seconds * 2) + 50)
    times = np.cumsum(gaps)
    return times[times < seconds]


class Client:
    """One server, one of its models (its first, where none is named), and the images that are sent there.

    Raises:
        UnsupportedError: nobody answers at `url`, it is not ready or refuses, or it has no such model.
        DataError: the images' labels are none of the model's classes.
    """

    def __init__(
        self, url: str, images: ImageSet, *, model: str | None = None, token: str | None = None, timeout_s: float = 60.0
    ) -> None:
        self._url, self._token, self._timeout_s = url.rstrip("/"), token, timeout_s
        models = asyncio.run(self._models())
        found = next((one for one in models if model in (None, one["name"])), None)
        if found is None:
            raise UnsupportedError(f"no model {model} at {url}; there are {', '.join(one['name'] for one in models)}")
        self.model, self.runs = found["name"], found["runs"]
        self._labels = fit_labels(images, found["labels"]).labels
        self._contents = [images.reader.content(row) for row in images.rows]

    def send(self, rate: float, seconds: float, seed: int = 0) -> Step:
        """Send images, chosen at random, at `rate` requests a second for so many seconds, and wait for all answers."""
        return asyncio.run(self._send(rate, seconds, seed))

    def highest_rate(self, target_ms: float, seconds: float, seed: int = 0) -> list[Step]:
        """Steps in order of their rates, which double until `target_ms` is missed and then halve the gap.

        Raises:
            MeasurementError: one request a second misses the target already.
        """
        steps = [self.send(_FIRST_RATE, max(seconds, _FIRST_S), seed)]
        if not steps[0].keeps(target_ms):
            raise MeasurementError(
                f"{_FIRST_RATE:g} request a second misses {target_ms:g} ms already: choose a higher --target-p99-ms"
            )
        while steps[-1].keeps(target_ms):
            good = steps[-1].rate
            steps.append(self.send(2 * good, seconds, seed + len(steps)))
        bad = steps[-1].rate
        for _ in range(_HALVINGS):
            steps.append(self.send((good * bad) ** 0.5, seconds, seed + len(steps)))
            good, bad = (steps[-1].rate, bad) if steps[-1].keeps(target_ms) else (good, steps[-1].rate)
        return sorted(steps, key=lambda step: step.rate)

    async def _models(self) -> list[dict[str, Any]]:
        try:
            async with self._session() as session:
                async with session.get(f"{self._url}/v2/health/ready") as answer:
                    if answer.status != 200:
                        raise UnsupportedError(f"the server at {self._url} is not ready yet: wait until it is")
                async with session.get(f"{self._url}/models") as answer:
                    if answer.status != 200:
                        raise UnsupportedError(f"the server at {self._url} refuses: {(await answer.json())['error']}")
                    return await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            raise UnsupportedError(f"no vitopt server answers at {self._url}: start `vitopt serve`") from error

    async def _send(self, rate: float, seconds: float, seed: int) -> Step:
        due = arrivals(rate, seconds, seed)
        order = np.random.default_rng(seed + 1).integers(len(self._contents), size=len(due))
        async with self._session() as session:
            psutil.cpu_percent()
            start = time.perf_counter()
            tasks = []
            for moment, which in zip(due, order, strict=True):
                await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
                tasks.append(asyncio.create_task(self._one(session, self._contents[which])))
            replies = await asyncio.gather(*tasks)
            busy = psutil.cpu_percent()
        times = [1e3 * (reply.done - start - moment) for reply, moment in zip(replies, due, strict=True)]
        good = [i for i, reply in enumerate(replies) if reply.status == 200]
        refused = [times[i] for i, reply in enumerate(replies) if reply.status == 503]
        return Step(
            rate=rate,
            seconds=max([seconds, *(reply.done - start for reply in replies)]),
            sent=len(due),
            answered=len(good),
            refused=len(refused),
            errors=dict(Counter(reply.error for reply in replies if reply.status not in (200, 503))),
            latency=latency_summary([times[i] for i in good]) if good else None,
            slowest_refusal_ms=max(refused, default=None),
            right=sum(replies[i].index == self._labels[order[i]] for i in good),
            cpu_percent=busy,
            mean_batch=float(np.mean([replies[i].batch for i in good])) if good else None,
        )

    async def _one(self, session: aiohttp.ClientSession, content: bytes) -> _Reply:
        try:
            address = f"{self._url}/predict"
            async with session.post(address, params={"top": 1, "model": self.model}, data=content) as answer:
                body: dict[str, Any] = await answer.json()
                now = time.perf_counter()
                if answer.status == 200:
                    return _Reply(200, now, body["classes"][0]["index"], body["batch"])
                return _Reply(answer.status, now, error=f"{answer.status}: {body.get('error')}")
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return _Reply(0, time.perf_counter(), error=type(error).__name__)

    def _session(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        limits = aiohttp.ClientTimeout(total=self._timeout_s, connect=_CONNECT_S)
        return aiohttp.ClientSession(headers=headers, timeout=limits, connector=aiohttp.TCPConnector(limit=0))


def cost_per_million(rate: float, price_per_hour: float) -> float:
    """What a million requests cost at `rate` a second on a machine of this price, in its currency."""
    return price_per_hour / 3600 / rate * 1e6
