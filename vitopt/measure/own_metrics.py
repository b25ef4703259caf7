"""The user's own metrics: of all outputs and labels, with an interval, and against the baseline image by image."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitopt import progress
from vitopt.errors import MeasurementError, RecipeError
from vitopt.measure.bootstrap import percentile_interval, resampled_images
from vitopt.measure.predictions import Predictions
from vitopt.records import Metric

Compute = Callable[[NDArray[Any], NDArray[Any]], Any]
_FEWEST_IMAGES = 30


@dataclass(frozen=True)
class OwnMetrics:
    """What was measured of one variant: figures by name, and why others or their intervals are missing."""

    figures: dict[str, Metric] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Figure:
    """The value of a metric, and its values on resampled images; without these, `missing` says why."""

    value: float
    resampled: NDArray[np.float64] | None = None
    missing: str | None = None


def named(metrics: Any) -> dict[str, Compute]:
    """By name, functions of (outputs, labels): from one or a mapping of functions or of `evaluate.Metric`s.

    Raises:
        RecipeError: something else.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        metrics = {getattr(metrics, "name", None) or getattr(metrics, "__name__", type(metrics).__name__): metrics}
    functions: dict[str, Compute] = {}
    for name, metric in metrics.items():
        if hasattr(metric, "compute") and hasattr(metric, "features"):
            functions[str(name)] = _of_evaluate(metric)
        elif callable(metric):
            functions[str(name)] = metric
        else:
            raise RecipeError(f"metric {name} is a {type(metric).__name__}; give a function of (outputs, labels)")
    return functions


def _of_evaluate(metric: Any) -> Compute:
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    of_classes = not hasattr(features["predictions"], "feature")  # a single value for each image, not a list

    def compute(outputs: NDArray[Any], labels: NDArray[Any]) -> Any:
        return metric.compute(predictions=outputs.argmax(axis=1) if of_classes else outputs, references=labels)

    return compute


def measure_metrics(
    metrics: Mapping[str, Compute], predictions: Mapping[str, Predictions], baseline: str | None
) -> dict[str, OwnMetrics]:
    """Every metric of every variant, by the variant's name.

    A metric is a function of outputs (images, outputs) and labels, (images,) or (images, labels) of 0 and 1. It returns
    a number, a value for each image, whose mean counts, or a dict of either. Its interval is a bootstrap over images.
    One that compares images with each other, as retrieval does, must return a value for each image: a resample holds
    copies, which would find each other. Where that shows, there is no interval.

    Raises:
        MeasurementError: a metric fails on the baseline, or without one on the first variant, or returns no number.
        RecipeError: two have one name.
    """
    first = baseline if baseline in predictions else next(iter(predictions), None)
    by_variant: dict[str, dict[str, _Figure]] = {}
    missing: dict[str, dict[str, str]] = {name: {} for name in predictions}
    for variant in sorted(predictions, key=lambda name: name != first):
        by_variant[variant] = {}
        for name, compute in metrics.items():
            try:
                with progress.task(f"{name} of {variant}", None):
                    figures = _figures(name, compute, predictions[variant])
            except MeasurementError as error:
                if variant == first:
                    raise
                missing[variant][f"metrics.{name}"] = str(error)
                continue
            if twice := set(figures) & set(by_variant[variant]):
                raise RecipeError(f"two metrics are called {min(twice)!r}: name one of them otherwise")
            by_variant[variant] |= figures
    results = {}
    for variant, figures in by_variant.items():
        reference = {} if baseline in (None, variant) else by_variant.get(str(baseline), {})
        own = {name: _against(figure, reference.get(name), baseline) for name, figure in figures.items()}
        why = {f"metrics.{name}.ci95": figure.missing for name, figure in figures.items() if figure.missing}
        results[variant] = OwnMetrics(own, missing[variant] | why)
    return results


def _against(figure: _Figure, reference: _Figure | None, baseline: str | None) -> Metric:
    metric = Metric(value=figure.value, ci95=_interval(figure.resampled))
    if reference is None:
        return metric
    paired = None
    if figure.resampled is not None and reference.resampled is not None:
        paired = figure.resampled - reference.resampled
    change = {"baseline": baseline, "delta": figure.value - reference.value, "delta_ci95": _interval(paired)}
    return metric.model_copy(update=change)


def _interval(resampled: NDArray[np.float64] | None) -> tuple[float, float] | None:
    if resampled is None or not np.isfinite(resampled).any():
        return None
    interval = percentile_interval(resampled[np.isfinite(resampled)])
    return None if interval is None else (interval.low, interval.high)


def _figures(name: str, compute: Compute, predictions: Predictions) -> dict[str, _Figure]:
    outputs, labels, images = predictions.logits, predictions.labels, len(predictions.ids)
    values = _values(name, compute, outputs, labels)
    single = [key for key, value in values.items() if value.ndim == 0]
    few = images < _FEWEST_IMAGES
    resampled: dict[str, list[float]] = {key: [] for key in values}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample may lack a class, which metrics warn of each time
        for drawn in () if few else resampled_images(images, predictions.groups):
            again = _resampled(name, compute, outputs[drawn], labels[drawn]) if single else {}
            for key, value in values.items():
                resampled[key].append(float(value[drawn].mean()) if value.ndim else again.get(key, float("nan")))
        twice = np.tile(np.arange(images), 2)
        copied = _resampled(name, compute, outputs[twice], labels[twice]) if single and not few else {}
    figures = {}
    for key, value in values.items():
        mean, samples = float(value.mean()), np.array(resampled[key])
        reason = f"an interval needs {_FEWEST_IMAGES} images, not {images}" if few else None
        if reason is None:
            reason = _why_no_interval(samples, mean, copied.get(key, mean))
        figures[key] = _Figure(mean, None if reason else samples, reason)
    return figures


def _why_no_interval(resampled: NDArray[np.float64], value: float, with_copies: float) -> str | None:
    known = resampled[np.isfinite(resampled)]
    if len(known) < 0.99 * len(resampled):
        return "the metric fails on resampled images"
    spread = float(known.std())
    if spread == 0:
        return "the metric is the same on all resampled images"
    if abs(with_copies - value) > spread:
        return "copies of images change the metric, and resampled images have copies: return a value for each image"
    return None


def _resampled(name: str, compute: Compute, outputs: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    try:
        return {key: float(value.mean()) for key, value in _values(name, compute, outputs, labels).items()}
    except MeasurementError:
        return {}


def _values(name: str, compute: Compute, outputs: NDArray[Any], labels: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """What a metric gives, by name: a number each, or one for each image."""
    try:
        returned = compute(outputs, labels)
    except Exception as error:  # the user's code may raise any type
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MeasurementError(f"metric {name} failed: {reason}") from error
    values = {}
    for key, value in (returned if isinstance(returned, Mapping) else {name: returned}).items():
        try:
            number = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise MeasurementError(_no_number(key, value)) from error
        if value is None or number.shape not in ((), (len(outputs),)):
            raise MeasurementError(_no_number(key, value))
        if not np.isfinite(number).all():
            raise MeasurementError(f"metric {key} is not finite")
        values[str(key)] = number
    if not values:
        raise MeasurementError(_no_number(name, returned))
    return values


def _no_number(name: str, value: Any) -> str:
    shape = f" of shape {np.shape(value)}" if hasattr(value, "shape") else ""
    what = f"{type(value).__name__}{shape}"
    return f"metric {name} returned {what}: return a number, a value for each image, or a dict of these"
