import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from conftest import covers, limits
from statsmodels.stats.proportion import proportion_confint

from vitopt.measure import intervals
from vitopt.measure.intervals import paired_delta_interval, ratio_interval, wilson_interval

CASES = 2_000


class TestWilsonInterval:
    @pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
    @pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 50), (50, 50), (356, 400), (7, 9)])
    def test_equals_statsmodels(self, successes, trials, confidence):
        expected = proportion_confint(successes, trials, alpha=1 - confidence, method="wilson")
        assert limits(wilson_interval(successes, trials, confidence)) == pytest.approx(expected, abs=1e-12)

    def test_limits_at_the_ends_are_exact(self):
        assert wilson_interval(0, 30).low == 0.0
        assert wilson_interval(30, 30).high == 1.0

    def test_covers_the_true_accuracy(self):
        accuracy, images = 0.89, 400
        right = np.random.default_rng(0).binomial(images, accuracy, CASES)
        covered = np.mean([covers(wilson_interval(int(count), images), accuracy) for count in right])
        assert 0.93 <= covered <= 0.97

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 0), "at least one trial, got 0"),
            ((5, 4), "between 0 and the 4 trials, got 5"),
            ((-1, 4), "between 0 and the 4 trials, got -1"),
            ((1, 4, 1.0), "the confidence must lie between 0 and 1, got 1.0"),
        ],
    )
    def test_rejects(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            wilson_interval(*arguments)


def score_by_maximum_likelihood(only_baseline, only_variant, images, delta):
    """The score statistic of Tango 1998, its nuisance rate found by maximising the likelihood."""
    same = images - only_baseline - only_variant

    def minus_log_likelihood(rate):
        terms = [(only_baseline, rate), (only_variant, rate + delta), (same, 1 - 2 * rate - delta)]
        return -sum(scipy.special.xlogy(count, chance) for count, chance in terms)

    bounds = (max(0.0, -delta), (1 - delta) / 2)
    rate = scipy.optimize.minimize_scalar(
        minus_log_likelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}
    ).x
    variance = images * (2 * rate + delta - delta**2)
    return (only_variant - only_baseline - images * delta) / math.sqrt(variance)


class TestPairedDeltaInterval:
    @pytest.mark.parametrize(
        ("counts", "published"),
        [
            # Fagerland, Lydersen and Laake 2017, "Statistical Analysis of Contingency Tables",
            # chapter 8, Tango's interval; their difference is first minus second.
            ((59, 16, 6, 80), (-0.1240, -0.0054)),  # Cavo et al. 2012
            ((1, 7, 1, 12), (-0.517, -0.026)),  # Bentur et al. 2009, with the two swapped
        ],
    )
    def test_equals_the_published_examples(self, counts, published):
        low, high = limits(paired_delta_interval(*counts))
        digits = 4 if published[0] == -0.1240 else 3
        assert (round(low, digits), round(high, digits)) == published

    @pytest.mark.parametrize(
        ("lost", "gained", "images"), [(3, 1, 400), (10, 6, 400), (16, 4, 400), (40, 20, 160), (5, 0, 30)]
    )
    def test_limits_are_roots_of_the_score_statistic(self, lost, gained, images):
        z = scipy.stats.norm.ppf(0.975)
        estimate = (gained - lost) / images

        def root(target, end):
            return scipy.optimize.brentq(
                lambda delta: score_by_maximum_likelihood(lost, gained, images, delta) - target, estimate, end
            )

        expected = root(z, estimate - 0.3), root(-z, estimate + 0.3)
        both_right = (images - lost - gained) // 2
        interval = paired_delta_interval(both_right, lost, gained, images - lost - gained - both_right)
        assert limits(interval) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(("lost", "gained"), itertools.product(range(0, 24, 3), range(0, 24, 4)))
    def test_excludes_zero_exactly_when_the_score_test_rejects(self, lost, gained):
        interval = paired_delta_interval(300, lost, gained, 50)
        rejects = (gained - lost) ** 2 > scipy.stats.chi2.ppf(0.95, 1) * (gained + lost)
        assert covers(interval, 0.0) == (not rejects)

    def test_identical_models(self):
        z_squared = scipy.stats.chi2.ppf(0.95, 1)
        reach = z_squared / (400 + z_squared)
        assert limits(paired_delta_interval(356, 0, 0, 44)) == pytest.approx((-reach, reach))

    def test_every_image_lost_or_gained(self):
        assert paired_delta_interval(0, 50, 0, 0).low == -1.0
        assert paired_delta_interval(0, 0, 50, 0).high == 1.0

    def test_swapping_the_models_swaps_the_signs(self):
        low, high = limits(paired_delta_interval(340, 12, 4, 44))
        assert limits(paired_delta_interval(340, 4, 12, 44)) == pytest.approx((-high, -low))

    @pytest.mark.parametrize(
        ("lost_rate", "gained_rate", "most"),
        [
            (0.025, 0.015, 0.97),
            (0.0125, 0.0075, 0.97),
            # Four discordant images on average: few tables are possible, so coverage is uneven.
            (0.0075, 0.0025, 0.98),
        ],
    )
    def test_covers_the_true_difference(self, lost_rate, gained_rate, most):
        images, both_right = 400, 0.89 - lost_rate
        rates = [both_right, lost_rate, gained_rate, 1 - both_right - lost_rate - gained_rate]
        tables = np.random.default_rng(1).multinomial(images, rates, CASES)
        distinct, cases = np.unique(tables[:, 1:3], axis=0, return_counts=True)
        covered = sum(
            int(count)
            for (lost, gained), count in zip(distinct.tolist(), cases, strict=True)
            if covers(paired_delta_interval(images - lost - gained, lost, gained, 0), gained_rate - lost_rate)
        )
        assert 0.93 <= covered / CASES <= most

    @pytest.mark.parametrize(
        ("counts", "message"),
        [((0, 0, 0, 0), "at least one image, got none"), ((9, -1, 0, 1), "cannot be negative")],
    )
    def test_rejects(self, counts, message):
        with pytest.raises(ValueError, match=message):
            paired_delta_interval(*counts)


def test_a_ratio_limits_are_those_of_scipy():
    rng = np.random.default_rng(0)
    both = np.exp(rng.multivariate_normal([0, 1], [[1, 0.8], [0.8, 1]], 300))
    found = ratio_interval(both[:, 0], both[:, 1])
    expected = scipy.stats.bootstrap(
        (both[:, 0], both[:, 1]),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.02)


def test_a_ratio_it_is_always_the_same_and_exact_where_images_agree():
    values = np.arange(1.0, 50.0)
    assert ratio_interval(values, values[::-1]) == ratio_interval(values, values[::-1])
    half = ratio_interval(values / 2, values)
    assert (half.low, half.high) == pytest.approx((0.5, 0.5))


def test_a_ratio_many_images_are_drawn_in_parts(monkeypatch):
    rng = np.random.default_rng(2)
    values = rng.exponential(size=(2, 100))
    whole = ratio_interval(*values)
    monkeypatch.setattr(intervals, "_RATIO_WEIGHTS_AT_ONCE", 1700)
    parts = ratio_interval(*values)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=0.05)


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [0.0]), ([1.0, 2.0], [1.0]), ([-1.0], [1.0])])
def test_a_ratio_what_has_no_ratio_is_refused(above, below):
    with pytest.raises(ValueError):
        ratio_interval(above, below)
