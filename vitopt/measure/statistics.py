"""Statistics of paired accuracy and of latency, as pure functions of numpy arrays and floats.

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


@dataclass(frozen=True)
class LatencySummary:
    """Latency over `count` samples, in ms; a percentile too few samples can show is None."""

    count: int
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p95_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class Speedup:
    """How many times faster the variant is; `interval` is None under three rounds."""

    ratio: float
    interval: Interval | None


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion, such as top-1 accuracy.

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
    both_right: int, only_baseline: int, only_variant: int, both_wrong: int, confidence: float = 0.95
) -> Interval:
    """Score interval of the accuracy of the variant minus that of the baseline, on the same images.

    The arguments count images, in the order of the fields of `PairedCounts`. The limits are
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
    discordant = only_variant + only_baseline

    def compatible(delta: float) -> bool:
        # The rate of only_baseline most likely under this delta is the larger root of
        # 2 images r^2 + linear r + constant = 0; the rate of only_variant is then r + delta.
        linear = (2 * images - gained) * delta - discordant
        constant = -only_baseline * delta * (1 - delta)
        rate = (math.sqrt(max(0.0, linear**2 - 8 * images * constant)) - linear) / (4 * images)
        variance = images * (2 * rate + delta * (1 - delta))
        # Squared, as the variance is 0 where delta is -1 or 1.
        return (gained - images * delta) ** 2 <= z**2 * variance

    estimate = gained / images
    return Interval(_bisect(compatible, estimate, -1.0), _bisect(compatible, estimate, 1.0))


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


def smallest_visible_loss(images: int, discordant_rate: float, confidence: float = 0.95, power: float = 0.8) -> float:
    """Smallest true loss of accuracy, in points, that `images` images show with the given power.

    To show it is to have a `paired_delta_interval` without zero. `discordant_rate` is the share
    of images, 0 to 1, on which one model is right and the other is wrong; where it is below the
    loss itself, the loss stands in for it; there the normal approximation errs towards too large
    a loss (seen 95 times in 100 rather than 80). The answer is math.inf where no loss would be
    seen (under 4 images at 95 %). Inverse of `images_needed`.
    Raises ValueError for no image, or for a rate, confidence or power out of range.
    Source: Connor 1987, "Sample size for testing differences in proportions for the
    paired-sample design".
    """
    if images < 1:
        raise ValueError(f"a visible loss needs at least one image, got {images}")
    z, z_power = _sample_size_quantiles(discordant_rate, confidence, power)
    if images < z**2:
        return math.inf
    # Connor's formula solved for loss / sqrt(discordant rate); where every discordant image is a
    # lost one, that is sqrt(loss).
    scaled = (math.sqrt(images) * z + z_power * math.sqrt(images + z_power**2 - z**2)) / (images + z_power**2)
    return 100 * scaled * max(math.sqrt(discordant_rate), scaled)


