"""Statistics of paired accuracy, as pure functions of numpy arrays and floats.

Accuracies, losses of accuracy and rates are proportions from 0 to 1, except where a name says
"points" (percentage points). Logits are (images, classes); labels are class indices (images,).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both limits included."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedCounts:
    """Images by whether the baseline and the variant are right on them."""

    both_right: int
    right_to_wrong: int
    wrong_to_right: int
    both_wrong: int


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


def mcnemar_exact_p(only_baseline: int, only_variant: int) -> float:
    """Two-sided exact p-value that the images right under one model only fall to either by even chance.

    Raises ValueError for a negative count.
    Source: McNemar 1947, "Note on the sampling error of the difference between correlated
    proportions or percentages", with the binomial distribution in place of its approximation.
    """
    if only_baseline < 0 or only_variant < 0:
        raise ValueError(f"counts of images cannot be negative, got {only_baseline} and {only_variant}")
    discordant = only_baseline + only_variant
    # In logarithms, as 0.5**discordant underflows from 1,075 images on.
    log_total = math.lgamma(discordant + 1) - discordant * math.log(2)
    tail = math.fsum(
        math.exp(log_total - math.lgamma(count + 1) - math.lgamma(discordant - count + 1))
        for count in range(min(only_baseline, only_variant) + 1)
    )
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several tests of one question, in the order given.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    adjusted, highest = list(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def paired_counts(baseline_correct: ArrayLike, variant_correct: ArrayLike) -> PairedCounts:
    """Count images by whether each model is right; both arrays are bool (images,).

    Raises ValueError for empty arrays, arrays of different lengths, or arrays that are not bool.
    """
    baseline, variant = _same_length(baseline_correct, variant_correct)
    if baseline.dtype != np.bool_ or variant.dtype != np.bool_:
        raise ValueError(f"expected arrays of bool, got {baseline.dtype} and {variant.dtype}")
    return PairedCounts(
        both_right=int(np.sum(baseline & variant)),
        right_to_wrong=int(np.sum(baseline & ~variant)),
        wrong_to_right=int(np.sum(~baseline & variant)),
        both_wrong=int(np.sum(~baseline & ~variant)),
    )


def agreement(baseline_predictions: ArrayLike, variant_predictions: ArrayLike) -> float:
    """Share of images, 0 to 1, given the same class by both; both arrays are classes (images,).

    Raises ValueError for empty arrays or arrays of different lengths.
    """
    baseline, variant = _same_length(baseline_predictions, variant_predictions)
    return float(np.mean(baseline == variant))


def kl_divergences(baseline_logits: ArrayLike, variant_logits: ArrayLike) -> NDArray[np.float64]:
    """KL(softmax(baseline) || softmax(variant)) of each image, in nats, (images,); logits (images, classes).

    Raises ValueError for logits that are empty, not finite, or of different shapes.
    Source: Kullback and Leibler 1951, "On information and sufficiency".
    """
    baseline, variant = _logits(baseline_logits), _logits(variant_logits)
    if baseline.shape != variant.shape:
        raise ValueError(f"logits differ in shape: {baseline.shape} and {variant.shape}")
    log_p, log_q = _log_softmax(baseline), _log_softmax(variant)
    # A divergence is never negative; rounding can leave -1e-17.
    return np.maximum(0.0, np.sum(np.exp(log_p) * (log_p - log_q), axis=1))


def mean_kl_divergence(baseline_logits: ArrayLike, variant_logits: ArrayLike) -> float:
    """Mean of `kl_divergences` over images, in nats."""
    return float(np.mean(kl_divergences(baseline_logits, variant_logits)))


def normalised_error(reference: ArrayLike, other: ArrayLike) -> float:
    """||other - reference|| / ||reference|| over all entries; both arrays of the same shape.

    Raises ValueError for empty arrays, arrays of different shapes, or a reference of zeros.
    """
    wanted, given = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    if wanted.shape != given.shape:
        raise ValueError(f"arrays differ in shape: {wanted.shape} and {given.shape}")
    scale = float(np.linalg.norm(wanted.ravel()))
    if scale == 0:
        raise ValueError("the reference is empty or all zeros, so no error is relative to it")
    return float(np.linalg.norm((given - wanted).ravel())) / scale


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Mean gap, 0 to 1, between confidence and accuracy over equal-width bins of confidence.

    logits (images, classes), labels (images,). Few images leave a gap in each bin by chance alone,
    see `calibration_noise`. Raises ValueError for logits that are empty or not finite, labels that
    do not fit them, or fewer than one bin.
    Source: Guo et al. 2017, "On calibration of modern neural networks".
    """
    confidence, bin_of = _confidence_bins(logits, bins)
    correct = topk_correct(logits, labels, k=1)
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.sum(np.abs(gaps)) / len(correct))


