"""Timing on a machine that we control: a clock whose calls take as long as the test says."""

import functools
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from vitopt.measure.latency import Clock, Timing, balanced_orders, clock_for, time_interleaved
from vitopt.measure.latency_statistics import speedup_interval
from vitopt.recipe import LatencySpec


class Machine(Clock):
    """A clock that only calls move forward; `slowdown` of the time so far stretches them.

    `after_switch` stretches the first calls after a call of another name.
    """

    def __init__(self, slowdown: Callable[[float], float] = lambda seconds: 1.0, after_switch: tuple[float, ...] = ()):
        self.seconds = 0.0
        self.slowdown = slowdown
        self.after_switch = after_switch
        self.log: list[str] = []

    def now(self) -> float:
        return self.seconds

    def call(self, name: str, cost_ms: Callable[[int], float]) -> Callable[[], None]:
        """A call that takes `cost_ms` of its own number, counted from 0."""

        def run() -> None:
            number = self.log.count(name)
            since = len(list(itertools.takewhile(lambda other: other == name, reversed(self.log))))
            stretch = self.after_switch[since] if since < len(self.after_switch) else 1
            self.log.append(name)
            self.seconds += cost_ms(number) / 1000 * self.slowdown(self.seconds) * stretch

        return run


def test_warm_up_is_in_no_sample_and_reported_apart() -> None:
    machine = Machine()
    slow_start = machine.call("a", lambda number: 500 if number < 3 else 10)
    spec = LatencySpec(iterations=20, rounds=4, warmup_seconds=60)
    timing = time_interleaved({"a": slow_start}, spec, machine)["a"]
    assert timing.samples_ms == pytest.approx([10] * 20)
    assert timing.warmup_iterations == len(machine.log) - 20
    assert timing.warmup_ms == pytest.approx(3 * 500 + 10 * (timing.warmup_iterations - 3))
    assert timing.failure is None and timing.device_ms == []


def test_warm_up_ends_when_the_median_stands_still() -> None:
    machine = Machine()
    timing = time_interleaved(
        {"a": machine.call("a", lambda number: 10)}, LatencySpec(iterations=1, rounds=1, warmup_seconds=60), machine
    )["a"]
    assert timing.warmup_iterations == 10

    falling = Machine()
    # 5 % faster with every call for 30 calls: not stable before
    call = falling.call("a", lambda number: 100 * 0.95 ** min(number, 30))
    timing = time_interleaved({"a": call}, LatencySpec(iterations=5, rounds=1, warmup_seconds=60), falling)["a"]
    assert 30 < timing.warmup_iterations < 45
    assert timing.samples_ms == pytest.approx([100 * 0.95**30] * 5)


def test_warm_up_is_bounded_in_time() -> None:
    machine = Machine()
    never_stable = machine.call("a", lambda number: 100 * 1.1 ** (number % 40))
    spec = LatencySpec(iterations=1, rounds=1, warmup_seconds=2)
    timing = time_interleaved({"a": never_stable}, spec, machine)["a"]
    assert 2000 <= timing.warmup_ms < 2000 + 100 * 1.1**40
    assert timing.warmup_iterations == 12  # 100 + 110 + 121 + ... reaches two seconds here


def test_a_long_compilation_takes_nothing_from_the_warm_up() -> None:
    machine = Machine()
    compiling = machine.call("a", lambda number: 90_000 if number == 0 else 10)
    spec = LatencySpec(iterations=1, rounds=1, warmup_seconds=20)
    timing = time_interleaved({"a": compiling}, spec, machine)["a"]
    assert timing.warmup_iterations == 10
    assert timing.warmup_ms == pytest.approx(90_000 + 9 * 10)


def test_without_time_for_warm_up_one_call_is_made_all_the_same() -> None:
    machine = Machine()
    spec = LatencySpec(iterations=2, rounds=1, warmup_seconds=0)
    timing = time_interleaved({"a": machine.call("a", lambda number: 10 + number)}, spec, machine)["a"]
    assert timing.warmup_iterations == 1 and timing.samples_ms == pytest.approx([11, 12])


@pytest.mark.parametrize("warmup_seconds, settled", [(0, False), (60, True)])
def test_whether_the_warm_up_settled_is_kept(warmup_seconds: float, settled: bool) -> None:
    machine = Machine()
    spec = LatencySpec(iterations=1, rounds=1, warmup_seconds=warmup_seconds)
    timing = time_interleaved({"a": machine.call("a", lambda number: 10)}, spec, machine)["a"]
    assert timing.settled is settled


