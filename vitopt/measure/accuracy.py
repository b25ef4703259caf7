"""Accuracy: all variants see the same batches, so that every comparison is paired image by image."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vitopt import progress
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Batch, batches, on_device
from vitopt.environment import launch
from vitopt.errors import DataError, MeasurementError, RecordError
from vitopt.measure.bootstrap import positive_mean_interval
from vitopt.measure.clusters import clustered, proportion_interval
from vitopt.measure.failures import explain_failure, is_out_of_memory
from vitopt.measure.intervals import Interval, paired_delta_interval, wilson_interval
from vitopt.measure.logit_statistics import (
    calibration_noise,
    expected_calibration_error,
    kl_divergences,
    normalised_error,
    topk_correct,
)
from vitopt.measure.paired import holm, mcnemar_exact_p, paired_counts
from vitopt.measure.power import smallest_visible_loss
from vitopt.measure.predictions import Predictions
from vitopt.measure.runnable import Routes, Runnable, fixed_shapes, outputs_of
from vitopt.measure.verdict import accuracy_verdict
from vitopt.records import Accuracy, ClassAccuracy, VersusBaseline

logger = logging.getLogger(__name__)


# What some of the images gave. By name of the variant: logits per image index, the images that were escalated, why it
# failed, and the batch size in the end; then the images that could not be decoded
Share = tuple[dict[str, dict[int, "np.ndarray"]], dict[str, set[int]], dict[str, str], dict[str, int], list[int]]


@dataclass(frozen=True)
class Outcome:
    """What running the variants over the images gave."""

    predictions: dict[str, Predictions]
    failures: dict[str, str]
    skipped: tuple[str, ...]  # ids of images that could not be decoded
    batch_sizes: dict[str, int]  # by name: images per call in the end
    notes: dict[str, list[str]] = field(default_factory=dict)  # by name: what was done otherwise than asked for


def predict(
    runnables: Sequence[Runnable],
    images: ImageSet,
    *,
    batch_size: int,
    workers: int = 0,
    skip_bad: bool = False,
) -> Outcome:
    """Run every runnable over every image; those that prepare images alike share each decoded batch.

    Under `accelerate launch` each process takes its share of the images and all get the whole result. One that
    raises or gives NaN is dropped with its reason; the others go on. A batch that does not fit the memory is halved
    from then on.

    Raises:
        BadImageError: an image cannot be decoded and `skip_bad` is false.
        DataError: no image could be decoded.
    """
    share = launch.process_share()
    own = predict_share(runnables, images, share, batch_size=batch_size, workers=workers, skip_bad=skip_bad)
    return merged(runnables, images, launch.gather_objects(own), batch_size)


def predict_share(
    runnables: Sequence[Runnable],
    images: ImageSet,
    share: tuple[int, int],
    *,
    batch_size: int,
    workers: int = 0,
    skip_bad: bool = False,
) -> Share:
    """`predict` for the images of one `share` (rank, processes): every `processes`-th from `rank` on.

    Raises:
        BadImageError: an image cannot be decoded and `skip_bad` is false.
    """
    rows: dict[str, dict[int, np.ndarray]] = {runnable.name: {} for runnable in runnables}
    paths: dict[str, set[int]] = {runnable.name: set() for runnable in runnables if isinstance(runnable, Routes)}
    failures: dict[str, str] = {}
    sizes = {runnable.name: batch_size for runnable in runnables}
    bad: set[int] = set()
    with progress.task("accuracy, images of all variants", len(runnables) * -(-len(images) // share[1])) as counted:
        for group in _alike(runnables):
            device, preprocess = group[0].device, group[0].preprocess
            pin = device.type == "cuda"
            stream = batches(images, preprocess, batch_size, workers=workers, skip_bad=skip_bad, share=share, pin=pin)
            for batch in on_device(stream, device):
                bad.update(batch.bad)
                for runnable in group:
                    counted.advance(len(batch.indices) + len(batch.bad))
                    if runnable.name in failures or not batch.indices:
                        continue
                    try:
                        logits, escalated = _logits(runnable, batch, sizes)
                        _refuse_nan(logits, batch, images)
                    except Exception as error:  # an error of any type fails this variant, not the run
                        failures[runnable.name] = explain_failure(error)
                    else:
                        rows[runnable.name].update(zip(batch.indices, logits, strict=True))
                        if escalated is not None:
                            paths[runnable.name].update(itertools.compress(batch.indices, escalated))
    return rows, paths, failures, sizes, sorted(bad)


def _alike(runnables: Sequence[Runnable]) -> list[list[Runnable]]:
    """The runnables in groups that take the same pixels on the same device."""
    groups: list[list[Runnable]] = []
    for runnable in runnables:
        fits = (
            group
            for group in groups
            if group[0].device == runnable.device and group[0].preprocess == runnable.preprocess
        )
        group = next(fits, None)
        if group is None:
            groups.append([runnable])
        else:
            group.append(runnable)
    return groups


def _logits(runnable: Runnable, batch: Batch, sizes: dict[str, int]) -> tuple[np.ndarray, list[bool] | None]:
    """(images, outputs), float32, and which were escalated, of what routes; halves the subject's batch size in `sizes`
    for as long as it does not fit."""
    while True:
        size = sizes[runnable.name]
        try:
            parts, escalated = [], list[bool]()
            for part in batch.pixel_values.split(size):
                parts.append(padded_call(runnable, part, size))
                if isinstance(runnable, Routes):
                    escalated += runnable.escalated[: len(part)].tolist()
            outputs = torch.cat(parts).float().cpu().numpy()
            if outputs.ndim != 2:
                raise MeasurementError(f"it must return (images, outputs), not {outputs.shape}")
            return outputs, escalated if isinstance(runnable, Routes) else None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise MeasurementError("out of memory: not even one image fits") from error
            sizes[runnable.name] = size // 2
            logger.warning("%s: batch %d does not fit the memory; going on with %d", runnable.name, size, size // 2)


def padded_call(runnable: Runnable, pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Outputs (images, outputs) of `pixels` (images, 3, height, width).

    One of fixed shapes is called with `size` images; what is missing are copies of the last one.
    """
    images = len(pixels)
    if fixed_shapes(runnable) and images < size:
        # A new shape would be compiled anew: the last batch is filled up and cut back.
        pixels = torch.cat([pixels, pixels[-1:].expand(size - images, -1, -1, -1)])
    return runnable(pixels)[:images]


