"""Confidence intervals of accuracies, of their change between two models, and of ratios of means.

Accuracies, changes and rates are proportions, where 1 is all images. Limits are at 95 % unless told otherwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

_RATIO_RESAMPLES = 2000
_RATIO_WEIGHTS_AT_ONCE = 4_000_000  # weights of images held at a time


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both limits included."""

    low: float
    high: float


def wilson_interval(successes: float, trials: float, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion, such as top-1 accuracy; counts need not be whole.

    Raises ValueError for zero trials, or for successes outside 0..trials.
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if trials < 1:
        raise ValueError(f"an interval needs at least one trial, got {trials}")
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie between 0 and the {trials} trials, got {successes}")
    z = _normal_quantile(confidence)
    proportion = successes / trials
    shrink = 1 + z**2 / trials
    centre = (proportion + z**2 / (2 * trials)) / shrink
    reach = z * math.sqrt(proportion * (1 - proportion) / trials + z**2 / (4 * trials**2)) / shrink
    # At 0 and at all successes a limit is exactly 0 or 1, which rounding misses by 1e-17.
    low = 0.0 if successes == 0 else centre - reach
    high = 1.0 if successes == trials else centre + reach
    return Interval(low, high)


def paired_delta_interval(
    both_right: float, only_baseline: float, only_variant: float, both_wrong: float, confidence: float = 0.95
) -> Interval:
    """Score interval of the accuracy of the variant minus that of the baseline, on the same images.

    The arguments count images, not always whole, in the order of the fields of `PairedCounts`. The limits are
    proportions from -1 to 1. Zero is outside exactly when McNemar's score test rejects.
    Raises ValueError for a negative count, or when there is no image.
    Source: Tango 1998, "Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design".
    """
    counts = (both_right, only_baseline, only_variant, both_wrong)
    if min(counts) < 0:
        raise ValueError(f"counts of images cannot be negative, got {counts}")
    images = sum(counts)
    if images == 0:
        raise ValueError("an interval needs at least one image, got none")
    z = _normal_quantile(confidence)
    gained = only_variant - only_baseline

    def compatible(delta: float) -> bool:
        variance = paired_score_variance(only_baseline / images, only_variant / images, delta)
        # Squared, as the variance is 0 where delta is -1 or 1.
        return (gained / images - delta) ** 2 <= z**2 * variance / images

    estimate = gained / images
    return Interval(bisect(compatible, estimate, -1.0), bisect(compatible, estimate, 1.0))


def paired_score_variance(only_baseline: float, only_variant: float, delta: float) -> float:
    """Variance, per image, of the change of accuracy if its true value is `delta`.

    The first two are shares of images, 0 to 1, on which one of the two is right alone.
    Source: as of `paired_delta_interval`.
    """
    # The rate of only_baseline most likely under this delta is the larger root of
    # 2 r^2 + linear r + constant = 0; the rate of only_variant is then r + delta.
    linear = (2 - only_variant + only_baseline) * delta - only_baseline - only_variant
    constant = -only_baseline * delta * (1 - delta)
    rate = (math.sqrt(max(0.0, linear**2 - 8 * constant)) - linear) / 4
    return 2 * rate + delta * (1 - delta)


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
    steps = max(1, _RATIO_WEIGHTS_AT_ONCE // images)
    counts = (min(steps, _RATIO_RESAMPLES - done) for done in range(0, _RATIO_RESAMPLES, steps))
    sums = np.concatenate([rng.multinomial(images, even, count) @ values for count in counts])
    # Where all images of a sample have a denominator of zero there is no ratio to count.
    ratios = sums[:, 0][sums[:, 1] > 0] / sums[:, 1][sums[:, 1] > 0]
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def bisect(holds: Callable[[float], bool], start: float, stop: float) -> float:
    """Where `holds`, true at `start`, turns false on the way to `stop`; `stop` where it never does."""
    if holds(stop):
        return stop
    for _ in range(60):
        middle = (start + stop) / 2
        if holds(middle):
            start = middle
        else:
            stop = middle
    return start


def _normal_quantile(confidence: float) -> float:
    """Standard normal quantile that leaves (1 - confidence) / 2 in the upper tail."""
    check_confidence(confidence)
    return NormalDist().inv_cdf((1 + confidence) / 2)


def check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence must lie between 0 and 1, got {confidence}")
