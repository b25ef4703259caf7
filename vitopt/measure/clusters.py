"""Intervals and p-values for images in groups whose images are alike: frames of a video, photos of one animal.

Such images say less than so many independent ones. How much less is estimated from how the groups differ: the
*effective share* of the images, by which the counts are multiplied before they go into the intervals for independent
images (Rao and Scott 1992, "A simple method for the analysis of clustered binary data"; for paired proportions as in
Obuchowski 1998, "On the comparison of correlated proportions for clustered data").
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from vitopt.measure.intervals import Interval, paired_delta_interval, wilson_interval
from vitopt.measure.logit_statistics import kl_divergences
from vitopt.measure.paired import paired_counts
from vitopt.measure.power import smallest_visible_loss
from vitopt.measure.predictions import Predictions
from vitopt.measure.verdict import accuracy_verdict
from vitopt.records import VersusBaseline


def effective_share(values: ArrayLike, groups: Sequence[str], confidence: float = 0.95) -> float:
    """Independent images that would show the mean of `values` (images,) as well as these do, over the images.

    Above 0, at most 1. It is the variance of the mean if all images were independent over its variance between
    groups, times (z / t)² for the groups being few (Korn and Graubard 1998, "Confidence intervals for proportions
    with small expected number of positive counts"); t has the degrees of freedom that the spread of the groups'
    own parts leaves (Satterthwaite 1946). It is never below what remains if all images of a group were the same.
    Raises ValueError for values and groups of different lengths, or none.
    """
    numbers, sizes, parts = _by_group(values, groups)
    images = len(numbers)
    least = images / float(np.sum(sizes**2))
    variance, freedom = _variance_between(sizes, parts)
    if variance == 0:
        return least
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    t = special.stdtrit(freedom, (1 + confidence) / 2)
    return max(least, min(1.0, float(numbers.var()) / images / variance) * (z / t) ** 2)


def proportion_interval(right: ArrayLike, groups: Sequence[str] | None) -> Interval:
    """Wilson interval of the share of images that are `right`, bool (images,); None: all images are independent."""
    values = np.asarray(right, np.float64)
    images = _effective_images(values, groups)
    return wilson_interval(float(values.sum()) * images / len(values), images)


def delta_interval(baseline_correct: ArrayLike, variant_correct: ArrayLike, groups: Sequence[str]) -> Interval:
    """Tango's interval of the accuracy of the variant minus that of the baseline; both are bool (images,)."""
    counts = paired_counts(baseline_correct, variant_correct)
    change = np.asarray(variant_correct, np.float64) - np.asarray(baseline_correct, np.float64)
    share = _effective_images(change, groups) / len(change)
    return paired_delta_interval(*(share * count for count in counts))


def grouped_mean_interval(values: ArrayLike, groups: Sequence[str], confidence: float = 0.95) -> Interval | None:
    """Interval of the mean of values (images,) of which none is negative, such as KL divergences.

    Student's t on the logarithm of the mean, whose skew is less; None with fewer than two groups.
    """
    numbers, sizes, parts = _by_group(values, groups)
    mean = float(numbers.mean())
    if len(sizes) < 2 or mean == 0:
        return None if mean else Interval(0.0, 0.0)
    variance, freedom = _variance_between(sizes, parts)
    reach = special.stdtrit(freedom, (1 + confidence) / 2) * math.sqrt(variance) / mean
    return Interval(mean * math.exp(-reach), mean * math.exp(reach))


def sign_flip_p(changes: ArrayLike, groups: Sequence[str]) -> float:
    """Two-sided exact p-value that the groups' sums of `changes`, -1, 0 or 1 (images,), lie on either side by chance.

    All signs of all groups' sums are as likely, so their total has a known distribution. With one image in each
    group this is McNemar's exact p. Source: Fisher 1935, "The design of experiments", section 21.
    """
    _, _, sums = _by_group(changes, groups, centred=False)
    steps = np.abs(np.rint(sums)).astype(np.int64)
    steps = steps[steps > 0]
    total = int(steps.sum())
    chances = np.zeros(2 * total + 1)  # of every total from -total to +total
    chances[total] = 1.0
    for step in steps.tolist():
        chances = (np.roll(chances, step) + np.roll(chances, -step)) / 2
    far = np.abs(np.arange(-total, total + 1)) >= abs(round(float(sums.sum())))
    return min(1.0, float(chances[far].sum()))


def clustered(versus: VersusBaseline, baseline: Predictions, variant: Predictions) -> VersusBaseline:
    """The comparison with every interval and p-value as the groups of the images allow; itself without groups."""
    groups = variant.groups or baseline.groups
    if groups is None:
        return versus
    change = variant.correct.astype(np.int64) - baseline.correct.astype(np.int64)
    low, high = _percent(delta_interval(baseline.correct, variant.correct, groups))
    kl = grouped_mean_interval(kl_divergences(baseline.logits, variant.logits), groups)
    p = sign_flip_p(change, groups)
    discordant = versus.right_to_wrong + versus.wrong_to_right
    visible = smallest_visible_loss(max(1, int(_effective_images(change, groups))), discordant / len(change))
    return versus.model_copy(
        update={
            "top1_delta_ci95_points": (low, high),
            "agreement_ci95_percent": _percent(proportion_interval(baseline.classes == variant.classes, groups)),
            "mcnemar_p": p,
            "kl_ci95": None if kl is None else (kl.low, kl.high),
            "smallest_visible_loss_points": min(visible, 100.0),
            "verdict": accuracy_verdict(len(change), versus.top1_delta_points, low, high, p),
        }
    )


def _percent(interval: Interval) -> tuple[float, float]:
    return 100 * interval.low, 100 * interval.high


def _effective_images(values: ArrayLike, groups: Sequence[str] | None) -> float:
    images = len(np.asarray(values))
    return float(images) if groups is None else max(1.0, images * effective_share(values, groups))


def _by_group(
    values: ArrayLike, groups: Sequence[str], centred: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The values, each group's number of images, and each group's sum of values, less their mean if `centred`."""
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or len(numbers) != len(groups) or len(numbers) == 0:
        raise ValueError(f"every value needs a group, got {numbers.shape} values and {len(groups)} groups")
    _, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    sums = np.bincount(group_of, weights=numbers - (numbers.mean() if centred else 0))
    return numbers, sizes.astype(np.float64), sums.astype(np.float64)


def _variance_between(sizes: NDArray[np.float64], parts: NDArray[np.float64]) -> tuple[float, int]:
    """Variance of the mean, from what each group adds to it, and its degrees of freedom."""
    count, squares = len(sizes), parts**2
    total = float(squares.sum())
    if count < 2 or total < 1e-12 * float(sizes.sum()):
        return 0.0, 1
    variance = count / (count - 1) * total / float(sizes.sum()) ** 2
    spread = float(np.sum(squares**2)) / total**2 - 1 / count
    freedom = count - 1 if spread <= 0 else min(count - 1, int(2 / spread))
    return variance, max(1, freedom)
