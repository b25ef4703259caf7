"""An open load on a server: requests at random times that do not wait for answers, as many users send them.

Latency counts from the moment at which a request was due, not at which the client got round to sending it: a client
that waits for a slow server before it sends the next request measures the server's slowness once where a thousand users
would have felt it ("coordinated omission", Tene, "How NOT to Measure Latency").
"""

import asyncio
import contextlib
import math
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from vitopt import progress
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.errors import MeasurementError, RecipeError, UnsupportedError
from vitopt.measure.latency_statistics import FOR_P99, latency_summary
from vitopt.measure.predictions import Predictions
from vitopt.serve.settings import TOKEN_VARIABLE
from vitopt.serving_record import CallerLatency, ServedRate

_ALONE = 400  # requests one after another: enough for the limits of a p99
_TOGETHER = 4  # requests under way while answers are learnt
_TRIES, _PAUSE_S = 20, 0.1  # of one that is refused then, and between them
_LEAST_RATE = 0.1
_HALVINGS = 5  # of the gap between a rate that keeps the target and one that misses it: to 2**(1/32), 2 %
_CONNECT_S = 5.0
_LOOK_S = 1.0
_SAME_PERCENT = 1.0  # by so much an answer may differ with the batch that it was in


@dataclass(frozen=True)
class _Reply:
    status: int
    done: float
    body: dict[str, Any]
    error: str = ""

    @property
    def best(self) -> dict[str, Any]:
        return self.body["classes"][0]


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Times in seconds, ascending, of a Poisson process: exponential gaps with mean 1 / `rate`."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(rate * seconds * 2) + 50)
    times = np.cumsum(gaps)
    return times[times < seconds]


