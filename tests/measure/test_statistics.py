import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from conftest import covers, limits
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from vitopt.measure.statistics import (
    PairedCounts,
    agreement,
    calibration_noise,
    expected_calibration_error,
    holm,
    mcnemar_exact_p,
    mean_kl_divergence,
    normalised_error,
    paired_counts,
    paired_delta_interval,
    pareto_front,
    topk_correct,
    wilson_interval,
)

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


class TestMcnemarExactP:
    @pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 5), (6, 16), (30, 12), (700, 780)])
    def test_equals_statsmodels(self, lost, gained):
        expected = mcnemar([[100, lost], [gained, 50]], exact=True).pvalue if lost + gained else 1.0
        assert mcnemar_exact_p(lost, gained) == pytest.approx(expected, rel=1e-9)

    def test_rejects_a_negative_count(self):
        with pytest.raises(ValueError, match="cannot be negative, got -1 and 3"):
            mcnemar_exact_p(-1, 3)


class TestHolm:
    @pytest.mark.parametrize("p_values", [[0.03], [0.01, 0.04, 0.03], [0.2, 0.001, 0.02, 0.02, 1.0], [0.5, 0.6]])
    def test_equals_statsmodels(self, p_values):
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])

    def test_of_nothing_is_nothing(self):
        assert holm([]) == []


class TestPairedCounts:
    def test_counts_each_kind(self):
        baseline = np.array([True, True, True, False, False, True])
        variant = np.array([True, False, False, True, False, True])
        assert paired_counts(baseline, variant) == PairedCounts(2, 2, 1, 1)

    @pytest.mark.parametrize(
        ("baseline", "variant", "message"),
        [
            ([True], [True, False], "differ in length: 1 and 2"),
            ([], [], "at least one value, got empty arrays"),
            ([3, 4], [3, 4], "expected arrays of bool, got int64 and int64"),
            ([[True]], [[True]], r"flat arrays, got shapes \(1, 1\) and \(1, 1\)"),
        ],
    )
    def test_rejects(self, baseline, variant, message):
        with pytest.raises(ValueError, match=message):
            paired_counts(baseline, variant)


class TestAgreement:
    def test_is_the_share_of_equal_classes(self):
        assert agreement([3, 1, 2, 0], [3, 1, 0, 2]) == 0.5

    def test_rejects_different_lengths(self):
        with pytest.raises(ValueError, match="differ in length: 2 and 3"):
            agreement([1, 2], [1, 2, 3])


class TestMeanKlDivergence:
    def test_equals_scipy(self):
        baseline, variant = np.random.default_rng(3).normal(0, 4, (2, 50, 10))
        p, q = scipy.special.softmax(baseline, axis=1), scipy.special.softmax(variant, axis=1)
        expected = scipy.stats.entropy(p, q, axis=1).mean()
        assert mean_kl_divergence(baseline, variant) == pytest.approx(expected)

    def test_is_zero_for_equal_logits_and_for_shifted_ones(self):
        logits = np.random.default_rng(4).normal(0, 4, (50, 10)).astype(np.float16)
        assert mean_kl_divergence(logits, logits) == 0.0
        assert mean_kl_divergence(logits, logits.astype(np.float64) + 100) == pytest.approx(0.0, abs=1e-12)

    def test_is_stable_for_large_logits(self):
        assert mean_kl_divergence([[5000.0, 0.0]], [[0.0, 5000.0]]) == pytest.approx(5000.0)

    @pytest.mark.parametrize(
        ("baseline", "variant", "message"),
        [
            (np.zeros((2, 3)), np.zeros((2, 4)), r"differ in shape: \(2, 3\) and \(2, 4\)"),
            (np.zeros((0, 3)), np.zeros((0, 3)), r"not empty, got shape \(0, 3\)"),
            (np.zeros((1, 2)), [[math.nan, 0.0]], "logits must be finite"),
        ],
    )
    def test_rejects(self, baseline, variant, message):
        with pytest.raises(ValueError, match=message):
            mean_kl_divergence(baseline, variant)


class TestNormalisedError:
    def test_is_relative_to_the_reference(self):
        assert normalised_error([[3.0], [4.0]], [[3.0], [5.0]]) == pytest.approx(0.2)

    def test_does_not_overflow_in_half_precision(self):
        reference = np.full(10, 60_000, np.float16)
        assert normalised_error(reference, -reference) == pytest.approx(2.0)

    @pytest.mark.parametrize(
        ("reference", "other", "message"),
        [
            ([1.0], [1.0, 2.0], r"differ in shape: \(1,\) and \(2,\)"),
            ([0.0], [1.0], "empty or all zeros"),
            ([], [], "empty or all zeros"),
        ],
    )
    def test_rejects(self, reference, other, message):
        with pytest.raises(ValueError, match=message):
            normalised_error(reference, other)


def calibration_error_by_loops(logits, labels, bins):
    probabilities = scipy.special.softmax(logits, axis=1)
    error = 0.0
    for index in range(bins):
        members = [image for image, row in enumerate(probabilities) if index / bins < row.max() <= (index + 1) / bins]
        if members:
            accuracy = np.mean([probabilities[image].argmax() == labels[image] for image in members])
            confidence = np.mean([probabilities[image].max() for image in members])
            error += len(members) / len(labels) * abs(accuracy - confidence)
    return error


