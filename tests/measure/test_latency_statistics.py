"""Statistics of latency against scipy, and their coverage by simulation."""

import math

import numpy as np
import pytest
import scipy.stats
from conftest import covers, limits
from numpy.typing import NDArray

from vitopt.measure.latency_statistics import (
    calls_needed,
    latency_summary,
    mean_speedup,
    quantile_interval,
    speedup_interval,
)

CASES = 2_000


class TestLatencySummary:
    def test_equals_numpy(self):
        samples = np.random.default_rng(7).lognormal(2, 0.3, 150)
        summary = latency_summary(samples)
        assert summary.count == 150
        assert summary.mean_ms == pytest.approx(samples.mean())
        assert summary.std_ms == pytest.approx(samples.std())
        assert summary.min_ms == samples.min()
        percentiles = (summary.p50_ms, summary.p95_ms, summary.p99_ms)
        assert percentiles == pytest.approx(tuple(np.percentile(samples, [50, 95, 99])))

    @pytest.mark.parametrize(
        ("count", "has_p95", "has_p99"), [(1, 0, 0), (19, 0, 0), (20, 1, 0), (99, 1, 0), (100, 1, 1)]
    )
    def test_a_percentile_needs_samples(self, count, has_p95, has_p99):
        summary = latency_summary(np.ones(count))
        assert (summary.p95_ms is not None, summary.p99_ms is not None) == (has_p95, has_p99)

    @pytest.mark.parametrize(
        ("samples", "message"),
        [
            ([], r"flat array and not empty, got shape \(0,\)"),
            ([1.0, 0.0], "positive and finite"),
            ([1.0, math.nan], "positive and finite"),
        ],
    )
    def test_rejects(self, samples, message):
        with pytest.raises(ValueError, match=message):
            latency_summary(samples)


class TestSpeedupInterval:
    def test_equals_a_t_interval_of_the_logarithms(self):
        generator = np.random.default_rng(8)
        baseline, variant = generator.lognormal(2, 0.1, (6, 9)), generator.lognormal(1.5, 0.1, (6, 9))
        logs = np.log(np.median(baseline, axis=1) / np.median(variant, axis=1))
        expected = scipy.stats.t.interval(0.9, 5, logs.mean(), scipy.stats.sem(logs))
        speedup = speedup_interval(list(baseline), list(variant), confidence=0.9)
        assert speedup.ratio == pytest.approx(math.exp(logs.mean()))
        assert limits(speedup.interval) == pytest.approx(np.exp(expected))

    @pytest.mark.parametrize("rounds", [1, 2])
    def test_few_rounds_give_no_interval(self, rounds):
        speedup = speedup_interval([[8.0, 9.0, 7.0]] * rounds, [[4.0, 4.5]] * rounds)
        assert speedup.ratio == pytest.approx(8 / 4.25)
        assert speedup.interval is None

    def test_covers_the_true_ratio_on_a_drifting_machine(self):
        generator = np.random.default_rng(9)
        rounds, samples, truth = 8, 11, 1.68
        # Per case and round: the machine's speed, a random walk that both models see ...
        machine = np.cumsum(generator.normal(0, 0.2, (CASES, rounds, 1)), axis=1)
        # ... and what differs between one block of samples and the next, and within it.
        block = generator.normal(0, 0.02, (2, CASES, rounds, 1))
        noise = generator.exponential(0.05, (2, CASES, rounds, samples))
        baseline, variant = np.exp(machine + block + noise) * np.array([truth, 1]).reshape(2, 1, 1, 1)
        speedups = [speedup_interval(list(a), list(b)) for a, b in zip(baseline, variant, strict=True)]
        covered = np.mean([covers(speedup.interval, truth) for speedup in speedups])
        assert 0.93 <= covered <= 0.97

    @pytest.mark.parametrize("rounds", [7, 10])
    @pytest.mark.parametrize("samples", [10, 30])
    def test_is_right_while_the_machine_slows_down_twofold(self, rounds, samples):
        generator = np.random.default_rng(10)
        truth = 1.68
        slowdown = np.geomspace(1, 2, 2 * rounds * samples).reshape(rounds, 2, samples)
        # The model that goes first alternates.
        slowdown[1::2] = slowdown[1::2, ::-1]
        measured = slowdown * generator.lognormal(0, 0.02, slowdown.shape)
        speedup = speedup_interval(list(10 * truth * measured[:, 0]), list(10 * measured[:, 1]))
        assert speedup.ratio == pytest.approx(truth, rel=0.02)
        assert covers(speedup.interval, truth)

    @pytest.mark.parametrize(
        ("baseline", "variant", "message"),
        [
            ([], [], "at least one round, got none"),
            ([[1.0]], [[1.0], [2.0]], "need the same rounds, got 1 and 2"),
            ([[1.0]], [[]], "flat array and not empty"),
            ([[1.0]], [[-1.0]], "positive and finite"),
        ],
    )
    def test_rejects(self, baseline, variant, message):
        with pytest.raises(ValueError, match=message):
            speedup_interval(baseline, variant)


