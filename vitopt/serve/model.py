"""One served model: requests in, answers out, gathered into batches between them."""

import asyncio
import collections
import contextlib
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil

from vitopt.errors import MeasurementError, VitoptError
from vitopt.measure.conditions import Gpu
from vitopt.prediction import Pass
from vitopt.serve.metrics import RESULTS, STAGES, Metrics
from vitopt.serve.policy import BatchTimes, Delay, batch_size, expected_wait, retry_after
from vitopt.serve.process import Loading, ModelLost, ModelProcess, Ready, Slots
from vitopt.serve.settings import ServeSpec

logger = logging.getLogger(__name__)

_LAST_S = 0.01  # between looks at what is still decoded when the server stops
_PAUSE_S = 1.0  # between attempts to start a model that ends while it loads


class Busy(Exception):
    """There is no room for a request, or no answer in time; `retry_after_s`: when there may be."""

    def __init__(self, why: str, retry_after_s: int) -> None:
        super().__init__(f"{why}: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Answer:
    """`logits`: (outputs,), float32; milliseconds that the request spent decoding, waiting and in the model's batch.

    `path`: which pass answered, of an adaptive model.
    """

    logits: np.ndarray
    decode_ms: float
    wait_ms: float
    model_ms: float
    batch: int
    path: Pass | None = None


@dataclass(eq=False)
class _Request:
    slot: int
    arrived: float
    expected_s: float
    future: "asyncio.Future[Answer]"
    decoded: float = 0.0


class ServedModel:
    """A model process, its queue, and the pool that decodes for it.

    A request owns a slot of shared memory from its arrival until nobody can write to it or read it any more: a client
    that goes away frees its place at once only where no thread decodes into it and no batch holds it.
    """

    def __init__(self, name: str, loading: Loading, spec: ServeSpec, size: tuple[int, int], metrics: Metrics) -> None:
        self.name, self.image_shape = name, (3, *size)
        self.runs: Ready | None = None  # how, once it is loaded
        self._metrics = metrics
        self._gpu: Gpu | None = None
        self._loading, self._spec, self._target_s = loading, spec, (spec.target_p99_ms or 0) / 1e3 or None
        self._slots: Slots | None = None
        self._free = collections.deque(range(spec.queue))
        self._ready: collections.deque[_Request] = collections.deque()
        self._decoders = ThreadPoolExecutor(spec.decoders, thread_name_prefix="decode")
        self._caller = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._work = asyncio.Event()
        self._stopping = False
        self._times: BatchTimes | None = None
        self._delay = Delay()
        self._running_until = 0.0
        self._decode_s = 0.0
        self.load_s = 10.0  # seconds; until it is known
        self._process: ModelProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended = {result: metrics.requests.labels(name, result) for result in RESULTS}
        self._stages = {stage: metrics.seconds.labels(name, stage) for stage in STAGES}
        metrics.restarts.labels(name)
        metrics.waiting.labels(name).set_function(lambda: self.waiting)
        metrics.ready.labels(name).set_function(lambda: self.is_ready)
        metrics.processor.labels(name).set_function(lambda: self._of_process(lambda it: sum(it.cpu_times()[:2])))
        metrics.memory.labels(name).set_function(lambda: self._of_process(lambda it: it.memory_info().rss))

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and warm."""
        return self._times is not None and not self._stopping

    @property
    def waiting(self) -> int:
        """Requests that have a place and no answer."""
        return self._spec.queue - len(self._free)

    @property
    def process_id(self) -> int | None:
        """Of the model's process."""
        return self._process.pid if self._process else None

    @property
    def batch_ms(self) -> dict[int, float]:
        """What a batch of each size takes at the moment; nothing while it is not known."""
        return {size: 1e3 * self._times[size] for size in self._times.sizes} if self._times else {}

    async def start(self) -> None:
        """Load the model and begin to answer.

        Raises:
            VitoptError: the model cannot be loaded.
        """
        self._slots = Slots(self._spec.queue, self.image_shape[1:])
        await self._load()
        self._task = asyncio.create_task(self._answer_batches())

    async def stop(self) -> None:
        """Answer what was accepted, then end."""
        self._stopping = True
        self._work.set()
        if self._task is not None:
            await self._task
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._process.sentinel)
            await asyncio.to_thread(self._process.stop)
        self._decoders.shutdown(cancel_futures=True)
        self._caller.shutdown()
        if self._slots is not None:
            self._slots.close()

    async def classify(self, fill: Callable[[np.ndarray], None]) -> Answer:
        """Answer one image: `fill` writes its pixels, (3, height, width), in a thread of the pool.

        Raises:
            Busy: there is no room, or an answer would come too late; or the model is being loaded.
            ModelLost: the process of the model ended while it computed this answer.
            TimeoutError: no answer within the time of the settings.
            Exception: whatever `fill` raises.
        """
        request = self._admit()
        try:
            async with asyncio.timeout(self._spec.timeout_s):
                await self._decode(request, fill)
                self._ready.append(request)
                self._work.set()
                answer = await request.future
        except BaseException:
            self._ended["failed"].inc()
            self._withdraw(request)
            raise
        self._ended["answered"].inc()
        self._delay.observe(request.expected_s, time.perf_counter() - request.arrived)
        stages = {"decode": answer.decode_ms, "wait": answer.wait_ms, "model": answer.model_ms}
        for stage, ms in (stages | {"all": sum(stages.values())}).items():
            self._stages[stage].observe(ms / 1e3)
        return answer

    def require_room(self) -> float:
        """Seconds until a request that comes now is expected to be answered. It gets no place by this.

        Raises:
            Busy: there is no room, or an answer would come too late; or the model is being loaded.
        """
        if self._times is None or self._stopping:
            self._ended["refused"].inc()
            raise Busy("the model is not loaded", max(1, round(self.load_s)))
        decoding = self._decode_s, self._spec.decoders
        running = self._running_until - time.perf_counter()
        wait = expected_wait(self.waiting, running, self._times, *decoding)
        too_late = self._target_s is not None and wait * self._delay.factor > self._target_s and self.waiting > 0
        if not self._free or too_late:
            self._ended["refused"].inc()
            raise Busy("too many requests wait", retry_after(wait, self._target_s))
        return wait

    def _admit(self) -> _Request:
        """A place for a new request."""
        arrived, wait = time.perf_counter(), self.require_room()
        return _Request(self._free.popleft(), arrived, wait, asyncio.get_running_loop().create_future())

    async def _decode(self, request: _Request, fill: Callable[[np.ndarray], None]) -> None:
        slots = self._slots
        assert slots is not None

        def timed() -> float:
            start = time.perf_counter()
            fill(slots.pixels[request.slot])
            return time.perf_counter() - start

        job = self._decoders.submit(timed)
        try:
            seconds = await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            # A thread cannot be stopped: until it has ended, nobody else may have the slot.
            slot, request.slot = request.slot, -1
            loop = asyncio.get_running_loop()
            job.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free.append, slot))
            raise
        request.decoded = time.perf_counter()
        self._decode_s += 0.1 * (seconds - self._decode_s)

    def _withdraw(self, request: _Request) -> None:
        """Free the place of a request that ends without an answer, unless a batch holds it."""
        request.future.cancel()
        if request in self._ready:
            self._ready.remove(request)
            self._release(request)
        elif not request.decoded:
            self._release(request)

    def _release(self, request: _Request) -> None:
        if request.slot >= 0:
            self._free.append(request.slot)
            request.slot = -1

    async def _answer_batches(self) -> None:
        while not (self._stopping and self.waiting == 0):
            if self._times is None:
                await self._load_again()
            elif self._ready:
                await self._answer_batch(self._times)
            elif self._stopping:  # some are being decoded
                await asyncio.sleep(_LAST_S)
            else:
                self._work.clear()
                await self._work.wait()

    async def _answer_batch(self, times: BatchTimes) -> None:
        start = time.perf_counter()
        size = batch_size([start - request.arrived for request in self._ready], times, self._target_s)
        batch = [self._ready.popleft() for _ in range(min(size, len(self._ready)))]
        self._running_until = start + times[size]
        assert self._process is not None
        try:
            found = await asyncio.get_running_loop().run_in_executor(
                self._caller, self._process.answers, [request.slot for request in batch], size
            )
        except (ModelLost, MeasurementError) as error:
            if isinstance(error, ModelLost):
                self._lost()
            for request in batch:
                if not request.future.done():
                    request.future.set_exception(error)
        else:
            seconds = time.perf_counter() - start
            times.observe(size if self.runs and self.runs.fixed_shapes else len(batch), seconds)
            self._metrics.batches.labels(self.name).observe(len(batch))
            self._metrics.busy.labels(self.name).inc(seconds)
            for place, (request, logits) in enumerate(zip(batch, found.logits, strict=True)):
                if not request.future.done():
                    path = found.paths[place] if found.paths else None
                    decode, wait = request.decoded - request.arrived, start - request.decoded
                    answer = Answer(logits, 1e3 * decode, 1e3 * wait, 1e3 * seconds, len(batch), path)
                    request.future.set_result(answer)
        finally:
            for request in batch:
                self._release(request)

    async def _load(self) -> None:
        start = time.perf_counter()
        assert self._slots is not None
        self._process = await asyncio.to_thread(ModelProcess, self._loading, self._slots)
        self.runs = await asyncio.to_thread(self._process.ready)
        # Also where it ends between two batches: those who wait then have lost nothing.
        asyncio.get_running_loop().add_reader(self._process.sentinel, self._lost)
        self._times = BatchTimes(self.runs.seconds)
        self.load_s = time.perf_counter() - start
        if self.runs.gpu and self._gpu is None and (gpu := Gpu.at(self.runs.gpu)):
            self._gpu = gpu
            self._metrics.energy.labels(self.name).set_function(lambda: _or_nan(gpu.energy_joules()))
            self._metrics.utilisation.labels(self.name).set_function(lambda: _or_nan(gpu.busy_percent()))

    def _lost(self) -> None:
        assert self._process is not None
        if self._times is not None and asyncio.get_running_loop().remove_reader(self._process.sentinel):
            logger.warning("%s: the model's process ended; it is started again", self.name)
            self._times = None
            self._work.set()

    def _of_process(self, figure: Callable[[psutil.Process], float]) -> float:
        with contextlib.suppress(psutil.Error):
            if self.process_id is not None:
                return figure(psutil.Process(self.process_id))
        return math.nan

    async def _load_again(self) -> None:
        self._metrics.restarts.labels(self.name).inc()
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)
        try:
            await self._load()
        except (ModelLost, VitoptError) as error:
            logger.warning("%s: cannot be started again (%s); another attempt follows", self.name, error)
            await asyncio.sleep(_PAUSE_S)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
