"""An adaptive checkpoint: the folder of the second pass's, with the first pass's and the calibrated rule in it."""

import logging
from pathlib import Path

from vitopt import storage
from vitopt.adaptive.calibrated import ADAPTIVE_FILE, FIRST_FOLDER, Calibrated, save_calibrated
from vitopt.adaptive.calibration import observe, summarised
from vitopt.adaptive.passes import prepare_passes
from vitopt.adaptive_spec import AdaptiveSpec, TargetSpec
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.environment import devices
from vitopt.errors import CheckpointError, DataError
from vitopt.models.calibration import CALIBRATION_FILE, TRAINING, load_uses, save_uses
from vitopt.models.checkpoint import (
    Checkpoint,
    empty_model,
    load_model,
    load_processor,
    open_checkpoint,
    save_checkpoint,
)
from vitopt.models.names import block_names
from vitopt.optimize import class_token
from vitopt.optimize.resolution import at_resolution, for_resolution, why_not_resized
from vitopt.recipe import HeldSpec, RunSpec
from vitopt.run_spec import ENGINES
from vitopt.transformation import seen

logger = logging.getLogger(__name__)

PURPOSE = "threshold"


def require_low(checkpoint: Checkpoint, low: int, second: Checkpoint) -> None:
    """Refuse a resolution that the first pass cannot have.

    Raises:
        CheckpointError: it is not below the second pass's, or the model cannot take it.
    """
    height, width = second.image_size
    if low >= min(height, width):
        raise CheckpointError(f"low {low} is not below the {height} x {width} pixels of {second.source}: take fewer")
    if checkpoint.image_size != (low, low) and (reason := why_not_resized(checkpoint.config, low)):
        raise CheckpointError(f"low {low}: {reason}")


def require_untrained(trained: set[str], images: ImageSet, spec: AdaptiveSpec) -> None:
    """Refuse a promise on images that trained one of the passes, of which it is surer than of others; warn of a rate.

    `trained`: hashes of images.

    Raises:
        DataError: at least one image trained them, and `max_top1_loss` is to be promised.
    """
    if not (shared := trained & set(images.image_hashes)):
        return
    line = (
        f"{len(shared)} of {len(images)} calibration images are training images, of which a model is surer than of "
        "others: calibrate on other ones (in a recipe `data.held_out: 0.2` and `adaptive.split: held-out`)"
    )
    if spec.max_top1_loss is not None:
        raise DataError(line)
    logger.warning("%s", line)


def at_size(checkpoint: Checkpoint, side: int, folder: Path) -> Checkpoint:
    """The same checkpoint for images of `side` x `side` pixels, its position embeddings interpolated; in `folder` where
    it was made for others.

    Raises:
        CheckpointError: it is quantized.
    """
    if checkpoint.image_size == (side, side):
        return checkpoint
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{checkpoint.source} is quantized, so its resolution cannot change: give a `draft` of {side} pixels, or "
            "quantize as a variant of a recipe"
        )
    with storage.staged_folder(folder) as place:
        model = load_model(checkpoint)
        processor = for_resolution(load_processor(checkpoint), side)
        save_checkpoint(at_resolution(model, side).to(model.dtype), processor, place)
        save_uses(load_uses(checkpoint.folder), place)
    return open_checkpoint(str(folder))


def make(
    first: Checkpoint,
    second: Checkpoint,
    spec: AdaptiveSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet,
    run: RunSpec | None = None,
    asked: HeldSpec | None = None,
    skip_bad: bool = False,
) -> Calibrated:
    """Calibrate two passes on images and write them as one checkpoint; `first` is `second` where both have one.

    They are observed as they will be run, but for compilation, which changes logits by rounding alone.

    Raises:
        CheckpointError: the passes have other classes.
        DataError: the labels do not fit the classes, or there are too few images.
        UnsupportedError: one of the passes cannot run here.
        StorageError: the output would replace something else, is in use, or cannot be written.
    """
    run, own, target = run or RunSpec(), first is not second, devices.resolve_device(device)
    uses = [use for checkpoint in (first, second) for use in load_uses(checkpoint.folder) if use.purpose == TRAINING]
    require_untrained({sha256 for use in uses for sha256 in use.image_sha256}, images, spec)
    empty = empty_model(first)
    passes = prepare_passes(
        first,
        second,
        name="calibration",
        device=target,
        run_first=spec.run_of_first(run).uncompiled,
        run=run.uncompiled,
        watched=run.engine not in ENGINES and class_token.moves(empty, block_names(empty, first.config.model_type)),
        asked=asked,
    )
    with storage.reserved(output, first.folder, second.folder):
        observed = observe(passes, fit_labels(images, second.label_names), skip_bad=skip_bad)
        asked_for = TargetSpec.model_validate(spec.model_dump(include=set(TargetSpec.model_fields)))
        calibrated = Calibrated(
            **summarised(observed, asked_for),
            target=asked_for,
            first_run=spec.first,
            own_first=own,
            first_fingerprint=first.fingerprint(),
            second_fingerprint=second.fingerprint(),
        )
        with storage.staged_folder(output) as folder:
            _place(second, folder)
            if own:
                _place(first, folder / FIRST_FOLDER)
            uses = [*load_uses(second.folder), *load_uses(first.folder), seen(images, PURPOSE)]
            save_uses(list(dict.fromkeys(uses)), folder)
            save_calibrated(calibrated, folder)
    return calibrated


def _place(checkpoint: Checkpoint, folder: Path) -> None:
    """The checkpoint's files, and those of its engines, in a folder that may be there."""
    if checkpoint.folder is None:
        folder.mkdir(exist_ok=True)
        save_checkpoint(load_model(checkpoint), load_processor(checkpoint), folder)
        return
    storage.link_files(checkpoint.folder, folder, leave_out=(CALIBRATION_FILE, FIRST_FOLDER, ADAPTIVE_FILE))
