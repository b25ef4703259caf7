import numpy as np
import pytest
import scipy.stats

from vitopt.measure.bootstrap import positive_mean_interval

RUNS = 150


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda random, count: random.lognormal(0, 1, count), np.exp(0.5)),
        (lambda random, count: random.gamma(0.3, 1, count), 0.3),
    ],
)
def test_covers_the_mean_of_heavy_tails(draw, mean):
    random = np.random.default_rng(5)
    found = [positive_mean_interval(draw(random, 200), resamples=400) for _ in range(RUNS)]
    above = sum(interval.low > mean for interval in found)
    below = sum(interval.high < mean for interval in found)
    # Either limit should miss in 2.5 % of runs; the tail that a sample has not seen makes the upper one miss more.
    assert above <= 0.06 * RUNS and below <= 0.08 * RUNS


def test_is_close_to_the_studentised_interval_of_scipy_where_tails_are_light():
    sample = np.random.default_rng(1).normal(10, 1, 400)
    expected = scipy.stats.t.interval(0.95, 399, sample.mean(), scipy.stats.sem(sample))
    interval = positive_mean_interval(sample)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=0.01)


def test_reaches_further_up_than_down_and_is_the_same_each_time():
    sample = np.random.default_rng(2).lognormal(0, 1.5, 300)
    interval = positive_mean_interval(sample)
    assert interval == positive_mean_interval(sample)
    assert 0 < sample.mean() - interval.low < interval.high - sample.mean()


def test_scales_with_its_values():
    sample = np.random.default_rng(3).lognormal(0, 1, 100)
    one, thousandth = positive_mean_interval(sample), positive_mean_interval(sample / 1000)
    assert (one.low / 1000, one.high / 1000) == pytest.approx((thousandth.low, thousandth.high))


def test_of_too_few_values_there_is_none():
    assert positive_mean_interval(np.ones(29)) is None
    assert positive_mean_interval([0.0] * 400 + [1.0]) is None  # one value says nothing of how rare its kind is


def test_of_equal_values_is_that_value():
    interval = positive_mean_interval(np.zeros(30))
    assert (interval.low, interval.high) == (0, 0)


@pytest.mark.parametrize("values", [[-1.0] * 40, [np.nan] * 40, np.ones((40, 2))])
def test_rejects(values):
    with pytest.raises(ValueError, match="not negative"):
        positive_mean_interval(values)
