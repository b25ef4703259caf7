"""Guessing is told from a poor model: exact false alarms and hits, from the binomial distribution."""

import pytest
from scipy.stats import binom

from vitopt.measure.chance import explain_guessing, is_guessing


def alarm_rate(accuracy: float, images: int, classes: int) -> float:
    """Probability of an alarm for a model that is right with probability `accuracy` on every image."""
    alarms = [right for right in range(images + 1) if is_guessing(right, images, classes)]
    return float(binom.pmf(alarms, images, accuracy).sum())


SIZES = (1, 2, 5, 10, 24, 50, 100, 400, 1000)


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("skill", [0.15, 0.3, 0.9])
def test_a_model_that_works_raises_no_alarm(classes, skill):
    """Skill is the share of the way from guessing to perfection; an alarm at 0.15 is a false one."""
    accuracy = 1 / classes + skill * (1 - 1 / classes)
    assert max(alarm_rate(accuracy, images, classes) for images in SIZES) <= 0.025


@pytest.mark.parametrize(("classes", "images"), [(2, 2000), (10, 250), (12, 240), (100, 100), (1000, 100)])
def test_guessing_is_seen(classes, images):
    assert alarm_rate(1 / classes, images, classes) >= 0.9


@pytest.mark.parametrize(("classes", "images"), [(2, 10), (10, 20), (1000, 40)])
def test_labels_in_another_order_are_seen_early(classes, images):
    """A good model whose labels are shuffled without a fixed point is right on nothing."""
    assert is_guessing(0, images, classes)


@pytest.mark.parametrize("classes", [2, 4, 1000])
def test_a_handful_of_images_shows_nothing(classes):
    assert not any(is_guessing(right, images, classes) for images in (1, 2, 3) for right in range(images + 1))


def test_a_weak_model_among_many_classes_does_not_guess():
    assert not is_guessing(20, 400, 1000)  # 5 %: fifty times as often right as by chance


def test_the_line_names_counts_and_causes():
    line = explain_guessing("fp32", 3, 400, 1000)
    assert "\n" not in line
    assert all(words in line for words in ("fp32", "3 of 400", "1000 classes", "order", "untrained"))
