"""Latency: what a caller waits for one call, variants interleaved so that a drifting machine cancels out.

Every round times all variants one after another, in an order that is balanced over the rounds. After a switch from
one variant to another the first calls pay for caches and clocks that the other left behind: they are made, counted
and in no sample. Neither is the warm-up.
"""

import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from vitopt import progress
from vitopt.measure.failures import explain_failure, is_out_of_memory

if TYPE_CHECKING:  # a GPU machine may have torch and no pydantic, and is timed by these clocks all the same
    from vitopt.recipe import LatencySpec

logger = logging.getLogger(__name__)

Call = Callable[[], object]

_WINDOW = 5  # calls whose median must agree with the median of as many before
_STABLE = 0.03
_FEWEST_WARMUP_CALLS = 2 * _WINDOW
_MOST_DISCARDED = 5  # calls after one switch
_QUEUE_MS = 200  # between two looks at the clock while a device is kept busy
_FIRST_ROUNDS = 4  # of a first session, an even number of them, and enough for an interval
_FIRST_SHARE = 0.1  # of the time of warm-ups that first sessions may take


class Clock:
    """Wall clock of a device that works synchronously: the CPU."""

    runs_ahead = False  # whether a call returns before the device has done it

    def now(self) -> float:
        """Seconds, monotonic."""
        return time.perf_counter()

    def time(self, call: Call) -> float:
        """Milliseconds that a caller waits for one `call`."""
        started = self.now()
        call()
        return 1000 * (self.now() - started)

    def queued(self, call: Call, count: int) -> float:
        """Milliseconds per call of `count` calls that follow each other without a wait: what the device takes."""
        started = self.now()
        for _ in range(count):
            call()
        return 1000 * (self.now() - started) / count

    def sustained(self, call: Call, seconds: float) -> tuple[int, float]:
        """Keep the device busy for at least so many seconds; how many calls it did, and in how many seconds."""
        each_ms = self.queued(call, 1)
        count = max(1, round(_QUEUE_MS / max(each_ms, 1e-3)))
        calls, started = 0, self.now()
        while calls == 0 or self.now() - started < seconds:
            self.queued(call, count)
            calls += count
        return calls, self.now() - started


class CudaClock(Clock):
    """Wall clock around synchronised calls; queues are timed by one pair of CUDA events."""

    runs_ahead = True

    def __init__(self, device: torch.device):
        self.device = device
        self._before, self._after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for event in (self._before, self._after):  # an event is made when it is first recorded
            event.record(torch.cuda.current_stream(device))

    def time(self, call: Call) -> float:
        """As `Clock.time`."""
        torch.cuda.synchronize(self.device)
        started = self.now()
        call()
        torch.cuda.synchronize(self.device)
        return 1000 * (self.now() - started)

    def queued(self, call: Call, count: int) -> float:
        """As `Clock.queued`."""
        stream = torch.cuda.current_stream(self.device)
        torch.cuda.synchronize(self.device)
        self._before.record(stream)
        for _ in range(count):
            call()
        self._after.record(stream)
        torch.cuda.synchronize(self.device)
        return self._before.elapsed_time(self._after) / count


def clock_for(device: torch.device) -> Clock:
    """The clock that measures what a caller of a model on `device` waits."""
    return CudaClock(device) if device.type == "cuda" else Clock()


@dataclass
class Timing:
    """Samples of one variant, one list per round, in milliseconds."""

    warmup_ms: float = 0.0
    warmup_iterations: int = 0
    warm_ms: float = 0.0  # median of the last calls of the warm-up
    settled: bool = False  # whether the warm-up ended because calls took a steady time
    discarded_calls: int = 0  # after switches, in no other figure
    rounds_ms: list[list[float]] = field(default_factory=list)
    device_ms: list[float] = field(default_factory=list)  # per call of a queue, one figure of each round
    failure: str | None = None
    out_of_memory: bool = False

    @property
    def samples_ms(self) -> list[float]:
        """All samples in order of time."""
        return [sample for samples in self.rounds_ms for sample in samples]


def time_interleaved(
    calls: Mapping[str, Call],
    spec: "LatencySpec",
    clock: Clock,
    description: str = "latency",
    so_far: Callable[[dict[str, Timing]], None] = lambda timings: None,
) -> dict[str, Timing]:
    """Time several calls against each other; name -> its samples.

    A call that raises gets a `failure` and leaves the rounds; the others go on. Warm-ups can take minutes: in between,
    as often as it takes a tenth of their time, `so_far` gets a first session of a few rounds of all that are warm.
    """
    timings: dict[str, Timing] = {}
    since, previous_cost = clock.now(), 0.0
    for name, call in calls.items():
        started = clock.now()
        warm = [timing.warm_ms for timing in timings.values() if timing.failure is None]
        cost = max(previous_cost, _session_seconds(warm, spec, clock))
        if warm and cost <= _FIRST_SHARE * (started - since):
            first = {known: replace(timing, rounds_ms=[], device_ms=[]) for known, timing in timings.items()}
            _take_turns(calls, first, spec, clock, range(min(_FIRST_ROUNDS, spec.rounds)))
            so_far(first)
            since = clock.now()
            previous_cost = since - started
        timing = timings[name] = Timing()
        _guarded(timing, functools.partial(_warm_up, call, timing, spec, clock))
        outcome = timing.failure or f"about {timing.warm_ms:.3g} ms, warm after {timing.warmup_ms / 1000:.1f} s"
        logger.info("%s: %s: %s", description, name, outcome)
    _take_turns(calls, timings, spec, clock, progress.track(range(spec.rounds), description, spec.rounds))
    return timings