def _refuse_nan(logits: np.ndarray, batch: Batch, images: ImageSet) -> None:
    broken = ~np.isfinite(logits).all(axis=1)
    if broken.any():
        first = images.ids[batch.indices[int(broken.argmax())]]
        raise MeasurementError(
            f"logits are not finite, first for image {first}: the 16-bit type overflows; try half: bf16 or skip layers"
        )


def merged(runnables: Sequence[Runnable], images: ImageSet, shares: Sequence[Share], batch_size: int) -> Outcome:
    """The result for all images from that of all shares, in any order; `batch_size` is what was asked for.

    Raises:
        DataError: no image could be decoded.
    """
    outputs = {runnable.name: outputs_of(runnable) for runnable in runnables}
    failures = {name: reason for _, _, some, _, _ in shares for name, reason in some.items()}
    bad = sorted({index for *_, some in shares for index in some})
    kept = sorted({*range(len(images))} - {*bad})
    if not kept:
        raise DataError(f"none of the {len(images)} images of {images.name} can be decoded")
    kept_images = images.subset(kept)
    predictions = {}
    for name in shares[0][0]:
        if name in failures:
            continue
        logits = {index: row for rows, *_ in shares for index, row in rows[name].items()}
        stacked = np.stack([logits[i] for i in kept])
        width = stacked.shape[1] if outputs[name] != "embedding" else None
        escalated = {index for _, paths, *_ in shares for index in paths.get(name, ())}
        predictions[name] = Predictions(
            ids=kept_images.ids,
            image_sha256=tuple(images.image_hashes[i] for i in kept),
            labels=kept_images.targets(width),
            logits=stacked,
            groups=kept_images.groups,
            outputs=outputs[name],
            escalated=np.array([i in escalated for i in kept]) if name in shares[0][1] else None,
        )
    smallest = {name: min(sizes[name] for *_, sizes, _ in shares) for name in shares[0][0]}
    notes = {
        name: [f"accuracy ran in batches of {size}: {batch_size} images did not fit the memory"]
        for name, size in smallest.items()
        if size < batch_size
    }
    return Outcome(predictions, failures, tuple(images.ids[i] for i in bad), smallest, notes)


