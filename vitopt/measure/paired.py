"""Two models on the same images: how many images turned right or wrong, and whether chance explains it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special


class PairedCounts(NamedTuple):
    """Images by whether the baseline and the variant are right on them."""

    both_right: int
    right_to_wrong: int
    wrong_to_right: int
    both_wrong: int


def paired_counts(baseline_correct: ArrayLike, variant_correct: ArrayLike) -> PairedCounts:
    """Count images by whether each model is right; both arrays are bool (images,).

    Raises ValueError for empty arrays, arrays of different lengths, or arrays that are not bool.
    """
    baseline, variant = np.asarray(baseline_correct), np.asarray(variant_correct)
    if baseline.ndim != 1 or baseline.shape != variant.shape or not baseline.size:
        raise ValueError(f"expected two arrays (images,), got shapes {baseline.shape} and {variant.shape}")
    if baseline.dtype != np.bool_ or variant.dtype != np.bool_:
        raise ValueError(f"expected arrays of bool, got {baseline.dtype} and {variant.dtype}")
    return PairedCounts(
        both_right=int(np.sum(baseline & variant)),
        right_to_wrong=int(np.sum(baseline & ~variant)),
        wrong_to_right=int(np.sum(~baseline & variant)),
        both_wrong=int(np.sum(~baseline & ~variant)),
    )


def mcnemar_exact_p(only_baseline: int, only_variant: int) -> float:
    """Two-sided exact p-value that the images right under one model only fall to either by even chance.

    Raises ValueError for a negative count.
    Source: McNemar 1947, "Note on the sampling error of the difference between correlated
    proportions or percentages", with the binomial distribution in place of its approximation.
    """
    if only_baseline < 0 or only_variant < 0:
        raise ValueError(f"counts of images cannot be negative, got {only_baseline} and {only_variant}")
    fewer, discordant = min(only_baseline, only_variant), only_baseline + only_variant
    return min(1.0, 2 * float(special.bdtr(fewer, discordant, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several tests of one question, in the order given.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    adjusted, highest = list(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