class TestExpectedCalibrationError:
    @pytest.mark.parametrize("bins", [1, 10, 15])
    def test_equals_the_definition(self, bins):
        generator = np.random.default_rng(5)
        logits, labels = generator.normal(0, 2, (300, 5)), generator.integers(0, 5, 300)
        expected = calibration_error_by_loops(logits, labels, bins)
        assert expected_calibration_error(logits, labels, bins) == pytest.approx(expected)

    def test_is_zero_for_calibrated_and_one_for_surely_wrong(self):
        even = np.zeros((4, 2))
        assert expected_calibration_error(even, np.array([0, 1, 0, 1])) == 0.0
        assert expected_calibration_error([[0.0, 1e4]], np.array([0])) == 1.0

    def test_rejects_zero_bins(self):
        with pytest.raises(ValueError, match="at least one bin, got 0"):
            expected_calibration_error([[0.0, 1.0]], [0], bins=0)


def calibrated(images, generator, temperature=1.0):
    """Logits and labels of a model whose confidences are true; divided by a temperature they are not."""
    logits = generator.normal(0, 3, (images, 10))
    chances = scipy.special.softmax(logits, axis=1).cumsum(axis=1)
    labels = (generator.random((images, 1)) > chances).sum(axis=1).clip(max=9)
    return logits / temperature, labels


class TestCalibrationNoise:
    def test_a_calibrated_model_has_no_error_above_it(self):
        generator = np.random.default_rng(20)
        models = [calibrated(400, generator) for _ in range(60)]
        errors = [expected_calibration_error(*model) for model in models]
        above = [error - calibration_noise(model[0]) for error, model in zip(errors, models, strict=True)]
        assert np.mean(errors) > 0.04
        assert abs(np.mean(above)) < 0.005

    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_the_error_of_others_stays(self, temperature):
        generator = np.random.default_rng(21)
        truth = expected_calibration_error(*calibrated(200_000, generator, temperature))
        models = [calibrated(400, generator, temperature) for _ in range(60)]
        above = np.mean([expected_calibration_error(*model) - calibration_noise(model[0]) for model in models])
        noise = np.mean([calibration_noise(model[0]) for model in models])
        assert truth - noise - 0.01 < above < truth + 0.01 and above > 2 * noise

    def test_equals_the_sum_over_every_outcome(self):
        chances = np.array([0.97, 0.9, 0.62, 0.55, 0.51])
        logits = np.stack([np.log(chances), np.log(1 - chances)], axis=1)
        expected = 0.0
        for outcome in itertools.product([0, 1], repeat=5):
            probability = np.prod(np.where(np.array(outcome) == 0, chances, 1 - chances))
            expected += probability * calibration_error_by_loops(logits, np.array(outcome), 4)
        assert calibration_noise(logits, 4, draws=10_000) == pytest.approx(expected, abs=0.002)

    def test_is_the_same_every_time_and_rejects_zero_bins(self):
        logits = np.random.default_rng(22).normal(0, 2, (50, 4))
        assert calibration_noise(logits) == calibration_noise(logits)
        with pytest.raises(ValueError, match="at least one bin, got 0"):
            calibration_noise(logits, bins=0)


class TestTopkCorrect:
    @pytest.mark.parametrize("k", [1, 3, 5])
    def test_equals_a_stable_sort(self, k):
        generator = np.random.default_rng(6)
        # Small integers tie often.
        logits, labels = generator.integers(0, 4, (200, 8)), generator.integers(0, 8, 200)
        order = np.argsort(-logits, axis=1, kind="stable")
        expected = (order[:, :k] == labels[:, np.newaxis]).any(axis=1)
        assert (topk_correct(logits, labels, k) == expected).all()

    def test_of_equal_logits_the_lower_class_comes_first(self):
        assert topk_correct(np.zeros((4, 4)), np.arange(4), 2).tolist() == [True, True, False, False]

    def test_k_above_the_classes_is_always_right(self):
        assert topk_correct(np.zeros((3, 3)), np.arange(3), 5).all()

    @pytest.mark.parametrize(
        ("logits", "labels", "k", "message"),
        [
            ([[0.0, 1.0]], [0], 0, "k must be at least 1, got 0"),
            ([[0.0, 1.0]], [0, 1], 1, r"1 images need labels of shape \(1,\), got \(2,\)"),
            ([[0.0, 1.0]], [2], 1, "labels must lie between 0 and 1, got 2 to 2"),
            ([[0.0, 1.0]], [-1], 1, "labels must lie between 0 and 1, got -1 to -1"),
            ([[0.0, 1.0]], [0.0], 1, "labels must be class indices, got float64"),
            ([0.0, 1.0], [0], 1, r"logits must be \(images, classes\) and not empty, got shape \(2,\)"),
            ([[math.nan, math.nan]], [0], 1, "logits must be finite"),
        ],
    )
    def test_rejects(self, logits, labels, k, message):
        with pytest.raises(ValueError, match=message):
            topk_correct(logits, labels, k)


class TestParetoFront:
    def test_equals_the_definition(self):
        costs, scores = np.random.default_rng(12).integers(0, 12, (2, 60))

        def beaten(i):
            return any(
                costs[j] <= costs[i] and scores[j] >= scores[i] and (costs[j] < costs[i] or scores[j] > scores[i])
                for j in range(60)
            )

        front = pareto_front(costs, scores)
        assert set(front) == {i for i in range(60) if not beaten(i)}
        assert front == sorted(front, key=lambda i: costs[i])

    def test_equal_points_stay_together(self):
        assert pareto_front([2.0, 1.0, 2.0, 3.0], [5.0, 1.0, 5.0, 5.0]) == [1, 0, 2]

    @pytest.mark.parametrize(
        ("costs", "scores", "message"),
        [
            ([], [], "got empty arrays"),
            ([1.0], [1.0, 2.0], "differ in length: 1 and 2"),
            ([math.nan], [1.0], "got NaN"),
        ],
    )
    def test_rejects(self, costs, scores, message):
        with pytest.raises(ValueError, match=message):
            pareto_front(costs, scores)
