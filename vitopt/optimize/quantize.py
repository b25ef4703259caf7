"""Checkpoint in, quantized checkpoint out, proven to run before it takes its place."""

import textwrap
from collections import Counter
from pathlib import Path

import torch

from vitopt import storage
from vitopt.data.images import ImageSet
from vitopt.data.pixels import random_pixels
from vitopt.environment import devices, support
from vitopt.environment.devices import DTYPES
from vitopt.errors import CheckpointError, MeasurementError, UnsupportedError
from vitopt.formats import QUANTIZED_FORMATS
from vitopt.models.activations import load_activations, save_activations
from vitopt.models.calibration import load_uses, save_uses
from vitopt.models.checkpoint import (
    Checkpoint,
    empty_model,
    load_model,
    load_processor,
    open_checkpoint,
    save_checkpoint,
)
from vitopt.models.forward import logits
from vitopt.models.origin import QUANTIZE, note_origin
from vitopt.optimize.calibrate import observe
from vitopt.optimize.formats import live_formats, quantization_config
from vitopt.optimize.plan import LayerPlan, plan_layers
from vitopt.optimize.refused import fit_where_refused
from vitopt.optimize.rounded_model import round_on_images
from vitopt.optimize.static import KINDS
from vitopt.recipe import VariantSpec
from vitopt.transformation import note_images, require_float, seen


def plan_for(checkpoint: Checkpoint, variant: VariantSpec) -> LayerPlan:
    """The layer plan of a variant, from the checkpoint's configuration alone."""
    return plan_layers(empty_model(checkpoint), checkpoint.config.model_type, variant)


def quantize(
    checkpoint: Checkpoint,
    variant: VariantSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet | None = None,
    purpose: str = "skip list",
    calibration: ImageSet | None = None,
) -> LayerPlan:
    """Write `checkpoint` in the formats that `variant` asks for and return the plan that was carried out.

    The folder at `output` opens with plain transformers and gives finite logits on this device. It is complete or
    absent. `images`: those on which `variant` was chosen, and the `purpose`, what was chosen; `calibration`: those on
    which its weights are rounded, if it asks for that. They are noted there, beside those that `checkpoint` has seen.

    Raises:
        PatternError: a skip pattern matches nothing.
        RecipeError: the formats cannot be held in one checkpoint.
        UnsupportedError: no layer has a shape that the formats hold, they cannot be made on this device, or what
            was made does not run on it.
        MeasurementError: what was made gives logits that are not finite.
        CheckpointError: the checkpoint is quantized already, or the libraries did not follow the plan.
        DataError: weights are to be rounded on calibration images, and there are none.
        StorageError: the output would replace something else, is in use, or cannot be written.
    """
    require_float(checkpoint)
    with storage.reserved(output, checkpoint.folder):
        return _quantize(checkpoint, variant, output, device, images, purpose, calibration)


def _quantize(
    checkpoint: Checkpoint,
    variant: VariantSpec,
    output: Path,
    device: str,
    images: ImageSet | None,
    purpose: str,
    calibration: ImageSet | None,
) -> LayerPlan:
    target = devices.resolve_device(device)
    plan = plan_for(checkpoint, variant)
    for format in {variant.format, *(planned.format for planned in plan.layers)}:
        support.require_format(format, target)
    base = DTYPES[variant.half if variant.format in QUANTIZED_FORMATS or variant.layers else variant.format]
    config = quantization_config(plan, base)
    processor, observed = load_processor(checkpoint), load_activations(checkpoint.folder)
    if config is not None and checkpoint.is_random:
        # transformers quantizes while it reads a file, so random weights are written to one first.
        with storage.temporary_folder() as folder:
            model = load_model(checkpoint, dtype=base)
            save_checkpoint(model, processor, folder)
            if not KINDS.keys().isdisjoint(plan.quantized_formats):
                # Such weights are measured for speed alone, for which random pixels are as good as images.
                pixels = random_pixels(1, checkpoint.image_size)
                observed = observe(model.to(target), checkpoint.config.model_type, [pixels])
            model = load_model(open_checkpoint(str(folder)), dtype=base, device=target, quantization=config)
    else:
        model = load_model(checkpoint, dtype=base, device=target, quantization=config)
    _check(plan, live_formats(model, checkpoint.config.model_type))
    if variant.rounding is not None:
        round_on_images(model, checkpoint, plan, variant.rounding, calibration)
    with storage.staged_folder(output) as folder:
        save_checkpoint(model, processor, folder)
        save_activations(observed, folder)
        note_images(checkpoint, images, purpose, folder)
        held = variant.model_dump(mode="json", include={"format", "half", "skip", "layers"})
        if variant.rounding is not None and calibration is not None:
            save_uses([*load_uses(folder), seen(calibration, "rounding")], folder)
            held["rounding"] = variant.rounding.model_dump(mode="json")
        note_origin(checkpoint, folder, QUANTIZE, **held, layer_plan=plan.counts())
        del model  # not in memory twice
        _require_finite_logits(folder, variant, target)
    return plan


def _require_finite_logits(folder: Path, variant: VariantSpec, device: torch.device) -> None:
    """Open what was written and run it on one random image.

    Raises UnsupportedError where it does not run, MeasurementError where its logits are not finite.
    """
    written = open_checkpoint(str(folder))
    model = load_model(written, device=device)
    pixels = random_pixels(1, written.image_size).to(device)
    found: list[torch.Tensor] = []
    try:
        with torch.inference_mode():  # a layer whose product is refused for these rows is no reason
            fit_where_refused(model, lambda: found.append(logits(model, pixels)))
    except Exception as error:  # kernels raise whatever they run into
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise UnsupportedError(f"this model in {variant.format} does not run on {device}: {reason}") from error
    if not torch.isfinite(found[0]).all():
        raise MeasurementError(
            f"this model in {variant.format} gives logits that are not finite: its weights are not, or the 16-bit type "
            "overflows; try bf16 (`half`) or keep layers in 16 bit"
        )


def _check(plan: LayerPlan, live: dict[str, str]) -> None:
    wrong = [
        f"{planned.layer.logical} is {live[planned.layer.logical]}, planned {planned.format}"
        for planned in plan.layers
        if live[planned.layer.logical] != planned.format
    ]
    if wrong:
        raise CheckpointError(
            f"transformers did not follow the layer plan ({len(wrong)} layers; first: {wrong[0]}); "
            f"it holds {dict(Counter(live.values()))}"
        )
