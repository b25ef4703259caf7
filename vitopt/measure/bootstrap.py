"""Bootstrap intervals, for statistics whose distribution is not known."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitopt.measure.intervals import Interval

FEWEST = 30  # values, under which no resampling can tell the tail


def positive_mean_interval(values: ArrayLike, resamples: int | None = None, seed: int = 0) -> Interval | None:
    """95 % interval of the mean of values (values,) that are zero or positive and have a heavy upper tail, such as KL.

    A studentised bootstrap on the scale of logarithms: of percentile, BCa and studentised bootstraps it missed
    the true mean least often above its upper limit in simulations of log-normal and gamma values. None under 30
    values. Where all values are equal, both limits are that value.
    Raises ValueError for values that are negative, not finite, or no flat array.
    Source: Davison and Hinkley 1997, "Bootstrap methods and their application", section 5.2.
    """
    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or not (np.isfinite(sample) & (sample >= 0)).all():
        raise ValueError("expected a flat array of finite values that are not negative")
    if len(sample) < FEWEST:
        return None
    mean, spread = float(sample.mean()), float(sample.std())
    if spread == 0:
        return Interval(mean, mean)
    if resamples is None:  # fewer of many values, whose interval is nearly normal: seconds for 50,000
        resamples = max(500, min(2_000, 20_000_000 // len(sample)))
    random = np.random.default_rng(seed)
    drawn = (sample[random.integers(len(sample), size=len(sample))] for _ in range(resamples))
    moments = np.array([(resample.mean(), resample.std()) for resample in drawn])
    means, spreads = moments[(moments > 0).all(axis=1)].T
    if len(means) < 0.99 * resamples:
        return None  # fewer than about five values are not zero: too few to estimate their spread
    pivots = np.log(means / mean) * means / spreads
    low, high = np.quantile(pivots, [0.975, 0.025])
    return Interval(mean * math.exp(-low * spread / mean), mean * math.exp(-high * spread / mean))


def resampled_images(
    images: int, groups: Sequence[str] | None = None, resamples: int = 500, seed: int = 0
) -> Iterator[NDArray[np.intp]]:
    """Indices of so many images drawn with replacement, `resamples` times; of whole groups where they are named.

    The same arguments draw the same images, so what two models give on them is paired.
    """
    random = np.random.default_rng(seed)
    if groups is None:
        for _ in range(resamples):
            yield random.integers(images, size=images)
        return
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(group_of == group) for group in range(group_of.max() + 1)]
    for _ in range(resamples):
        yield np.concatenate([members[group] for group in random.integers(len(members), size=len(members))])


def percentile_interval(resampled: ArrayLike) -> Interval | None:
    """The middle 95 % of what a statistic was on resampled images; None where it never differed.

    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 13.
    """
    low, high = np.quantile(np.asarray(resampled, np.float64), [0.025, 0.975])
    return None if low == high else Interval(float(low), float(high))