def summarise(predictions: Predictions, class_names: Sequence[str]) -> Accuracy:
    """Accuracy of one variant, with its Wilson interval and a row per class."""
    top1 = topk_correct(predictions.logits, predictions.labels, 1)
    classes = predictions.logits.shape[1]
    top5 = topk_correct(predictions.logits, predictions.labels, 5) if classes > 5 else None
    interval = proportion_interval(top1, predictions.groups)
    rows = []
    for label in np.unique(predictions.labels):
        of_class = predictions.labels == label
        rows.append(
            ClassAccuracy(
                label=int(label),
                name=class_names[label] if class_names else str(label),
                images=int(of_class.sum()),
                top1_percent=100 * float(top1[of_class].mean()),
            )
        )
    return Accuracy(
        images=len(top1),
        top1_percent=100 * float(top1.mean()),
        top1_ci95_percent=_percent(interval),
        top5_percent=None if top5 is None else 100 * float(top5.mean()),
        expected_calibration_error=expected_calibration_error(predictions.logits, predictions.labels),
        calibration_noise=calibration_noise(predictions.logits),
        classes=tuple(rows),
    )


def compare(baseline_name: str, baseline: Predictions, variant: Predictions) -> VersusBaseline:
    """Paired comparison of two variants' predictions on the same images.

    Raises:
        RecordError: they are not over the same images with the same labels in the same order, or no output is the
            class of an image.
    """
    if reason := baseline.why_no_classes or variant.why_no_classes:
        raise RecordError(reason)
    require_same_images(baseline, variant)
    counts = paired_counts(baseline.correct, variant.correct)
    interval = paired_delta_interval(*counts)
    images = len(baseline.labels)
    delta = 100 * (counts.wrong_to_right - counts.right_to_wrong) / images
    low, high = 100 * interval.low, 100 * interval.high
    same = int(np.sum(baseline.classes == variant.classes))
    divergences = kl_divergences(baseline.logits, variant.logits)
    p = mcnemar_exact_p(counts.right_to_wrong, counts.wrong_to_right)
    visible = smallest_visible_loss(images, (counts.right_to_wrong + counts.wrong_to_right) / images)
    versus = VersusBaseline(
        baseline=baseline_name,
        top1_delta_points=delta,
        top1_delta_ci95_points=(low, high),
        agreement_percent=100 * same / images,
        agreement_ci95_percent=_percent(wilson_interval(same, images)),
        right_to_wrong=counts.right_to_wrong,
        wrong_to_right=counts.wrong_to_right,
        mcnemar_p=p,
        mean_kl_divergence=float(divergences.mean()),
        kl_ci95=None if (kl := positive_mean_interval(divergences)) is None else (kl.low, kl.high),
        normalised_logit_error=normalised_error(baseline.logits, variant.logits),
        smallest_visible_loss_points=min(visible, 100.0),
        verdict=accuracy_verdict(images, delta, low, high, p),
    )
    return clustered(versus, baseline, variant)


def adjusted(compared: Sequence[VersusBaseline], images: int) -> list[VersusBaseline]:
    """The same comparisons, all with one baseline over `images` images, with p-values and verdicts that allow for
    their number (Holm 1979). A single comparison is not adjusted, and an earlier adjustment of it is removed."""
    return [
        versus.model_copy(
            update={
                "mcnemar_holm_p": p if len(compared) > 1 else None,
                "verdict": accuracy_verdict(images, versus.top1_delta_points, *versus.top1_delta_ci95_points, p),
            }
        )
        for versus, p in zip(compared, holm([versus.mcnemar_p for versus in compared]), strict=True)
    ]


def _percent(interval: Interval) -> tuple[float, float]:
    return 100 * interval.low, 100 * interval.high


def require_same_images(baseline: Predictions, variant: Predictions) -> None:
    """Raises RecordError where two results cannot be paired: other images, other labels, heads of other widths."""
    if baseline.image_sha256 != variant.image_sha256:
        different = sum(a != b for a, b in zip(baseline.image_sha256, variant.image_sha256, strict=False))
        different += abs(len(baseline.ids) - len(variant.ids))
        raise RecordError(
            f"the two were not measured on the same images ({different} of {len(baseline.ids)} differ): "
            "evaluate both with the same --data"
        )
    if not np.array_equal(baseline.labels, variant.labels):
        raise RecordError("the two were measured on the same images with different labels: evaluate both again")
    if baseline.logits.shape != variant.logits.shape and not variant.why_no_classes:
        raise RecordError(
            f"the two have heads of {baseline.logits.shape[1]} and {variant.logits.shape[1]} classes; "
            "only models with the same classes can be compared"
        )
