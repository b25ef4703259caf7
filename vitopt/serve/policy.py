"""Which batch to run next and whom to refuse: arithmetic on times that were measured, apart from all plumbing."""

import math
from collections.abc import Mapping, Sequence

import numpy as np


class BatchTimes:
    """Seconds that a batch of each size takes: measured at the start, and followed as the machine gets busier."""

    def __init__(self, seconds: Mapping[int, float], follow: float = 0.1) -> None:
        self._seconds = dict(sorted(seconds.items()))
        self._follow = follow

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes that were built, ascending."""
        return tuple(self._seconds)

    def __getitem__(self, size: int) -> float:
        return self._seconds[size]

    def observe(self, images: int, seconds: float) -> None:
        """A batch of so many took so long; exponential moving average, which moves all sizes by the same factor.

        Sizes that are rarely run would else keep times of a machine that had nothing else to do.
        """
        # Between sizes, as a batch that nobody filled up is, time is taken to grow evenly.
        expected = float(np.interp(images, list(self._seconds), list(self._seconds.values())))
        factor = (seconds / expected) ** self._follow
        self._seconds = {known: time * factor for known, time in self._seconds.items()}

    @property
    def best_rate(self) -> float:
        """Images per second of the size that gives most."""
        return max(size / seconds for size, seconds in self._seconds.items())


class Delay:
    """How many times longer than expected all but one in a hundred requests take, followed as they end.

    An expectation is a mean: who lets in what is expected just in time answers half of it late. Each request that takes
    longer moves the factor up, each other one a ninety-ninth of that down, so it rests where 1 % take longer
    (Robbins and Monro 1951, "A stochastic approximation method").
    """

    def __init__(self, follow: float = 0.05) -> None:
        self.factor, self._follow = 1.0, follow

    def observe(self, expected_s: float, seconds: float) -> None:
        """A request that was expected to take `expected_s` took `seconds`."""
        share = 0.99 if seconds > expected_s * self.factor else -0.01
        self.factor = min(max(self.factor * math.exp(self._follow * share), 1.0), 10.0)


def batch_size(ages: Sequence[float], times: BatchTimes, target_s: float | None) -> int:
    """Size of the batch to run now, for requests that wait since `ages` seconds, oldest first.

    The model never waits while there is work: what comes during a batch is the next one. Of the sizes that answer the
    oldest request within `target_s` the one that serves most images per second is taken; if none does, of all.
    """
    waiting = len(ages)
    in_time = [size for size in times.sizes if target_s is None or ages[0] + times[size] <= target_s]
    return max(in_time or times.sizes, key=lambda size: (min(waiting, size) / times[size], -size))


def expected_wait(ahead: int, running_s: float, times: BatchTimes, decode_s: float = 0.0, decoders: int = 1) -> float:
    """Seconds until a new request is answered: the rest of the running batch, those `ahead`, its own image and batch.

    Those ahead go at the rate of what is slower, the model or so many `decoders` that take `decode_s` for an image.
    """
    each = max(1 / times.best_rate, decode_s / decoders)
    return max(running_s, 0.0) + ahead * each + decode_s + times[times.sizes[0]]


def retry_after(wait_s: float, target_s: float | None) -> int:
    """Whole seconds after which a refused request may find room, at least 1 (HTTP's Retry-After)."""
    return max(1, math.ceil(wait_s - (target_s or 0.0)))