def test_variants_take_turns_in_balanced_order_with_two_calls_to_settle_in() -> None:
    machine = Machine()
    calls = {name: machine.call(name, lambda number: 1) for name in "abc"}
    timings = time_interleaved(calls, LatencySpec(iterations=6, rounds=6, warmup_seconds=0), machine)
    # Forwards and backwards: where the order turns, the same variant goes on and needs not settle.
    rounds = ["aaabbbccc", "cbbbaaa", "bbbcccaaa", "acccbbb", "cccaaabbb", "baaaccc"]
    assert "".join(machine.log) == "abc" + "".join(rounds)
    assert all(len(timing.samples_ms) == 6 for timing in timings.values())
    assert sum(timing.discarded_calls for timing in timings.values()) == len(machine.log) - 3 - 18


def test_a_switch_is_in_no_sample() -> None:
    machine = Machine(after_switch=(1.37, 1.10, 1.04))
    calls = {name: machine.call(name, lambda number, cost=cost: cost) for name, cost in (("a", 10), ("b", 4))}
    timings = time_interleaved(calls, LatencySpec(iterations=40, rounds=4, warmup_seconds=1), machine)
    assert timings["a"].samples_ms == pytest.approx([10] * 40)
    assert timings["b"].samples_ms == pytest.approx([4] * 40)
    # Orders ab ba ab ba after the warm-up of b: three switches to a, two to b; 1.37, 1.10, 1.04, 1, 1 to settle.
    assert (timings["a"].discarded_calls, timings["b"].discarded_calls) == (15, 10)


def test_calls_that_never_settle_are_discarded_five_at_a_time() -> None:
    machine = Machine(after_switch=tuple(0.9**number for number in range(30)))
    calls = {name: machine.call(name, lambda number: 10) for name in "ab"}
    timings = time_interleaved(calls, LatencySpec(iterations=4, rounds=2, warmup_seconds=0), machine)
    assert [timing.discarded_calls for timing in timings.values()] == [10, 5]  # switches: a, b, a
    assert [len(timing.samples_ms) for timing in timings.values()] == [4, 4]


def test_a_variant_alone_is_never_switched_to() -> None:
    machine = Machine(after_switch=(1.5,))
    timing = time_interleaved(
        {"a": machine.call("a", lambda number: 1)}, LatencySpec(iterations=12, rounds=4, warmup_seconds=0), machine
    )["a"]
    assert timing.discarded_calls == 0 and len(machine.log) == 1 + 12


def test_discarding_does_not_choose_the_samples_that_follow() -> None:
    noise = np.random.default_rng(0).lognormal(0, 0.2, 100_000)
    machine = Machine()
    calls = {
        name: machine.call(name, lambda number, start=start: noise[start + number])
        for start, name in ((0, "a"), (50_000, "b"))
    }
    timings = time_interleaved(calls, LatencySpec(iterations=2_000, rounds=1_000, warmup_seconds=0), machine)
    for timing in timings.values():
        assert np.median(timing.samples_ms) == pytest.approx(1, rel=0.02)
        first = [samples[0] for samples in timing.rounds_ms]
        assert np.median(first) == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("count", range(1, 10))
def test_each_place_and_each_predecessor_is_equally_frequent(count: int) -> None:
    names = list(range(count))
    orders = balanced_orders(names)
    assert len(orders) == (1 if count == 1 else count if count % 2 == 0 else 2 * count)
    places = Counter((place, name) for order in orders for place, name in enumerate(order))
    assert set(places) == set(itertools.product(names, names)) and len(set(places.values())) == 1
    followed = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(followed) == set(itertools.permutations(names, 2)) and len(set(followed.values())) <= 1
    assert all(backward == forward[::-1] for forward, backward in zip(orders[::2], orders[1::2], strict=False))


def test_no_names_have_no_order_to_take() -> None:
    assert balanced_orders([]) == [[]]


@pytest.mark.parametrize(("iterations", "rounds", "per_round"), [(100, 10, 10), (10, 4, 3), (5, 5, 1)])
def test_rounds_share_the_iterations_and_none_gets_fewer(iterations: int, rounds: int, per_round: int) -> None:
    machine = Machine()
    spec = LatencySpec(iterations=iterations, rounds=rounds, warmup_seconds=0)
    timing = time_interleaved({"a": machine.call("a", lambda number: 1)}, spec, machine)["a"]
    assert [len(samples) for samples in timing.rounds_ms] == [per_round] * rounds
    assert len(timing.samples_ms) >= iterations


