"""Where an adaptive model draws the line, and what can be promised of it. Functions of arrays.

The promise is of lost images: right in the second pass, wrong on the path that was taken. Net top-1 loss is never more,
as it takes off the images that only the first pass has right. Whether an image is lost is a coin flip with the share of
lost images as its chance, so the bound of Clopper and Pearson is exact for any number of images and any model. A line
that is tried after a looser one was refused would get chances of its own to be lucky, so lines are tried in an order
that is fixed beforehand, from all images escalated downwards, until one fails.
Source: Angelopoulos et al., "Learn then Test", arXiv 2110.01052, with fixed-sequence testing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

RATES = tuple(percent / 100 for percent in range(100))  # of escalation, which candidates aim at


@dataclass(frozen=True)
class Choice:
    """`threshold`: images that score lower are escalated; None: all are. `bound`: upper limit of the share of lost
    images at it. `needed`: images that would show the limit if none were lost, where these were too few."""

    threshold: float | None
    bound: float
    needed: int | None = None


def upper_bound(lost: int, images: int, confidence: float) -> float:
    """One-sided upper limit of a share, of which `lost` of `images` were seen; exact (Clopper and Pearson 1934)."""
    return 1.0 if lost >= images else float(special.betaincinv(lost + 1, images - lost, confidence))


def images_needed(limit: float, confidence: float) -> int:
    """Images of which none may be lost so that `limit` is shown; 598 for half a point at 95 %."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - limit) * (1 - 1e-12))


def candidates(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Thresholds that escalate 99 %, 98 % … 0 % of the images with these scores, falling."""
    return np.quantile(np.asarray(scores, np.float64), RATES[::-1])


def at_rate(scores: NDArray[np.floating], rate: float) -> float:
    """Threshold that escalates this share of the images with these scores, or less where scores are equal."""
    return float(np.quantile(np.asarray(scores, np.float64), rate, method="higher"))


def for_loss(
    thresholds: Sequence[float] | NDArray[np.float64],
    scores: NDArray[np.floating],
    lost: NDArray[np.bool_],
    limit: float,
    confidence: float,
) -> Choice:
    """The lowest of `thresholds` down to which each is shown to lose at most the share `limit` of the images.

    `thresholds` fall, and come from other images than `scores` and `lost`, (images,) each: how sure the first pass is,
    and whether taking its answer loses the image. With the probability `confidence` over the draw of these images, the
    true share of lost images at the threshold that is chosen is at most `limit`.
    """
    chosen = Choice(None, 0.0)  # of the second pass for all nothing is lost
    for threshold in thresholds:
        bound = upper_bound(int(np.sum(lost & (scores >= threshold))), len(scores), confidence)
        if bound > limit:
            break
        chosen = Choice(float(threshold), bound)
    needed = images_needed(limit, confidence)
    return Choice(None, 0.0, needed) if chosen.threshold is None and len(scores) < needed else chosen


def temperature(logits: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """What logits (images, classes) are divided by for the highest likelihood of labels (images,); 1 to 20.

    Never less than 1: of images that are nearly all right the likelihood asks for ever surer answers, until float32
    cannot tell the sure ones apart and no threshold lies between them.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599.
    """
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logits, np.float64)

    def loss(logarithm: float) -> float:
        scaled = logits / math.exp(logarithm)
        return float(np.mean(special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))

    return math.exp(minimize_scalar(loss, bounds=(0.0, math.log(20)), method="bounded").x)


def area_under_curve(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> float | None:
    """How often a positive image scores lower than another (AUROC of `-scores`), ties half; None without both kinds."""
    from scipy.stats import rankdata

    count = int(positive.sum())
    if count in (0, len(positive)):
        return None
    ranks = rankdata(-np.asarray(scores, np.float64))
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def rank_correlation(scores: NDArray[np.floating], distances: NDArray[np.floating]) -> float | None:
    """Spearman's, of `-scores` and `distances`; None where either is constant."""
    from scipy.stats import rankdata

    ranks = rankdata(-np.asarray(scores, np.float64)), rankdata(distances)
    return float(np.corrcoef(*ranks)[0, 1]) if min(map(np.ptp, ranks)) > 0 else None