class TestQuantileInterval:
    @pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
    @pytest.mark.parametrize("quantile", [0.5, 0.95, 0.99])
    @pytest.mark.parametrize("count", [5, 20, 72, 100, 368, 2_000])
    def test_ranks_are_those_of_the_binomial_distribution(self, count, quantile, confidence):
        tail = (1 - confidence) / 2
        # Rank r lies above the quantile if fewer than r samples are below it, so with probability cdf(r - 1).
        chances = {rank: scipy.stats.binom.cdf(rank - 1, count, quantile) for rank in range(1, count + 1)}
        low = max((rank for rank, above in chances.items() if above <= tail), default=None)
        high = min((rank for rank, above in chances.items() if 1 - above <= tail), default=None)
        samples = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))  # each sample is its own rank
        assert quantile_interval(samples, quantile, confidence) == (low, high)

    @pytest.mark.parametrize(("quantile", "count"), [(0.5, 100), (0.95, 100), (0.95, 400), (0.99, 400), (0.99, 2_000)])
    def test_both_limits_are_missed_as_rarely_as_promised_on_heavy_tails(self, quantile, count):
        tail = scipy.stats.pareto(1.5)  # not even a variance
        samples = tail.rvs((CASES, count), random_state=np.random.default_rng(1))
        found = np.array([quantile_interval(one, quantile) for one in samples])
        truth = tail.ppf(quantile)
        # Each limit misses in at most 2.5 %; 3.3 % is 2.3 standard errors of 2,000 cases above.
        assert np.mean(found[:, 0] > truth) <= 0.033
        assert np.mean(found[:, 1] < truth) <= 0.033

    def test_a_plain_p99_of_100_calls_is_mostly_below_the_true_one_and_gets_no_upper_limit(self):
        tail = scipy.stats.lognorm(0.5)
        samples = tail.rvs((CASES, 100), random_state=np.random.default_rng(2))
        assert np.mean(np.percentile(samples, 99, axis=1) < tail.ppf(0.99)) > 0.6
        assert all(latency_summary(one).p99_ci95_ms[1] is None for one in samples[:10])

    def test_stays_exact_for_very_many_samples(self):
        low, high = quantile_interval(np.arange(1.0, 200_001), 0.99)
        expected = scipy.stats.binom.ppf([0.025, 0.975], 200_000, 0.99)
        assert (low, high) == (expected[0], expected[1] + 1)

    def test_equal_samples_are_their_own_limits(self):
        assert quantile_interval([3.0] * 400, 0.99) == (3.0, 3.0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([1.0], 1.0), "quantile must lie between 0 and 1, got 1.0"),
            (([1.0], 0.5, 0.0), "confidence must lie between 0 and 1, got 0.0"),
            (([], 0.5), "not empty"),
        ],
    )
    def test_rejects(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            quantile_interval(*arguments)


class TestCallsNeeded:
    @pytest.mark.parametrize(
        ("quantile", "confidence", "calls"), [(0.95, 0.95, 72), (0.99, 0.95, 368), (0.95, 0.9, 59), (0.99, 0.9, 299)]
    )
    def test_is_the_first_count_with_an_upper_limit(self, quantile, confidence, calls):
        assert calls_needed(quantile, confidence) == calls
        assert quantile_interval(np.ones(calls - 1), quantile, confidence)[1] is None
        assert quantile_interval(np.ones(calls), quantile, confidence)[1] is not None

    def test_mlperf_asks_for_662_with_the_second_slowest_as_the_limit(self):
        missed = scipy.stats.binom.cdf(1, [661, 662], 0.01)  # at most one call above the true p99
        assert missed[0] > 0.01 >= missed[1]

    def test_rejects_a_quantile_that_no_sample_bounds(self):
        with pytest.raises(ValueError, match="between 0 and 1, got 1"):
            calls_needed(1.0)


def slow_at_times(rng: np.random.Generator, rounds: int, calls: int) -> list[NDArray[np.float64]]:
    """One call in ten takes six times as long."""
    return [np.where(rng.random(calls) < 0.1, 6.0, 1.0) * np.exp(rng.normal(0, 0.03, calls)) for _ in range(rounds)]


def test_a_mean_speedup_counts_the_calls_that_take_longer() -> None:
    rng = np.random.default_rng(0)
    before, after = [np.full(30, 6.0)] * 10, slow_at_times(rng, 10, 30)
    found = mean_speedup(before, after)
    assert found.ratio == pytest.approx(6 / np.concatenate(after).mean())
    assert speedup_interval(before, after).ratio == pytest.approx(6, rel=0.05)  # a median sees none of them


def test_the_interval_of_a_mean_speedup_covers_the_truth() -> None:
    rng, truth = np.random.default_rng(0), 6 / 1.5
    found = [mean_speedup([np.full(30, 6.0)] * 10, slow_at_times(rng, 10, 30)).interval for _ in range(500)]
    assert 0.9 < np.mean([one is not None and one.low <= truth <= one.high for one in found]) < 0.98


def test_a_mean_speedup_of_steady_calls_is_that_of_medians() -> None:
    rng = np.random.default_rng(0)
    before, after = ([scale * np.exp(rng.normal(0, 0.01, 20)) for _ in range(8)] for scale in (3.0, 2.0))
    one, other = mean_speedup(before, after), speedup_interval(before, after)
    assert one.ratio == pytest.approx(other.ratio, rel=0.01)
    assert mean_speedup(before[:2], after[:2]).interval is None
    with pytest.raises(ValueError, match="same rounds"):
        mean_speedup(before, after[:3])
