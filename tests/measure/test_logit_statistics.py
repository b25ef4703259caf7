import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

from vitopt.measure.logit_statistics import (
    calibration_noise,
    expected_calibration_error,
    mean_kl_divergence,
    normalised_error,
    topk_correct,
)


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