def drift(to: float, over_seconds: float) -> Callable[[float], float]:
    return lambda seconds: 1 + (to - 1) * seconds / over_seconds


def test_a_machine_that_slows_down_twofold_keeps_the_ratio() -> None:
    # 10 rounds of 10 calls of 10 ms and of 4 ms take 1.4 s and, slowing down, somewhat more
    machine = Machine(drift(to=2, over_seconds=2.1))
    calls = {"base": machine.call("base", lambda number: 10), "fast": machine.call("fast", lambda number: 4)}
    spec = LatencySpec(iterations=100, rounds=10, warmup_seconds=0)
    timings = time_interleaved(calls, spec, machine)
    base = timings["base"].rounds_ms
    assert np.median(base[-1]) / np.median(base[0]) > 1.8
    speedup = speedup_interval(base, timings["fast"].rounds_ms)
    assert speedup.ratio == pytest.approx(2.5, rel=0.02)
    assert speedup.interval is not None and speedup.interval.low < 2.5 < speedup.interval.high

    # One after the other, the same machine would flatter the first.
    one = Machine(drift(to=2, over_seconds=2.1))
    first, second = (
        time_interleaved({name: one.call(name, lambda number, cost=cost: cost)}, spec, one)[name]
        for name, cost in (("base", 10), ("fast", 4))
    )
    assert abs(np.median(first.samples_ms) / np.median(second.samples_ms) / 2.5 - 1) > 0.1


def test_a_drifting_machine_favours_none_of_many() -> None:
    costs = {"a": 10.0, "b": 8.0, "c": 5.0, "d": 4.0, "e": 2.0}
    machine = Machine(drift(to=2, over_seconds=5))
    calls = {name: machine.call(name, lambda number, cost=cost: cost) for name, cost in costs.items()}
    timings = time_interleaved(calls, LatencySpec(iterations=100, rounds=10, warmup_seconds=0), machine)
    for name, cost in costs.items():
        found = speedup_interval(timings["a"].rounds_ms, timings[name].rounds_ms)
        assert found.ratio == pytest.approx(10 / cost, rel=0.02)


def test_a_machine_with_slow_spells_keeps_the_ratio() -> None:
    machine = Machine(lambda seconds: 3 if int(seconds * 2) % 3 == 0 else 1)
    calls = {"base": machine.call("base", lambda number: 12), "fast": machine.call("fast", lambda number: 8)}
    timings = time_interleaved(calls, LatencySpec(iterations=400, rounds=100, warmup_seconds=0), machine)
    assert speedup_interval(*(timings[name].rounds_ms for name in ("base", "fast"))).ratio == pytest.approx(
        1.5, rel=0.05
    )


def failing(machine: Machine, name: str, at: int) -> Callable[[], None]:
    call = machine.call(name, lambda number: 1)

    def run() -> None:
        if machine.log.count(name) == at:
            raise RuntimeError("no kernel\nfor   this shape")
        call()

    return run


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_failing_call_leaves_the_rounds_and_the_others_go_on(at: int) -> None:
    machine = Machine()
    calls = {
        "a": machine.call("a", lambda number: 1),
        "bad": failing(machine, "bad", at),
        "b": machine.call("b", lambda number: 2),
    }
    timings = time_interleaved(calls, LatencySpec(iterations=12, rounds=4, warmup_seconds=0), machine)
    assert timings["bad"].failure == "RuntimeError: no kernel for this shape"
    assert machine.log.count("bad") == at  # never called again
    for name, cost in (("a", 1), ("b", 2)):
        assert timings[name].failure is None
        assert timings[name].samples_ms == pytest.approx([cost] * 12)


def test_an_interruption_is_no_failure_of_a_variant() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_interleaved({"a": interrupted}, LatencySpec(iterations=1, rounds=1), Machine())


@pytest.mark.parametrize(
    ("error", "full"),
    [(torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True), (RuntimeError("no kernel"), False)],
)
def test_full_memory_is_told_apart_from_other_failures(error: Exception, full: bool) -> None:
    def run() -> None:
        raise error

    timing = time_interleaved({"a": run}, LatencySpec(iterations=1, rounds=1), Machine())["a"]
    assert timing.failure is not None and timing.out_of_memory is full


