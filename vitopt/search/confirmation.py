"""The division of the calibration images, and what one mixture of formats loses on a part of them.

A list chosen as the best of many on some images looks better there than it is. So one part of the images chooses, and
the one list that the search ends with is judged once, on the other part.
"""

import numpy as np

from vitopt.data.images import ImageSet
from vitopt.errors import DataError
from vitopt.measure.bootstrap import positive_mean_interval
from vitopt.measure.intervals import paired_delta_interval, ratio_interval
from vitopt.measure.logit_statistics import kl_divergences, mean_kl_divergence, normalised_error
from vitopt.measure.paired import paired_counts
from vitopt.measure.predictions import Predictions
from vitopt.recipe import CHOOSING
from vitopt.search.results import Loss


def divide(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """The part that chooses and the part that confirms: always the same, and each class in both in its proportion.

    Raises:
        DataError: a single image cannot do both.
    """
    if len(images) < 2:
        raise DataError(f"{images.name}: one image cannot both choose and confirm; give more")
    by_class = sorted(range(len(images)), key=lambda index: images.labels[index])
    # Every fourth of all, class after class: this also spreads where a class has fewer than four.
    choosing = set(by_class[::CHOOSING])
    parts = [[index for index in range(len(images)) if (index in choosing) == wanted] for wanted in (True, False)]
    return images.subset(parts[0]), images.subset(parts[1])


def loss(exact: Predictions, reference: Predictions, changed: Predictions) -> Loss:
    """`changed` against the 16-bit model `exact`; its top-1 against `reference`."""
    counts = paired_counts(reference.correct, changed.correct)
    interval = paired_delta_interval(*counts)
    return Loss(
        top1_delta_points=100 * (counts.wrong_to_right - counts.right_to_wrong) / len(changed.labels),
        top1_delta_ci95_points=(100 * interval.low, 100 * interval.high),
        agreement_percent=100 * float(np.mean(exact.classes == changed.classes)),
        kl=mean_kl_divergence(exact.logits, changed.logits),
        logit_error=normalised_error(exact.logits, changed.logits),
    )


def loss_with_share(exact: Predictions, quantized: Predictions, changed: Predictions) -> Loss:
    """`loss` against the 16-bit model, with its KL as a share of the fully quantized model's, and intervals of both."""
    before, after = (kl_divergences(exact.logits, one.logits) for one in (quantized, changed))
    limits = positive_mean_interval(after)
    measured = loss(exact, exact, changed)
    measured = measured.model_copy(update={"kl_ci95": limits and (limits.low, limits.high)})
    if not before.any():  # quantizing changed nothing, so there is nothing to have a share of
        return measured
    interval = ratio_interval(after, before)
    share = float(after.mean() / before.mean())
    return measured.model_copy(update={"kl_share": share, "kl_share_ci95": (interval.low, interval.high)})
