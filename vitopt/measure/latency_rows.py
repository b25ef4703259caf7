"""Latency of prepared variants, timed together, as the rows of their records."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch

from vitopt.data.images import ImageSet
from vitopt.data.pixels import random_pixels
from vitopt.measure.comparison import paired_speedup
from vitopt.measure.failures import explain_failure, is_out_of_memory
from vitopt.measure.latency import Timing, clock_for, time_interleaved
from vitopt.measure.latency_statistics import latency_summary
from vitopt.measure.runnable import Routes, Runnable, input_size
from vitopt.recipe import LatencySpec
from vitopt.records import FailedLatency, Latency

_MOST_BATCHES = 32  # of real images, kept on the device
_MOST_IMAGES = 512  # in smaller batches than that, so that single images are as varied as those of batches
# The 95th percentile of the calls over the 5th: on a quiet machine at most 1.45, with another process on its cores
# 1.75 to 34. Over the median it would miss a machine that was disturbed for more than half of the calls.
_UNSTEADY = 1.5
_FEWEST_FOR_SPREAD = 20


@dataclass(frozen=True)
class Rows:
    """What timing one variant gave, by batch size."""

    latency: tuple[Latency, ...]
    failures: tuple[FailedLatency, ...]

    @property
    def warnings(self) -> list[str]:
        """A sentence for each reason to trust a row less."""
        sentences = []
        for row in self.latency:
            if not row.settled:
                sentences.append(
                    f"batch {row.batch_size}: the warm-up ended before calls took a steady time "
                    f"({row.warmup_iterations} calls): give it more warmup_seconds"
                )
            # Calls that do not do the same work spread by themselves.
            if not row.by_mean and (spread := _spread(row.samples_ms)) > _UNSTEADY:
                sentences.append(
                    # In whole numbers, so that variants that were disturbed alike are told of together.
                    f"batch {row.batch_size}: the slowest calls took over {max(1.5, int(spread)):g} times as long as "
                    "the fastest (95th over 5th percentile), so something disturbed the machine"
                )
        return sentences


def _spread(samples_ms: Sequence[float]) -> float:
    """95th percentile over the 5th: spells of slowness and single slow calls alike; 1 for too few to tell."""
    if len(samples_ms) < _FEWEST_FOR_SPREAD:
        return 1.0
    fast, slow = np.percentile(samples_ms, [5, 95])
    return float(slow / fast)


def time_rows(
    runnables: Sequence[Runnable],
    spec: LatencySpec,
    baseline: str | None,
    images: ImageSet | None = None,
    so_far: Callable[[dict[str, Rows]], None] = lambda rows: None,
) -> dict[str, Rows]:
    """Time all against each other at every batch size that the spec has for them; name -> its rows.

    `so_far` gets, before the next batch size is begun, the rows that there are, and while variants warm up those of a
    few rounds of all that are warm, timed in one session.
    `images` are what they are called with where the spec asks for data, and where the work of one of them depends on
    the image, whose figures are then of means.
    Those of the others than the baseline tell their speed-up over it, where both could be timed.
    """
    names = [runnable.name for runnable in runnables]
    routed = {runnable.name for runnable in runnables if isinstance(runnable, Routes)}
    timings: dict[int, dict[str, Timing]] = {}
    for batch_size in spec.batch_sizes:
        if timings:
            so_far(_rows(names, routed, timings, baseline))
        asked = [runnable for runnable in runnables if spec.times(runnable.name, batch_size)]

        def tell(first: dict[str, Timing], batch_size: int = batch_size) -> None:
            so_far(_rows(names, routed, timings | {batch_size: first}, baseline))

        timings[batch_size] = _time_all(asked, batch_size, spec, images, tell)
    return _rows(names, routed, timings, baseline)


def _rows(
    names: Sequence[str], routed: Set[str], timings: Mapping[int, Mapping[str, Timing]], baseline: str | None
) -> dict[str, Rows]:
    """Rows of all names, those of `routed` by means, of timings by batch size and name."""
    rows: dict[str, list[Latency]] = {name: [] for name in names}
    failures: dict[str, list[FailedLatency]] = {name: [] for name in names}
    for batch_size, found in timings.items():
        whole = {name: timing for name, timing in found.items() if timing.failure is None}
        timed = {name: _row(batch_size, timing, name in routed) for name, timing in whole.items()}
        reference = timed.get(baseline or "")
        for name, timing in found.items():
            if timing.failure is not None:
                failures[name].append(FailedLatency(batch_size=batch_size, reason=timing.failure))
            elif reference is None or name == baseline:
                rows[name].append(timed[name])
            else:
                rows[name].append(_with_speedup(timed[name], reference))
    return {name: Rows(tuple(rows[name]), tuple(failures[name])) for name in names}


_Prepared = tuple[Runnable, list[torch.Tensor]]


def call_of(
    runnable: Runnable, batch_size: int, images: ImageSet | None = None, prepared: list[_Prepared] | None = None
) -> Callable[[], object]:
    """A call on this many random images, the same in every call, or on batches of `images` in turn.

    `prepared`: batches of others that were made before, which serve those that prepare images alike.
    """

    @functools.cache
    def batches() -> Iterator[torch.Tensor]:
        # Made by the first call, where a batch that does not fit is this row's failure and not the run's.
        if images is None:
            return itertools.repeat(random_pixels(batch_size, input_size(runnable)).to(runnable.device))
        for other, made in prepared or ():
            if other.device == runnable.device and other.preprocess == runnable.preprocess:
                return itertools.cycle(made)
        turn = itertools.cycle(range(len(images)))
        count = min(max(_MOST_BATCHES, _MOST_IMAGES // batch_size), -(-len(images) // batch_size))
        made = [_prepared(runnable, images, turn, batch_size) for _ in range(count)]
        if prepared is not None:
            prepared.append((runnable, made))
        return itertools.cycle(made)

    return lambda: runnable(next(batches()))


def _prepared(runnable: Runnable, images: ImageSet, turn: Iterator[int], batch_size: int) -> torch.Tensor:
    chosen = itertools.islice(turn, batch_size)
    return torch.stack([runnable.preprocess(images.image(index)) for index in chosen]).to(runnable.device)


def _time_all(
    runnables: Sequence[Runnable],
    batch_size: int,
    spec: LatencySpec,
    images: ImageSet | None,
    so_far: Callable[[dict[str, Timing]], None],
) -> dict[str, Timing]:
    if not runnables:
        return {}
    if spec.inputs == "random" and not any(isinstance(runnable, Routes) for runnable in runnables):
        images = None
    prepared: list[_Prepared] = []
    calls = {runnable.name: call_of(runnable, batch_size, images, prepared) for runnable in runnables}
    timings = time_interleaved(calls, spec, clock_for(runnables[0].device), f"latency at batch {batch_size}", so_far)
    calls.clear()  # and with them pixels that may be what did not fit
    prepared.clear()
    for runnable in runnables:
        timing = timings[runnable.name]
        if timing.out_of_memory:
            timing.failure = f"out of memory; {_largest_that_fits(runnable, batch_size // 2)}"
    return timings


def _largest_that_fits(runnable: Runnable, batch_size: int) -> str:
    """The batch halved until it fits, in words."""
    while batch_size >= 1:
        try:
            call_of(runnable, batch_size)()
        except Exception as error:
            if not is_out_of_memory(error):
                return f"at batch {batch_size}: {explain_failure(error)}"
            batch_size //= 2
        else:
            return f"batch {batch_size} fits"
    return "not even one image fits"


def _row(batch_size: int, timing: Timing, by_mean: bool) -> Latency:
    samples = timing.samples_ms
    summary = latency_summary(samples)
    device = latency_summary(timing.device_ms) if timing.device_ms else None
    return Latency(
        batch_size=batch_size,
        iterations=summary.count,
        rounds=len(timing.rounds_ms),
        mean_ms=summary.mean_ms,
        std_ms=summary.std_ms,
        min_ms=summary.min_ms,
        p50_ms=summary.p50_ms,
        p95_ms=summary.p95_ms,
        p99_ms=summary.p99_ms,
        p50_ci95_ms=summary.p50_ci95_ms,
        p95_ci95_ms=summary.p95_ci95_ms,
        p99_ci95_ms=summary.p99_ci95_ms,
        device_p50_ms=device.p50_ms if device else None,
        by_mean=by_mean,
        images_per_second=1000 * batch_size / (summary.mean_ms if by_mean else summary.p50_ms),
        warmup_ms=timing.warmup_ms,
        warmup_iterations=timing.warmup_iterations,
        settled=timing.settled,
        discarded_calls=timing.discarded_calls,
        samples_ms=tuple(round(sample, 4) for sample in samples),
        device_samples_ms=tuple(round(sample, 4) for sample in timing.device_ms) or None,
    )


def _with_speedup(row: Latency, reference: Latency) -> Latency:
    speedup = paired_speedup(reference, row)
    interval = (speedup.interval.low, speedup.interval.high) if speedup.interval else None
    return row.model_copy(update={"speedup_vs_baseline": speedup.ratio, "speedup_ci95": interval})
