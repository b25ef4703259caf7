"""Thresholds and what they promise, against simulations and slow references."""

import itertools

import numpy as np
import pytest
from scipy import stats

from vitopt.adaptive.thresholds import (
    area_under_curve,
    at_rate,
    candidates,
    for_loss,
    images_needed,
    rank_correlation,
    temperature,
    upper_bound,
)


@pytest.mark.parametrize(("lost", "images"), [(0, 598), (3, 200), (199, 200), (200, 200)])
def test_the_bound_is_the_share_at_which_so_few_lost_images_are_just_unlikely(lost: int, images: int) -> None:
    bound = upper_bound(lost, images, 0.95)
    assert bound == 1 if lost == images else stats.binom.cdf(lost, images, bound) == pytest.approx(0.05)


@pytest.mark.parametrize(("limit", "confidence"), [(0.005, 0.95), (0.01, 0.9), (0.3, 0.99)])
def test_so_many_images_are_needed_and_one_fewer_does_not_do(limit: float, confidence: float) -> None:
    needed = images_needed(limit, confidence)
    assert upper_bound(0, needed, confidence) <= limit < upper_bound(0, needed - 1, confidence)


def test_too_few_images_escalate_all_and_tell_how_many_would_do() -> None:
    scores = np.linspace(0, 1, 100)
    choice = for_loss(candidates(scores), scores, np.zeros(100, bool), 0.005, 0.95)
    assert (choice.threshold, choice.needed) == (None, 598)


def test_a_first_pass_that_loses_nothing_answers_nearly_all() -> None:
    scores = np.linspace(0, 1, 1000)
    choice = for_loss(candidates(scores), scores, np.zeros(1000, bool), 0.005, 0.95)
    assert choice.threshold == 0 and choice.bound < 0.005 and choice.needed is None


def test_no_threshold_is_tried_after_one_that_failed() -> None:
    scores = np.linspace(0, 1, 1000)
    lost = (scores > 0.9) & (scores < 0.95)  # among the images of which the first pass is surest
    choice = for_loss(candidates(scores), scores, lost, 0.01, 0.95)
    assert choice.threshold is not None and choice.threshold > 0.93
    assert choice.needed is None


def test_the_promised_loss_holds_in_1000_calibrations() -> None:
    """Images are lost the more often, the less sure the first pass is; the true share at a threshold is an integral."""
    rng, limit, wrong, all_escalated = np.random.default_rng(0), 0.01, 0, 0

    def true_loss(threshold: float) -> float:  # of images that score uniformly and are lost with 0.08 (1 - score)^2
        return 0.08 * (1 - threshold) ** 3 / 3

    for _ in range(1000):
        choosing, fitting = rng.random(300), rng.random(900)
        lost = rng.random(900) < 0.08 * (1 - fitting) ** 2
        choice = for_loss(candidates(choosing), fitting, lost, limit, 0.95)
        all_escalated += choice.threshold is None
        wrong += choice.threshold is not None and true_loss(choice.threshold) > limit
    assert all_escalated == 0
    assert 10 <= wrong <= stats.binom.ppf(0.999, 1000, 0.05)  # not more often than promised, nor hardly ever


@pytest.mark.parametrize("rate", [0.1, 0.37])
def test_a_rate_escalates_so_many(rate: float) -> None:
    scores = np.random.default_rng(0).random(1000)
    assert np.mean(scores < at_rate(scores, rate)) == pytest.approx(rate, abs=0.0011)


def test_the_temperature_that_made_the_labels_is_found() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, (20_000, 5))
    shares = np.exp(true) / np.exp(true).sum(axis=1, keepdims=True)
    labels = (rng.random((20_000, 1)) > shares.cumsum(axis=1)).sum(axis=1)
    assert temperature(3 * true, labels) == pytest.approx(3, rel=0.05)


def test_ranking_is_what_counting_pairs_gives() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.3
    pairs = list(itertools.product(scores[positive], scores[~positive]))
    wanted = np.mean([(one < other) + 0.5 * (one == other) for one, other in pairs])
    assert area_under_curve(scores, positive) == pytest.approx(wanted)
    distances = rng.random(60)
    assert rank_correlation(scores, distances) == pytest.approx(stats.spearmanr(-scores, distances)[0])
    assert area_under_curve(scores, np.zeros(60, bool)) is None and rank_correlation(np.ones(60), distances) is None


def test_images_that_are_nearly_all_right_do_not_make_answers_ever_surer() -> None:
    logits = np.full((50, 3), -4.0)
    logits[:, 0] = np.linspace(2, 9, 50)
    assert temperature(logits, np.zeros(50, int)) == pytest.approx(1, abs=1e-3)
