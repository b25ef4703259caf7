"""Accuracy: all variants see the same batches, so that every comparison is paired image by image."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vitopt import environment, progress
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Batch, Preprocessor, batches
from vitopt.errors import DataError, MeasurementError, RecordError
from vitopt.measure import statistics
from vitopt.measure.latency import explain_failure
from vitopt.measure.predictions import Predictions
from vitopt.measure.subject import Subject
from vitopt.measure.verdict import accuracy_verdict
from vitopt.records import Accuracy, ClassAccuracy, VersusBaseline

logger = logging.getLogger(__name__)


# by name of the variant: logits per image index, and why it failed; then the images that could not be decoded
_Share = tuple[dict[str, dict[int, "np.ndarray"]], dict[str, str], list[int]]


@dataclass(frozen=True)
class Outcome:
    """What running the variants over the images gave."""

    predictions: dict[str, Predictions]
    failures: dict[str, str]
    skipped: tuple[str, ...]  # ids of images that could not be decoded


def predict(
    subjects: Sequence[Subject],
    images: ImageSet,
    preprocess: Preprocessor,
    *,
    batch_size: int,
    workers: int = 0,
    skip_bad: bool = False,
) -> Outcome:
    """Run every subject over every image, each batch decoded once for all of them.

    Under `accelerate launch` each process takes its share of the images and all get the whole result. A
    subject that raises or gives NaN is dropped with its reason; the others go on.

    Raises:
        BadImageError: an image cannot be decoded and `skip_bad` is false.
        DataError: no image could be decoded.
    """
    share = environment.process_share()
    found: dict[str, dict[int, np.ndarray]] = {subject.name: {} for subject in subjects}
    failures: dict[str, str] = {}
    bad: list[int] = []
    steps = -(-len(images) // (batch_size * share[1]))
    stream = batches(images, preprocess, batch_size, workers=workers, skip_bad=skip_bad, share=share)
    for batch in progress.track(stream, "accuracy", steps):
        bad += batch.bad
        for subject in subjects:
            if subject.name in failures or not batch.indices:
                continue
            try:
                logits = _logits(subject, batch, batch_size)
                _refuse_nan(logits, batch, images)
            except MeasurementError as error:
                failures[subject.name] = str(error)
            except Exception as error:  # whatever a kernel raises is this variant's failure, not the run's
                failures[subject.name] = explain_failure(error)
            else:
                found[subject.name].update(zip(batch.indices, logits, strict=True))
    shares = environment.gather_objects((found, failures, bad))
    return _merge(shares, images)


def _logits(subject: Subject, batch: Batch, batch_size: int) -> np.ndarray:
    """(images, classes), float32."""
    pixels = batch.pixel_values
    if subject.compiled and len(pixels) < batch_size:
        # A new shape would be compiled anew: the last batch is filled up and cut back.
        pixels = torch.cat([pixels, pixels[-1:].expand(batch_size - len(pixels), -1, -1, -1)])
    logits = subject(pixels.to(subject.device, non_blocking=True))
    return logits[: len(batch.indices)].float().cpu().numpy()


def _refuse_nan(logits: np.ndarray, batch: Batch, images: ImageSet) -> None:
    broken = ~np.isfinite(logits).all(axis=1)
    if broken.any():
        first = images.ids[batch.indices[int(broken.argmax())]]
        raise MeasurementError(
            f"logits are not finite, first for image {first}: the 16-bit type overflows; try half: bf16 or skip layers"
        )


def _merge(shares: Sequence[_Share], images: ImageSet) -> Outcome:
    failures = {name: reason for _, some, _ in shares for name, reason in some.items()}
    bad = sorted({index for _, _, some in shares for index in some})
    kept = [index for index in range(len(images)) if index not in set(bad)]
    if not kept:
        raise DataError(f"none of the {len(images)} images of {images.name} can be decoded")
    hashes = images.image_hashes
    predictions = {}
    for name in shares[0][0]:
        if name in failures:
            continue
        logits = {index: row for found, _, _ in shares for index, row in found[name].items()}
        predictions[name] = Predictions(
            ids=tuple(images.ids[i] for i in kept),
            image_sha256=tuple(hashes[i] for i in kept),
            labels=np.array([images.labels[i] for i in kept], dtype=np.int64),
            logits=np.stack([logits[i] for i in kept]),
        )
    return Outcome(predictions, failures, tuple(images.ids[i] for i in bad))


def summarise(predictions: Predictions, class_names: Sequence[str]) -> Accuracy:
    """Accuracy of one variant, with its Wilson interval and a row per class."""
    top1 = statistics.topk_correct(predictions.logits, predictions.labels, 1)
    classes = predictions.logits.shape[1]
    top5 = statistics.topk_correct(predictions.logits, predictions.labels, 5) if classes > 5 else None
    interval = statistics.wilson_interval(int(top1.sum()), len(top1))
    rows = []
    for label in np.unique(predictions.labels):
        of_class = predictions.labels == label
        rows.append(
            ClassAccuracy(
                label=int(label),
                name=class_names[label],
                images=int(of_class.sum()),
                top1_percent=100 * float(top1[of_class].mean()),
            )
        )
    return Accuracy(
        images=len(top1),
        top1_percent=100 * float(top1.mean()),
        top1_ci95_percent=(100 * interval.low, 100 * interval.high),
        top5_percent=None if top5 is None else 100 * float(top5.mean()),
        expected_calibration_error=statistics.expected_calibration_error(predictions.logits, predictions.labels),
        classes=tuple(rows),
    )


def compare(baseline_name: str, baseline: Predictions, variant: Predictions) -> VersusBaseline:
    """Paired comparison of two variants' predictions on the same images.

    Raises:
        RecordError: they are not over the same images with the same labels in the same order.
    """
    _require_same_images(baseline, variant)
    counts = statistics.paired_counts(baseline.correct, variant.correct)
    interval = statistics.paired_delta_interval(
        counts.both_right, counts.right_to_wrong, counts.wrong_to_right, counts.both_wrong
    )
    images = len(baseline.labels)
    delta = 100 * (counts.wrong_to_right - counts.right_to_wrong) / images
    low, high = 100 * interval.low, 100 * interval.high
    visible = statistics.smallest_visible_loss(images, (counts.right_to_wrong + counts.wrong_to_right) / images)
    return VersusBaseline(
        baseline=baseline_name,
        top1_delta_points=delta,
        top1_delta_ci95_points=(low, high),
        agreement_percent=100 * statistics.agreement(baseline.classes, variant.classes),
        right_to_wrong=counts.right_to_wrong,
        wrong_to_right=counts.wrong_to_right,
        mcnemar_p=statistics.mcnemar_exact_p(counts.right_to_wrong, counts.wrong_to_right),
        mean_kl_divergence=statistics.mean_kl_divergence(baseline.logits, variant.logits),
        normalised_logit_error=statistics.normalised_error(baseline.logits, variant.logits),
        smallest_visible_loss_points=min(visible, 100.0),
        verdict=accuracy_verdict(images, delta, low, high, counts.right_to_wrong, counts.wrong_to_right),
    )


def _require_same_images(baseline: Predictions, variant: Predictions) -> None:
    if baseline.image_sha256 != variant.image_sha256:
        different = sum(a != b for a, b in zip(baseline.image_sha256, variant.image_sha256, strict=False))
        different += abs(len(baseline.ids) - len(variant.ids))
        raise RecordError(
            f"the two were not measured on the same images ({different} of {len(baseline.ids)} differ): "
            "evaluate both with the same --data"
        )
    if not np.array_equal(baseline.labels, variant.labels):
        raise RecordError("the two were measured on the same images with different labels: evaluate both again")
    if baseline.logits.shape != variant.logits.shape:
        raise RecordError(
            f"the two have heads of {baseline.logits.shape[1]} and {variant.logits.shape[1]} classes; "
            "only models with the same classes can be compared"
        )
