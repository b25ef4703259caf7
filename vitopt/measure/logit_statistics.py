"""What logits (images, classes) show: whether the label is among the highest, calibration, distance to other logits."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special


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


def kl_divergences(baseline_logits: ArrayLike, variant_logits: ArrayLike) -> NDArray[np.float64]:
    """KL(softmax(baseline) || softmax(variant)) of each image, in nats, (images,); logits (images, classes).

    Raises ValueError for logits that are empty, not finite, or of different shapes.
    Source: Kullback and Leibler 1951, "On information and sufficiency".
    """
    baseline, variant = _logits(baseline_logits), _logits(variant_logits)
    if baseline.shape != variant.shape:
        raise ValueError(f"logits differ in shape: {baseline.shape} and {variant.shape}")
    log_p, log_q = special.log_softmax(baseline, axis=1), special.log_softmax(variant, axis=1)
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
    confidence = np.exp(np.max(special.log_softmax(_logits(logits), axis=1), axis=1))
    inner_edges = np.linspace(0, 1, bins + 1)[1:-1]
    # right=True: a confidence on an edge belongs to the bin below it, as in the paper.
    return confidence, np.digitize(confidence, inner_edges, right=True)


def _logits(logits: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(logits, np.float64)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"logits must be (images, classes) and not empty, got shape {scores.shape}")
    # NaN loses every comparison, so an image of NaN would count as right.
    if not np.isfinite(scores).all():
        raise ValueError("logits must be finite, got NaN or infinity")
    return scores