def calibration_noise(logits: ArrayLike, bins: int = 15, draws: int = 400) -> float:
    """Mean `expected_calibration_error` of these images if every confidence were the chance to be right.

    The error of a calibrated model lies about here, so the error less this is about 0 for it; for
    another it is between the true error and that less this. By simulation, always with the same
    draws. Raises ValueError as `expected_calibration_error`.
    Source: Broecker and Smith 2007, "Increasing the reliability of reliability diagrams".
    """
    confidence, bin_of = _confidence_bins(logits, bins)
    generator = np.random.default_rng(0)
    gaps = (
        np.bincount(bin_of, weights=(generator.random(len(confidence)) < confidence) - confidence, minlength=bins)
        for _ in range(draws)
    )
    return float(sum(np.abs(gap).sum() for gap in gaps) / (draws * len(confidence)))


def _confidence_bins(logits: ArrayLike, bins: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Highest probability of each image, and its bin of equal width."""
    if bins < 1:
        raise ValueError(f"calibration needs at least one bin, got {bins}")
    confidence = np.exp(np.max(_log_softmax(_logits(logits)), axis=1))
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    # right=True: a confidence on an edge belongs to the bin below it, as in the paper.
    return confidence, np.digitize(confidence, inner_edges, right=True)


def topk_correct(logits: ArrayLike, labels: ArrayLike, k: int) -> NDArray[np.bool_]:
    """Whether each label is among the k highest logits, bool (images,); k may exceed the classes.

    logits (images, classes), labels (images,). Of equal logits the lower class index comes first.
    Raises ValueError for logits that are empty or not finite, labels that do not fit them, or k
    under 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    scores = _logits(logits)
    images, classes = scores.shape
    targets = np.asarray(labels)
    if targets.shape != (images,):
        raise ValueError(f"{images} images need labels of shape ({images},), got {targets.shape}")
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"labels must be class indices, got {targets.dtype}")
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(f"labels must lie between 0 and {classes - 1}, got {targets.min()} to {targets.max()}")
    targets = targets[:, np.newaxis]
    own = np.take_along_axis(scores, targets, axis=1)
    ahead = (scores > own) | ((scores == own) & (np.arange(classes) < targets))
    return np.asarray(np.sum(ahead, axis=1) < k)


def pareto_front(costs: ArrayLike, scores: ArrayLike) -> list[int]:
    """Indices of the points no other point beats at lower cost and higher score, by rising cost.

    Both arrays are (points,). A point is dropped when another is at least as good in both and
    better in one; equal points stay together, in the order given.
    Raises ValueError for empty arrays, arrays of different lengths, or NaN.
    """
    cost, score = _same_length(np.asarray(costs, np.float64), np.asarray(scores, np.float64))
    if np.isnan(cost).any() or np.isnan(score).any():
        raise ValueError("costs and scores must be numbers, got NaN")
    front: list[int] = []
    for index in np.lexsort((-score, cost)).tolist():
        best = front[-1] if front else None
        if best is None or score[index] > score[best] or (score[index] == score[best] and cost[index] == cost[best]):
            front.append(index)
    return front


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


def _same_length(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim != 1 or second.ndim != 1:
        raise ValueError(f"expected flat arrays, got shapes {first.shape} and {second.shape}")
    if len(first) != len(second):
        raise ValueError(f"arrays differ in length: {len(first)} and {len(second)}")
    if len(first) == 0:
        raise ValueError("expected at least one value, got empty arrays")
    return first, second


def _logits(logits: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(logits, np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"logits must be (images, classes) and not empty, got shape {scores.shape}")
    # NaN loses every comparison, so an image of NaN would count as right.
    if not np.isfinite(scores).all():
        raise ValueError("logits must be finite, got NaN or infinity")
    return scores


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - np.max(logits, axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True)))
