"""The division of images, and losses on one part of them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitopt.data.images import ImageSet, open_images
from vitopt.errors import DataError
from vitopt.measure.logit_statistics import mean_kl_divergence
from vitopt.measure.predictions import Predictions
from vitopt.recipe import DataSpec
from vitopt.search.confirmation import divide, loss, loss_with_share


def with_labels(labels: list[int]) -> ImageSet:
    digits = open_images(DataSpec(source="digits", limit=len(labels)), "all")
    return replace(digits, labels=tuple(labels))


@pytest.mark.parametrize("labels", [[0] * 40 + [1] * 20 + [2] * 4, [0, 1, 2] * 20, list(range(10)) * 3])
def test_each_class_is_in_both_parts_in_its_proportion(labels: list[int]) -> None:
    images = with_labels(labels)
    choosing, confirming = divide(images)
    assert sorted([*choosing.ids, *confirming.ids]) == sorted(images.ids)
    assert len(choosing) == -(-len(images) // 4)
    whole, part = Counter(images.labels), Counter(choosing.labels)
    assert all(abs(part[label] - count / 4) < 1 for label, count in whole.items())


def test_the_division_is_always_the_same() -> None:
    images = with_labels([0, 1] * 30)
    assert [part.ids for part in divide(images)] == [part.ids for part in divide(images)]


def test_two_images_are_enough_to_divide_and_one_is_not(shapes: Path) -> None:
    images = open_images(DataSpec(source=str(shapes)), "train")
    assert [len(part) for part in divide(images.subset([0, 31]))] == [1, 1]
    with pytest.raises(DataError, match="one image cannot"):
        divide(images.subset([0]))


def predictions(logits: np.ndarray) -> Predictions:
    names = tuple(map(str, range(len(logits))))
    return Predictions(names, names, np.zeros(len(logits), np.int64), logits.astype(np.float32))


def test_a_loss_is_against_16_bit_and_its_share_against_the_quantized() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(0, 2, (200, 5))
    noise = rng.normal(0, 1, (200, 5))
    full, quantized, mixed = predictions(exact), predictions(exact + noise), predictions(exact + 0.5 * noise)
    found = loss_with_share(full, quantized, mixed)
    assert found.kl == pytest.approx(mean_kl_divergence(full.logits, mixed.logits))
    whole = mean_kl_divergence(full.logits, quantized.logits)
    assert found.kl_share == pytest.approx(found.kl / whole)
    assert found.kl_share_ci95 is not None and found.kl_share_ci95[0] < found.kl / whole < found.kl_share_ci95[1]
    assert loss(full, full, mixed).kl_share is None
    against_quantized = loss(full, quantized, mixed)
    assert against_quantized.kl == found.kl
    assert against_quantized.top1_delta_points == pytest.approx(100 * (mixed.correct.mean() - quantized.correct.mean()))


def test_where_quantizing_changes_nothing_there_is_no_share() -> None:
    same = predictions(np.eye(4))
    assert loss_with_share(same, same, same).kl_share is None