def images_needed(loss_points: float, discordant_rate: float, confidence: float = 0.95, power: float = 0.8) -> int:
    """Images needed to show a true loss of `loss_points` accuracy points with the given power.

    To show it is to have a `paired_delta_interval` without zero. `discordant_rate` is the share
    of images, 0 to 1, on which one model is right and the other is wrong; where it is below the
    loss itself, the loss stands in for it. Inverse of `smallest_visible_loss`.
    Raises ValueError for a loss outside 0..100, or for a rate, confidence or power out of range.
    Source: Connor 1987, "Sample size for testing differences in proportions for the
    paired-sample design".
    """
    if not 0 < loss_points <= 100:
        raise ValueError(f"a loss must be above 0 and at most 100 points, got {loss_points}")
    z, z_power = _sample_size_quantiles(discordant_rate, confidence, power)
    loss = loss_points / 100
    discordant_rate = max(discordant_rate, loss)
    root = z * math.sqrt(discordant_rate) + z_power * math.sqrt(discordant_rate - loss**2)
    images = (root / loss) ** 2
    # The allowance keeps rounding in the last digits from asking for one image more.
    return math.ceil(images * (1 - 1e-9))


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
    """Mean over images of `kl_divergences`, in nats."""
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

    logits (images, classes), labels (images,). Raises ValueError for logits that are empty or not
    finite, labels that do not fit them, or fewer than one bin.
    Source: Guo et al. 2017, "On calibration of modern neural networks".
    """
    if bins < 1:
        raise ValueError(f"calibration needs at least one bin, got {bins}")
    scores = _logits(logits)
    correct = topk_correct(scores, labels, k=1)
    confidence = np.exp(np.max(_log_softmax(scores), axis=1))
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    # right=True: a confidence on an edge belongs to the bin below it, as in the paper.
    bin_of = np.digitize(confidence, inner_edges, right=True)
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.sum(np.abs(gaps)) / len(correct))


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


def latency_summary(samples_ms: ArrayLike) -> LatencySummary:
    """Summary of latency samples (samples,) in ms, with percentiles interpolated linearly.

    The standard deviation is that of the samples themselves (divided by their count). p95 needs
    20 samples and p99 needs 100; under that they are None, being little but the maximum.
    Raises ValueError for no samples, or for samples that are not positive and finite.
    """
    samples = _latencies(samples_ms)
    return LatencySummary(
        count=len(samples),
        mean_ms=float(np.mean(samples)),
        std_ms=float(np.std(samples)),
        min_ms=float(np.min(samples)),
        p50_ms=float(np.percentile(samples, 50)),
        p95_ms=float(np.percentile(samples, 95)) if len(samples) >= 20 else None,
        p99_ms=float(np.percentile(samples, 99)) if len(samples) >= 100 else None,
    )


def speedup_interval(
    baseline_rounds: Sequence[ArrayLike], variant_rounds: Sequence[ArrayLike], confidence: float = 0.95
) -> Speedup:
    """Speed-up of the variant: geometric mean over rounds of baseline median / variant median.

    Each argument holds one array of latency samples in ms per round. Both models of a round are
    measured back to back, so a machine that drifts slows both alike and the ratio keeps; which of
    the two goes first should alternate from round to round, so that the drift within a round
    cancels too. The interval is Student's t on the logarithms of the rounds' ratios.
    Raises ValueError for no rounds, different numbers of rounds, or samples that are missing, not
    positive or not finite.
    Source: Student 1908, "The probable error of a mean".
    """
    if len(baseline_rounds) != len(variant_rounds):
        raise ValueError(f"both models need the same rounds, got {len(baseline_rounds)} and {len(variant_rounds)}")
    rounds = len(baseline_rounds)
    if rounds == 0:
        raise ValueError("a speed-up needs at least one round, got none")
    log_ratios = [
        math.log(np.median(_latencies(baseline)) / np.median(_latencies(variant)))
        for baseline, variant in zip(baseline_rounds, variant_rounds, strict=True)
    ]
    centre = math.fsum(log_ratios) / rounds
    if rounds < 3:
        return Speedup(math.exp(centre), None)
    variance = math.fsum((ratio - centre) ** 2 for ratio in log_ratios) / (rounds - 1)
    reach = _student_t_quantile(confidence, rounds - 1) * math.sqrt(variance / rounds)
    return Speedup(math.exp(centre), Interval(math.exp(centre - reach), math.exp(centre + reach)))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation, -1 to 1, of two arrays (values,); equal values share their average rank.

    Raises ValueError for arrays of different lengths, under two values, NaN, or values all equal.
    Source: Spearman 1904, "The proof and measurement of association between two things".
    """
    first, second = _same_length(a, b)
    if len(first) < 2:
        raise ValueError("a rank correlation needs at least two values, got 1")
    rank_a, rank_b = _centred_ranks(first), _centred_ranks(second)
    return float(rank_a @ rank_b / math.sqrt((rank_a @ rank_a) * (rank_b @ rank_b)))


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


def _bisect(holds: Callable[[float], bool], start: float, stop: float) -> float:
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
    _check_confidence(confidence)
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _student_t_quantile(confidence: float, freedom: int) -> float:
    """Value that |t|, with `freedom` degrees of freedom, stays below with probability `confidence`.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, finite sums in angle = atan(t / sqrt(freedom)).
    """
    _check_confidence(confidence)
    odd = freedom % 2

    def below(angle: float) -> bool:
        cosine = math.cos(angle)
        term, total = cosine**odd, 0.0
        for exponent in range(odd, freedom - 1, 2):
            total += term
            term *= cosine**2 * (exponent + 1) / (exponent + 2)
        total *= math.sin(angle)
        return (2 / math.pi * (angle + total) if odd else total) < confidence

    return math.sqrt(freedom) * math.tan(_bisect(below, 0.0, math.pi / 2))


def _sample_size_quantiles(discordant_rate: float, confidence: float, power: float) -> tuple[float, float]:
    if not 0 <= discordant_rate <= 1:
        raise ValueError(f"the discordant rate must lie between 0 and 1, got {discordant_rate}")
    if not 0.5 <= power < 1:
        raise ValueError(f"the power must be at least 0.5 and below 1, got {power}")
    return _normal_quantile(confidence), NormalDist().inv_cdf(power)


def _check_confidence(confidence: float) -> None:
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


def _latencies(samples_ms: ArrayLike) -> NDArray[np.float64]:
    samples = np.asarray(samples_ms, np.float64)
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(f"latency samples must be a flat array and not empty, got shape {samples.shape}")
    if not (np.isfinite(samples) & (samples > 0)).all():
        raise ValueError("latency samples must be positive and finite")
    return samples


def _centred_ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Average ranks of the values, less their mean."""
    if np.isnan(values).any():
        raise ValueError("a rank correlation needs numbers, got NaN")
    distinct, position, count = np.unique(values, return_inverse=True, return_counts=True)
    if len(distinct) == 1:
        raise ValueError("a rank correlation is undefined where all values are equal")
    last_rank = np.cumsum(count)
    ranks = (last_rank - (count - 1) / 2)[position]
    return np.asarray(ranks - (len(values) + 1) / 2)