def _session_seconds(warm_ms: Sequence[float], spec: "LatencySpec", clock: Clock) -> float:
    """What a first session of calls that take so long takes, about."""
    per_round = (2 if clock.runs_ahead else 1) * _per_round(spec) + _MOST_DISCARDED
    return min(_FIRST_ROUNDS, spec.rounds) * per_round * sum(warm_ms) / 1000


def _per_round(spec: "LatencySpec") -> int:
    return -(-spec.iterations // spec.rounds)


def _take_turns(
    calls: Mapping[str, Call], timings: Mapping[str, Timing], spec: "LatencySpec", clock: Clock, rounds: Iterable[int]
) -> None:
    """Time in turns those of `calls` that have a timing without a failure; the last of them was called last."""
    previous = next(reversed(list(timings)), None)
    for number in rounds:
        orders = balanced_orders([name for name in timings if timings[name].failure is None])
        for name in orders[number % len(orders)]:
            switched, previous = name != previous, name
            _guarded(
                timings[name],
                functools.partial(_one_round, calls[name], timings[name], _per_round(spec), clock, switched=switched),
            )


def balanced_orders(names: Sequence[str]) -> list[list[str]]:
    """Orders in which `names` take turns: a Williams design, each order followed by its reverse.

    Over all of them each name comes equally often at each place and equally often right after each other name, so
    that none is favoured. An order and its reverse cancel a machine's drift. There are as many orders as an even
    number of names, and twice as many as an odd number; one without names is empty.
    Source: Williams 1949, "Experimental designs balanced for the estimation of residual effects of treatments".
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(count)]  # 0, 1, -1, 2, -2, ...
    # The reverse of a zigzag over an even number is the zigzag that starts half way round.
    starts = range(max(1, count // 2 if count % 2 == 0 else count))
    orders = []
    for start in starts:
        order = [names[(start + step) % count] for step in zigzag]
        orders += [order, order[::-1]]
    return orders if count > 1 else orders[:1]


def _guarded(timing: Timing, work: Call) -> None:
    try:
        work()
    except Exception as error:  # an error of any type fails this variant, not the run
        timing.failure = explain_failure(error)
        timing.out_of_memory = is_out_of_memory(error)


def _warm_up(call: Call, timing: Timing, spec: "LatencySpec", clock: Clock) -> None:
    """Call until the running median is stable, at most `warmup_seconds` after the first call, which may compile."""
    started = clock.now()
    samples = [clock.time(call)]
    compiled = clock.now()
    while not (settled := _is_stable(samples)) and clock.now() - compiled < spec.warmup_seconds:
        samples.append(clock.time(call))
    timing.settled = settled
    timing.warmup_ms, timing.warmup_iterations = 1000 * (clock.now() - started), len(samples)
    timing.warm_ms = statistics.median(samples[-_WINDOW:])


def _is_stable(samples: list[float]) -> bool:
    if len(samples) < _FEWEST_WARMUP_CALLS:
        return False
    recent, before = (
        statistics.median(samples[-_WINDOW:]),
        statistics.median(samples[-2 * _WINDOW : -_WINDOW]),
    )
    return abs(recent - before) <= _STABLE * before


def _one_round(call: Call, timing: Timing, iterations: int, clock: Clock, *, switched: bool) -> None:
    # All compilation belongs to the warm-up: a call that would compile anew fails here instead of being timed.
    with torch.compiler.set_stance("fail_on_recompile"):
        if switched:
            timing.discarded_calls += _settle(call, clock)
        samples = [clock.time(call) for _ in range(iterations)]
        if clock.runs_ahead:
            timing.device_ms.append(clock.queued(call, iterations))
    timing.rounds_ms.append(samples)


def _settle(call: Call, clock: Clock) -> int:
    """Call until a call is not faster than the one before it; the number of calls, from 2 to `_MOST_DISCARDED`.

    Nothing that decides is kept as a sample, so the samples that follow are not chosen by how long they took; and a
    call is compared with its neighbour alone, so a machine that slows down meanwhile does not keep it waiting.
    """
    before, made = clock.time(call), 1
    while made < _MOST_DISCARDED:
        now = clock.time(call)
        made += 1
        if now >= (1 - _STABLE) * before:
            break
        before = now
    return made