class Client:
    """One server, one of its models (its first, where none is named), and the images that are sent there.

    `described`: what the server says of the model; `images` have labels as its head orders them.

    Raises:
        RecipeError: `url` is no address.
        UnsupportedError: nobody answers at `url`, it is not ready or refuses, or it has no such model.
        DataError: the images' labels are none of the model's classes.
    """

    def __init__(
        self, url: str, images: ImageSet, *, model: str | None = None, token: str | None = None, timeout_s: float = 60.0
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise RecipeError(f"{url} is no address of a server: give it as in http://127.0.0.1:8000")
        self.url, self._token, self._timeout_s = url.rstrip("/"), token, timeout_s
        models = asyncio.run(self._models())
        found = next((one for one in models if model in (None, one["name"])), None)
        if found is None:
            raise UnsupportedError(f"no model {model} at {url}; there are {', '.join(one['name'] for one in models)}")
        self.model, self.described = found["name"], found
        self.images = fit_labels(images, found["labels"])
        self._contents = [images.reader.content(row) for row in images.rows]
        self._own: list[_Reply] | None = None  # of each image, when it was sent without a load

    def state(self) -> dict[str, Any]:
        """What the server says of the model now."""
        models = asyncio.run(self._models(needs_ready=False))
        return next(one for one in models if one["name"] == self.model)

    def alone(self) -> CallerLatency:
        """Send images one after another: what a request takes that meets no other.

        Raises:
            MeasurementError: the server does not answer one of them.
        """
        with progress.task("requests one after another", None):
            return asyncio.run(self._alone())

    def learn(self) -> Predictions:
        """Send each image once, nearly alone. Answers under load are then held against these.

        Raises:
            MeasurementError: the server does not answer one of them.
        """
        with progress.task("each image without a load", None):
            self._own = asyncio.run(self._learn())
        return self._predictions(self._own)

    def send(self, rate: float, seconds: float, seed: int = 0) -> ServedRate:
        """Send images, chosen at random, at `rate` requests a second for so many seconds, and wait for all answers."""
        with progress.task(f"{rate:.1f} requests/s for {seconds:g} s", None):
            return asyncio.run(self._send(rate, seconds, seed))

    def highest_rate(
        self, target_ms: float, seconds: float, seed: int = 0, alone: CallerLatency | None = None
    ) -> list[ServedRate]:
        """What happened at rates that double until `target_ms` is missed and then halve the gap; ascending.

        The first is half of what one request after another gives (`alone`, which is measured where it is not given).

        Raises:
            MeasurementError: requests that meet no other miss the target already, or any rate does.
        """
        alone = alone or self.alone()
        rate, kept, missed = 500 / alone.p50_ms, 0.0, math.inf
        found: list[ServedRate] = []
        while missed == math.inf or kept == 0:
            if alone.highest > target_ms or rate < _LEAST_RATE:
                raise MeasurementError(
                    f"even single requests miss {target_ms:g} ms (they take {alone.highest:.1f}): "
                    "choose a higher --target-p99-ms"
                )
            found.append(self.send(rate, seconds, seed + len(found)))
            if found[-1].keeps(target_ms):
                kept, rate = rate, 2 * rate
            else:
                missed, rate = rate, rate / 2
        for _ in range(_HALVINGS):
            rate = math.sqrt(kept * missed)
            found.append(self.send(rate, seconds, seed + len(found)))
            kept, missed = (rate, missed) if found[-1].keeps(target_ms) else (kept, rate)
        return sorted(found, key=lambda one: one.rate)

    async def _models(self, needs_ready: bool = True) -> list[dict[str, Any]]:
        try:
            async with self._session() as session:
                async with session.get(f"{self.url}/v2/health/ready") as answer:
                    if needs_ready and answer.status == 503:
                        raise UnsupportedError(f"the server at {self.url} is not ready yet: wait until it is")
                async with session.get(f"{self.url}/models") as answer:
                    if answer.status == 401:
                        raise UnsupportedError(f"the server at {self.url} wants its token: set {TOKEN_VARIABLE} to it")
                    answer.raise_for_status()
                    return await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise UnsupportedError(f"no vitopt server answers at {self.url}: start `vitopt serve`") from error

    async def _alone(self) -> CallerLatency:
        times = []
        async with self._session() as session:
            for which in range(min(_ALONE, len(self._contents))):
                start = time.perf_counter()
                reply = await self._one(session, which)
                self._require(which, reply)
                times.append(1e3 * (reply.done - start))
        return _latency(times)

    async def _learn(self) -> list[_Reply]:
        room = asyncio.Semaphore(_TOGETHER)

        async def learnt(which: int) -> _Reply:
            async with room:
                for _ in range(_TRIES):  # a server that keeps a target may refuse what comes together
                    reply = await self._one(session, which, logits=True)
                    if reply.status != 503:
                        break
                    await asyncio.sleep(_PAUSE_S)
                self._require(which, reply)
                return reply

        async with self._session() as session:
            return await asyncio.gather(*map(learnt, range(len(self._contents))))

    def _require(self, which: int, reply: _Reply) -> None:
        if reply.status != 200:
            why = reply.error or "it has no room, so something else loads it"
            raise MeasurementError(f"{self.url} does not answer the image {self.images.ids[which]} ({why})")

    def _predictions(self, replies: Sequence[_Reply]) -> Predictions:
        logits = np.array([reply.body["logits"] for reply in replies], np.float32)
        paths = [reply.body.get("path") for reply in replies]
        return Predictions(
            ids=self.images.ids,
            image_sha256=self.images.image_hashes,
            labels=self.images.targets(logits.shape[1]),
            logits=logits,
            groups=self.images.groups,
            outputs=self.described.get("outputs", "classes"),
            escalated=np.array([path == "second" for path in paths]) if paths[0] else None,
        )

    async def _send(self, rate: float, seconds: float, seed: int) -> ServedRate:
        due = arrivals(rate, seconds, seed)
        order = np.random.default_rng(seed + 1).integers(len(self._contents), size=len(due))
        async with self._session() as session, self._watched(session) as looks:
            start = time.perf_counter()
            tasks = []
            for moment, which in zip(due, order, strict=True):
                await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
                tasks.append(asyncio.create_task(self._one(session, which)))
            replies = await asyncio.gather(*tasks)
        times = [1e3 * (reply.done - start - moment) for reply, moment in zip(replies, due, strict=True)]
        good = [i for i, reply in enumerate(replies) if reply.status == 200]
        refused = [times[i] for i, reply in enumerate(replies) if reply.status == 503]
        return ServedRate(
            rate=rate,
            seconds=max([seconds, *(reply.done - start for reply in replies)]),
            sent=len(due),
            answered=len(good),
            refused=len(refused),
            errors=dict(Counter(reply.error for reply in replies if reply.status not in (200, 503))),
            latency=_latency([times[i] for i in good]) if good else None,
            p99_of_sent_ms=_p99_of_sent([times[i] for i in good], len(due)),
            slowest_refusal_ms=max(refused, default=None),
            right=sum(replies[i].best["index"] == self.images.labels[order[i]] for i in good),
            differing=sum(_differ(replies[i], self._own[order[i]]) for i in good) if self._own else None,
            mean_batch=float(np.mean([replies[i].body["batch"] for i in good])) if good else None,
            **self._figures(looks, len(good)),
        )

    @contextlib.asynccontextmanager
    async def _watched(self, session: aiohttp.ClientSession) -> AsyncIterator[list[dict[str, float]]]:
        """Looks at the server's metrics, before, once a second, and after."""
        looks = [await self._look(session)]

        async def watch() -> None:
            while True:
                await asyncio.sleep(_LOOK_S)
                looks.append(await self._look(session))

        watching = asyncio.create_task(watch())
        try:
            yield looks
        finally:
            watching.cancel()
            looks.append(await self._look(session))

    async def _look(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """The figures of this model and of the server's process, with `time`; none where they cannot be had."""
        try:
            async with session.get(f"{self.url}/metrics") as answer:
                families = list(text_string_to_metric_families(await answer.text())) if answer.status == 200 else []
        except (aiohttp.ClientError, TimeoutError, ValueError):
            families = []
        samples = [sample for family in families for sample in family.samples]
        own = {sample.name: sample.value for sample in samples if sample.labels.get("model", self.model) == self.model}
        return {"time": time.perf_counter()} | {name: value for name, value in own.items() if not math.isnan(value)}

    def _figures(self, looks: Sequence[dict[str, float]], answers: int) -> dict[str, Any]:
        """Utilisation, energy and memory of the server; what cannot be told is None."""

        def grown(*names: str) -> float | None:
            counts = [sum(look[name] for name in names) for look in (looks[0], looks[-1]) if set(names) <= set(look)]
            # A process that was started anew counts from 0.
            return counts[1] - counts[0] if len(counts) == 2 and counts[1] >= counts[0] else None

        def share(count: float | None, of: float | None) -> float | None:
            return None if count is None or not of else 100 * count / of

        seconds, cores = grown("time"), self.described.get("record", {}).get("environment", {}).get("cpu_count")
        gpu = [look["vitopt_gpu_percent"] for look in looks if "vitopt_gpu_percent" in look]
        names = "process_resident_memory_bytes", "vitopt_model_resident_bytes"
        held = [sum(look[name] for name in names) for look in looks if set(names) <= set(look)]
        joules = grown("vitopt_gpu_joules")
        return {
            "busy_percent": share(grown("vitopt_model_busy_seconds_total"), seconds),
            "cpu_percent": share(
                grown("process_cpu_seconds_total", "vitopt_model_cpu_seconds"), (cores or 0) * (seconds or 0)
            ),
            "gpu_percent": statistics.fmean(gpu) if gpu else None,
            "joules_per_answer": None if joules is None or not answers else joules / answers,
            "peak_bytes": int(max(held)) if held else None,
        }

    async def _one(self, session: aiohttp.ClientSession, which: int, logits: bool = False) -> _Reply:
        try:
            address, asked = f"{self.url}/predict", {"top": 1, "model": self.model, "logits": str(logits)}
            async with session.post(address, params=asked, data=self._contents[which]) as answer:
                if answer.status == 503:  # whose body need not be JSON where a proxy or another server refuses
                    await answer.read()
                    return _Reply(answer.status, time.perf_counter(), {})
                body: dict[str, Any] = await answer.json()
                error = "" if answer.status == 200 else f"{answer.status}: {body.get('error')}"
                return _Reply(answer.status, time.perf_counter(), body, error)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return _Reply(0, time.perf_counter(), {}, type(error).__name__)

    def _session(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        limits = aiohttp.ClientTimeout(total=self._timeout_s, connect=_CONNECT_S)
        return aiohttp.ClientSession(headers=headers, timeout=limits, connector=aiohttp.TCPConnector(limit=0))


def _p99_of_sent(answered_ms: Sequence[float], sent: int) -> float | None:
    """As the record has it: those that are not among `answered_ms` are slower than any."""
    place = math.ceil((0.99 if sent >= FOR_P99 else 0.95) * sent)
    return sorted(answered_ms)[place - 1] if 0 < place <= len(answered_ms) else None


def _latency(times_ms: Sequence[float]) -> CallerLatency:
    return CallerLatency(**asdict(latency_summary(times_ms)))


def _differ(one: _Reply, other: _Reply) -> bool:
    return one.best["index"] != other.best["index"] or abs(one.best["percent"] - other.best["percent"]) > _SAME_PERCENT


def cost_per_million(rate: float, price_per_hour: float) -> float:
    """What a million requests cost at `rate` a second on a machine of this price, in its currency."""
    return price_per_hour / 3600 / rate * 1e6
