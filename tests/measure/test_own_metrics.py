"""Metrics of the user's own: values, intervals, changes against the baseline, and what goes wrong."""

from typing import Any

import datasets
import evaluate
import numpy as np
import pytest
from scipy import stats

from vitopt.errors import MeasurementError, RecipeError
from vitopt.measure.metrics import TopKAccuracy
from vitopt.measure.own_metrics import OwnMetrics, measure_metrics, named
from vitopt.measure.predictions import Predictions


def predictions(logits: np.ndarray, labels: np.ndarray, groups: tuple[str, ...] | None = None) -> Predictions:
    ids = tuple(map(str, range(len(labels))))
    return Predictions(ids, ids, labels, logits.astype(np.float32), groups)


RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, (200, 3))
BEFORE = predictions(LABELS + RNG.normal(0, 1.0, LABELS.shape), LABELS)
AFTER = predictions(BEFORE.logits + RNG.normal(0, 0.3, LABELS.shape), LABELS)


def fit(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Of all images together: no mean of values."""
    return float(np.corrcoef(outputs.ravel(), labels.ravel())[0, 1])


def first_error(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A value for each image."""
    return np.abs(outputs - labels)[:, 0]


def measured(metrics: Any, **variants: Predictions) -> dict[str, OwnMetrics]:
    return measure_metrics(named(metrics), variants, next(iter(variants)))


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    found = measured(first_error, before=BEFORE)["before"].figures["first_error"]
    values = first_error(BEFORE.logits, LABELS)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=5000, rng=1).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert found.ci95 == pytest.approx((expected.low, expected.high), abs=0.2 * (expected.high - expected.low))


def test_a_change_is_paired_image_by_image() -> None:
    found = measured({"fit": fit}, before=BEFORE, after=AFTER)
    before, after = found["before"].figures["fit"], found["after"].figures["fit"]
    assert before.delta is None and after.baseline == "before"
    assert after.delta == pytest.approx(fit(AFTER.logits, LABELS) - fit(BEFORE.logits, LABELS))
    low, high = after.delta_ci95
    expected = stats.bootstrap(
        (np.arange(len(LABELS)),),
        lambda drawn: fit(AFTER.logits[drawn], LABELS[drawn]) - fit(BEFORE.logits[drawn], LABELS[drawn]),
        vectorized=False,
        method="percentile",
        n_resamples=2000,
        rng=1,
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.25 * (expected.high - expected.low))
    # Both are on the same images, so their difference is known better than either.
    assert high - low < (before.ci95[1] - before.ci95[0]) / 1.5


def test_groups_are_drawn_whole() -> None:
    values, groups = np.repeat(RNG.normal(size=40), 5), tuple(np.repeat(np.arange(40), 5).astype(str))
    alone, grouped = (
        measured({"m": lambda o, _: o[:, 0]}, a=predictions(values[:, None], np.zeros(200, int), g))["a"].figures["m"]
        for g in (None, groups)
    )
    widths = [one.ci95[1] - one.ci95[0] for one in (alone, grouped)]
    assert widths[1] / widths[0] == pytest.approx(np.sqrt(5), rel=0.2)


def test_the_same_seed_gives_the_same_interval() -> None:
    assert measured({"fit": fit}, a=BEFORE) == measured({"fit": fit}, a=BEFORE)


def test_a_dict_gives_a_figure_for_each_key() -> None:
    found = measured(lambda o, y: {"low": o.min(), "each": o[:, 0]}, a=BEFORE)["a"]
    assert found.figures["low"].value == pytest.approx(BEFORE.logits.min()) and found.figures["each"].ci95 is not None


def test_metrics_of_evaluate_get_outputs_or_classes_as_their_features_say() -> None:
    class OfClasses(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            features = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            return evaluate.MetricInfo(description="", citation="", features=datasets.Features(features))

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            return {"right": float(np.mean(np.equal(predictions, references)))}

    labels = np.arange(20) % 3
    outputs = predictions(np.eye(3)[np.where(np.arange(20) < 5, 0, labels)], labels)
    expected = float(outputs.correct.mean())
    found = measured({"top": TopKAccuracy(), "classes": OfClasses()}, a=outputs)["a"].figures
    assert found["right"].value == pytest.approx(expected) and found["top1_percent"].value == pytest.approx(
        100 * expected
    )


def test_few_images_have_a_value_and_no_interval() -> None:
    found = measured({"fit": fit}, a=predictions(BEFORE.logits[:29], LABELS[:29]))["a"]
    assert found.figures["fit"].ci95 is None and "29" in found.missing["metrics.fit.ci95"]


def test_copies_that_find_each_other_make_no_interval() -> None:
    def recall(outputs: np.ndarray, labels: np.ndarray) -> float:
        distances = np.linalg.norm(outputs[:, None] - outputs[None], axis=2)
        np.fill_diagonal(distances, np.inf)
        return float((labels[distances.argmin(1)] == labels).mean())

    outputs = predictions(RNG.normal(size=(60, 4)), RNG.integers(0, 3, 60))
    found = measured(recall, a=outputs)["a"]
    assert found.figures["recall"].ci95 is None and "copies" in found.missing["metrics.recall.ci95"]


def test_a_metric_that_never_changes_has_no_interval() -> None:
    found = measured({"one": lambda o, y: 1.0}, a=BEFORE)["a"]
    assert found.figures["one"].value == 1 and "same" in found.missing["metrics.one.ci95"]


def _raising(outputs: np.ndarray, labels: np.ndarray) -> float:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (_raising, r"own.*no such thing"),
        (lambda o, y: "good", r"own.*str"),
        (lambda o, y: None, r"own.*None"),
        (lambda o, y: o, r"own.*\(200, 3\)"),
        (lambda o, y: float("nan"), r"own.*finite"),
        (lambda o, y: {}, r"own.*dict"),
    ],
)
def test_a_metric_that_fails_on_the_baseline_is_named(metric: Any, words: str) -> None:
    with pytest.raises(MeasurementError, match=words):
        measured({"own": metric}, a=BEFORE)


def test_a_metric_that_fails_on_another_leaves_the_rest() -> None:
    def picky(outputs: np.ndarray, labels: np.ndarray) -> float:
        if np.array_equal(outputs[:5], AFTER.logits[:5]):
            raise ValueError("not this one")
        return float(outputs.mean())

    found = measured({"picky": picky, "fit": fit}, before=BEFORE, after=AFTER)
    assert set(found["after"].figures) == {"fit"} and "not this one" in found["after"].missing["metrics.picky"]


def test_what_is_no_metric_or_is_named_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"own.*str"):
        named({"own": "accuracy"})
    with pytest.raises(RecipeError, match="'a'"):
        measured({"x": lambda o, y: {"a": 1.0}, "a": lambda o, y: 2.0}, v=BEFORE)
