"""Intervals for images in groups: against statsmodels, brute force, and in simulations with a known truth."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import statsmodels.api as sm

from vitopt.measure import accuracy
from vitopt.measure.clusters import (
    _by_group,
    _variance_between,
    delta_interval,
    effective_share,
    grouped_mean_interval,
    proportion_interval,
    sign_flip_p,
)
from vitopt.measure.intervals import paired_delta_interval, wilson_interval
from vitopt.measure.paired import mcnemar_exact_p
from vitopt.measure.predictions import Predictions

Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray, list[str]]]


def uneven(rng: np.random.Generator, groups: int, size: float) -> list[str]:
    """The group of each image, in groups of about `size`."""
    sizes = np.maximum(1, rng.poisson(size, groups))
    return [f"video {index}" for index in np.repeat(np.arange(groups), sizes)]


def test_the_variance_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(0)
    groups = uneven(rng, 30, 7)
    values = rng.random(len(groups)) + np.unique(groups, return_inverse=True)[1] % 3
    codes = np.unique(groups, return_inverse=True)[1]
    fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": codes})
    _, sizes, parts = _by_group(values, groups)
    assert _variance_between(sizes, parts)[0] == pytest.approx(fit.bse[0] ** 2)


def test_groups_of_equal_images_count_as_one_image_each() -> None:
    answers = np.repeat([True, False, True, True, True] * 8, 10)
    groups = [f"g{index // 10}" for index in range(400)]
    assert effective_share(answers, groups) == pytest.approx(1 / 10)
    ours, theirs = proportion_interval(answers, groups), wilson_interval(32, 40)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_nothing_seen_is_as_little_as_one_image_of_each_group_shows() -> None:
    groups = [f"g{index // 10}" for index in range(400)]
    assert proportion_interval(np.ones(400, bool), groups) == wilson_interval(40, 40)
    assert proportion_interval(np.ones(10, bool), ["one"] * 10) == wilson_interval(1, 1)


def test_groups_of_one_image_are_nearly_independent_images() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.random(900) < 0.8, rng.random(900) < 0.7
    groups = [str(index) for index in range(900)]
    assert 0.98 < effective_share(before, groups) <= 1
    ours, theirs = proportion_interval(before, groups), wilson_interval(int(before.sum()), 900)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-3)
    counts = [np.sum(b & a) for b, a in ((before, after), (before, ~after), (~before, after), (~before, ~after))]
    ours, theirs = delta_interval(before, after, groups), paired_delta_interval(*map(int, counts))
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)


def test_without_groups_the_interval_is_wilsons() -> None:
    assert proportion_interval([True, False, True], None) == wilson_interval(2, 3)


def test_sign_flips_of_single_images_are_mcnemars_exact_test() -> None:
    changes = [-1] * 9 + [1] * 3 + [0] * 20
    assert sign_flip_p(changes, [str(index) for index in range(32)]) == pytest.approx(mcnemar_exact_p(9, 3))
    assert sign_flip_p([0, 0, 0], ["a", "b", "c"]) == 1


def test_sign_flips_of_groups_are_those_of_all_signs() -> None:
    changes = np.array([-1, -1, -1, 1, -1, -1, 0, 1, -1, -1, 1, 1])
    groups = list("aaabbccddeef")
    sums = [changes[np.array(groups) == group].sum() for group in "abcdef"]
    totals = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=6)]
    assert sign_flip_p(changes, groups) == pytest.approx(np.mean(np.array(totals) >= abs(sum(sums))))


def test_mean_of_values_that_are_all_zero_or_of_one_group() -> None:
    assert grouped_mean_interval([0.0, 0.0], ["a", "b"]).high == 0
    assert grouped_mean_interval([1.0, 2.0], ["a", "a"]) is None


@pytest.mark.parametrize("groups", [["a"], []])
def test_values_without_a_group_are_refused(groups: list[str]) -> None:
    with pytest.raises(ValueError, match="group"):
        effective_share([1, 0], groups)


def share_covered(hits: list[bool]) -> float:
    return float(np.mean(hits))


@pytest.mark.parametrize(
    ("truth", "correlation", "groups", "size"),
    [(0.9, 0.3, 40, 10), (0.75, 0.3, 100, 5), (0.98, 0.3, 40, 10), (0.9, 0.0, 40, 10)],
)
def test_top1_intervals_hold_the_truth(truth: float, correlation: float, groups: int, size: int) -> None:
    rng, ours, naive = np.random.default_rng(1), [], []
    for _ in range(400):
        names = uneven(rng, groups, size)
        within = (1 - correlation) / max(correlation, 1e-9)
        of_group = rng.beta(truth * within, (1 - truth) * within, groups) if correlation else np.full(groups, truth)
        right = rng.random(len(names)) < of_group[np.unique(names, return_inverse=True)[1]]
        clustered = proportion_interval(right, names)
        plain = wilson_interval(int(right.sum()), len(right))
        ours.append(clustered.low <= truth <= clustered.high)
        naive.append(plain.low <= truth <= plain.high)
    assert share_covered(ours) >= 0.93
    if correlation:
        assert share_covered(naive) < 0.88  # what groups do to intervals that know nothing of them


@pytest.mark.parametrize(("lost", "won", "groups", "size"), [(0.08, 0.02, 60, 10), (0.1, 0.05, 30, 15)])
def test_delta_and_agreement_intervals_and_p_values_hold(lost: float, won: float, groups: int, size: int) -> None:
    rng, deltas, naive, agreements, rejected = np.random.default_rng(2), [], [], [], []
    for _ in range(250):
        names = uneven(rng, groups, size)
        codes = np.unique(names, return_inverse=True)[1]
        rates = rng.dirichlet(np.array([lost, won, 1 - lost - won]) * 1.5, groups)[codes]  # correlation of 0.4
        fate = (rng.random(len(names))[:, None] > rates.cumsum(axis=1)).sum(axis=1)
        before, after = fate != 1, fate != 0
        one = delta_interval(before, after, names)
        deltas.append(one.low <= won - lost <= one.high)
        counts = [int(np.sum(fate == kind)) for kind in (0, 1)]
        plain = paired_delta_interval(len(fate) - sum(counts), *counts, 0)
        naive.append(plain.low <= won - lost <= plain.high)
        same = proportion_interval(fate == 2, names)
        agreements.append(same.low <= 1 - lost - won <= same.high)
        # Under the null hypothesis each group may as well have been lost as won.
        flipped = (fate == 1).astype(int) - (fate == 0)
        rejected.append(sign_flip_p(flipped * rng.choice([-1, 1], groups)[codes], names) <= 0.05)
    assert share_covered(deltas) >= 0.94 and share_covered(agreements) >= 0.92
    assert share_covered(naive) < 0.85
    assert share_covered(rejected) <= 0.07


def test_kl_intervals_are_wider_and_hold_the_truth() -> None:
    rng, ours, naive = np.random.default_rng(3), [], []
    truth = np.exp((0.7**2 + 1) / 2)
    for _ in range(300):
        names = uneven(rng, 40, 10)
        codes = np.unique(names, return_inverse=True)[1]
        values = np.exp(rng.normal(0, 0.7, 40)[codes] + rng.normal(0, 1, len(names)))
        one = grouped_mean_interval(values, names)
        plain = grouped_mean_interval(values, [str(index) for index in range(len(values))])
        ours.append(one.low <= truth <= one.high)
        naive.append(plain.low <= truth <= plain.high)
    assert share_covered(ours) >= 0.88  # long tails keep it below 0.95
    assert share_covered(naive) < 0.8


def test_a_comparison_of_groups_has_their_intervals_and_the_same_estimates() -> None:
    rng = np.random.default_rng(4)
    labels = np.repeat(rng.integers(0, 3, 20), 10)
    before = rng.normal(0, 1, (200, 3)).astype(np.float32)
    before[np.arange(200), labels] += 3
    worse = np.repeat(rng.random(20) < 0.2, 10)  # some videos are lost whole
    after = np.where(worse[:, None], -before, before + rng.normal(0, 0.1, before.shape)).astype(np.float32)
    names, hashes = tuple(map(str, range(200))), ("h",) * 200
    groups = tuple(f"video {index // 10}" for index in range(200))
    plain = accuracy.compare("a", Predictions(names, hashes, labels, before), Predictions(names, hashes, labels, after))
    grouped = accuracy.compare(
        "a", Predictions(names, hashes, labels, before, groups), Predictions(names, hashes, labels, after, groups)
    )
    assert (grouped.top1_delta_points, grouped.agreement_percent) == (plain.top1_delta_points, plain.agreement_percent)
    for wide, narrow in (
        (grouped.top1_delta_ci95_points, plain.top1_delta_ci95_points),
        (grouped.agreement_ci95_percent, plain.agreement_ci95_percent or (grouped.agreement_percent,) * 2),
    ):
        assert wide[0] < narrow[0] and narrow[1] <= wide[1]
    assert grouped.mcnemar_p > plain.mcnemar_p
    assert grouped.smallest_visible_loss_points > plain.smallest_visible_loss_points
    assert grouped.kl_ci95 is not None and grouped.kl_ci95[0] < grouped.mean_kl_divergence < grouped.kl_ci95[1]
