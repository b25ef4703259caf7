"""The ratio of two means over the same images, with its interval."""

import numpy as np
from numpy.typing import ArrayLike

from vitopt.measure.statistics import Interval

_RESAMPLES = 2000
_AT_ONCE = 4_000_000  # weights of images held at a time


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike, confidence: float = 0.95) -> Interval:
    """Interval of mean(numerators) / mean(denominators); both arrays are (images,) of values not below zero.

    Images are drawn anew with replacement, both values of an image together, always in the same way; percentiles of
    the ratios are the limits. `scripts/claims_coverage.py` simulates how often they miss: on 100 images with a heavy
    tail more often than 95 % says.
    Raises ValueError for arrays that are empty, negative or of different lengths, and for denominators all zero.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    values = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1)
    if values.ndim != 2 or not len(values) or values.min() < 0:
        raise ValueError("a ratio of means needs two flat arrays of values not below zero")
    if not values[:, 1].any():
        raise ValueError("a ratio of means needs denominators that are not all zero")
    images = len(values)
    rng = np.random.default_rng(0)
    even = np.full(images, 1 / images)
    steps = max(1, _AT_ONCE // images)
    sums = np.concatenate(
        [rng.multinomial(images, even, min(steps, _RESAMPLES - done)) @ values for done in range(0, _RESAMPLES, steps)]
    )
    # Where all images of a sample have a denominator of zero there is no ratio to count.
    ratios = sums[:, 0][sums[:, 1] > 0] / sums[:, 1][sums[:, 1] > 0]
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