@pytest.fixture
def compiled() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """A function that is compiled for every shape, by a compiler that changes nothing."""
    torch._dynamo.reset()
    yield torch.compile(lambda pixels: 2 * pixels, backend="eager", dynamic=False)
    torch._dynamo.reset()


def test_a_call_that_would_compile_anew_while_it_is_timed_fails(
    compiled: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    machine = Machine()
    steady, calls = machine.call("steady", lambda number: 1), [0]

    def changing() -> None:
        compiled(torch.ones(2 if calls[0] < 3 else 3))
        calls[0] += 1

    spec = LatencySpec(iterations=4, rounds=2, warmup_seconds=0)
    timings = time_interleaved({"changing": changing, "steady": steady}, spec, machine)
    failure = timings["changing"].failure
    assert failure is not None and failure.startswith("RuntimeError: Detected recompile")
    assert "size mismatch at index 0. expected 2, actual 3" in failure and "\n" not in failure
    assert not timings["changing"].out_of_memory
    assert calls[0] == 3  # one to warm up and the first round
    assert timings["steady"].failure is None and len(timings["steady"].samples_ms) == 4


def test_compilation_in_the_warm_up_is_welcome(compiled: Callable[[torch.Tensor], torch.Tensor]) -> None:
    spec = LatencySpec(iterations=4, rounds=2, warmup_seconds=0)
    for size in (2, 3):  # after the rounds, new shapes are compiled as before
        call = functools.partial(compiled, torch.ones(size))
        timing = time_interleaved({"a": call}, spec, clock_for(torch.device("cpu")))["a"]
        assert timing.failure is None and len(timing.samples_ms) == 4


def test_each_variant_is_told_of_as_soon_as_it_is_warm(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    calls = {"a": machine.call("a", lambda number: 2.5), "bad": failing(machine, "bad", 0)}
    with caplog.at_level(logging.INFO):
        time_interleaved(calls, LatencySpec(iterations=1, rounds=1), machine, "latency at batch 8")
    fast, bad = caplog.messages
    assert "batch 8: a: about 2.5 ms" in fast and "batch 8: bad: RuntimeError: no kernel" in bad


def compiling(machine: Machine, name: str, seconds: float, cost_ms: float = 10) -> Callable[[], None]:
    """A call whose first one takes so many seconds."""
    return machine.call(name, lambda number: 1000 * seconds if number == 0 else cost_ms)


def test_what_is_warm_is_timed_in_turns_before_a_slow_warm_up_is_over() -> None:
    machine, told = Machine(), list[dict[str, Timing]]()

    def ended() -> None:
        raise KeyboardInterrupt

    calls = {"a": compiling(machine, "a", 20), "b": compiling(machine, "b", 30, 5), "autotuned": ended}
    spec = LatencySpec(iterations=100, rounds=10, warmup_seconds=5)
    with pytest.raises(KeyboardInterrupt):
        time_interleaved(calls, spec, machine, so_far=told.append)
    last = told[-1]
    assert list(last) == ["a", "b"]
    assert [len(samples) for samples in last["a"].rounds_ms] == [10] * 4  # of the ten calls of a round
    rounds = [last[name].rounds_ms for name in ("a", "b")]
    assert speedup_interval(*rounds).ratio == pytest.approx(2)
    assert last["a"].settled and last["a"].warmup_ms > 20_000


def test_first_sessions_take_no_more_than_a_tenth_of_the_warm_ups_and_are_in_no_sample() -> None:
    machine, told_at = Machine(), list[float]()
    calls = {name: compiling(machine, name, 2, 40) for name in "abcdefgh"}
    spec = LatencySpec(iterations=100, rounds=10, warmup_seconds=5)
    timings = time_interleaved(calls, spec, machine, so_far=lambda first: told_at.append(machine.seconds))
    assert all(len(timing.samples_ms) == 100 for timing in timings.values())
    calls_made = sum(timing.warmup_iterations + timing.discarded_calls + 100 for timing in timings.values())
    first_sessions = (len(machine.log) - calls_made) * 0.040
    assert told_at == [] and first_sessions == pytest.approx(0)  # 4 rounds of 40 ms are dear beside 2 s

    machine = Machine()
    calls = {name: compiling(machine, name, 60, 40) for name in "abcdefgh"}
    timings = time_interleaved(calls, spec, machine, so_far=lambda first: told_at.append(machine.seconds))
    calls_made = sum(timing.warmup_iterations + timing.discarded_calls + 100 for timing in timings.values())
    first_sessions = (len(machine.log) - calls_made) * 0.040
    assert len(told_at) >= 3 and 0 < first_sessions <= 0.1 * 8 * 60


def test_telling_counts_as_time_that_first_sessions_take() -> None:
    machine, told = Machine(), list[list[str]]()

    def slow(first: dict[str, Timing]) -> None:
        told.append(list(first))
        machine.seconds += 100  # records with much in them

    calls = {name: compiling(machine, name, 60, 1) for name in "abcdefgh"}
    time_interleaved(calls, LatencySpec(iterations=10, rounds=5, warmup_seconds=1), machine, so_far=slow)
    assert told == [["a"]]


def test_what_fails_in_a_first_session_is_timed_again_all_the_same() -> None:
    machine, told = Machine(), list[dict[str, Timing]]()
    steady = compiling(machine, "a", 60)
    calls_made = itertools.count()

    def once() -> None:
        steady()
        if next(calls_made) == 12:
            raise RuntimeError("no room beside the others")

    calls = {"a": once, "b": compiling(machine, "b", 60)}
    timings = time_interleaved(calls, LatencySpec(iterations=20, rounds=4), machine, so_far=told.append)
    assert told[0]["a"].failure is not None
    assert timings["a"].failure is None and len(timings["a"].samples_ms) == 20


def test_samples_are_in_order_of_time() -> None:
    assert Timing(rounds_ms=[[3.0, 1.0], [2.0]]).samples_ms == [3.0, 1.0, 2.0]


def test_the_clock_of_the_cpu_is_the_wall() -> None:
    clock = clock_for(torch.device("cpu"))
    assert type(clock) is Clock

    def spin() -> None:
        until = time.perf_counter() + 0.02
        while time.perf_counter() < until:
            pass

    started = time.perf_counter()
    assert 20 <= clock.time(spin) <= 1000 * (time.perf_counter() - started)


def test_a_queue_is_timed_as_a_whole_and_a_device_kept_busy_for_as_long_as_asked() -> None:
    machine = Machine()
    call = machine.call("a", lambda number: 10 if number % 2 else 30)
    assert machine.queued(call, 6) == pytest.approx(20)
    calls, seconds = machine.sustained(machine.call("b", lambda number: 400), 5)
    assert (calls, seconds) == (13, pytest.approx(5.2))
    assert machine.sustained(machine.call("c", lambda number: 7000), 5) == (1, pytest.approx(7))


class Event:
    """As much of a CUDA event as a clock uses; made when first recorded, as the real one."""

    def __init__(self, cuda: "Cuda"):
        self.cuda, self.recorded_at = cuda, None

    def record(self, stream: str) -> None:
        if self.recorded_at is None:
            self.cuda.log.append("event made")
        self.recorded_at = self.cuda.now
        self.cuda.log.append(f"record on {stream}")

    def elapsed_time(self, later: "Event") -> float:
        return later.recorded_at - self.recorded_at


class Cuda:
    """torch.cuda of which only device 1 is used, whose calls take 3 ms each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.log = 0.0, list[str]()
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.log.append(f"wait for {device}"))

    def call(self) -> None:
        self.now += 3
        self.log.append("call")


def test_events_of_a_gpu_are_made_beforehand_and_recorded_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    clock = clock_for(torch.device("cuda", 1))
    assert cuda.log.count("event made") == 2
    cuda.log.clear()
    assert clock.queued(cuda.call, 4) == 3
    wait, record = "wait for cuda:1", "record on stream of cuda:1"
    assert cuda.log == [wait, record, *4 * ["call"], record, wait]
    cuda.log.clear()
    clock.time(cuda.call)
    assert cuda.log == [wait, "call", wait]  # no event within what a caller waits


def test_a_device_that_runs_ahead_is_also_timed_by_the_queue_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    spec = LatencySpec(iterations=8, rounds=4, warmup_seconds=0)
    timing = time_interleaved({"a": cuda.call}, spec, clock_for(torch.device("cuda", 1)))["a"]
    assert timing.device_ms == [3, 3, 3, 3] and len(timing.samples_ms) == 8
