"""Checkpoint in, quantized checkpoint out."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

from vitopt import environment, storage
from vitopt.environment import DTYPES
from vitopt.errors import CheckpointError
from vitopt.models.calibration import CALIBRATION_FILE, CalibrationImages, save_calibration
from vitopt.models.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    empty_model,
    load_model,
    load_processor,
    open_checkpoint,
    save_checkpoint,
)
from vitopt.optimize.formats import live_formats, quantization_config
from vitopt.optimize.plan import LayerPlan, plan_layers
from vitopt.recipe import QUANTIZED_FORMATS, VariantSpec


def plan_for(checkpoint: Checkpoint, variant: VariantSpec) -> LayerPlan:
    """The layer plan of a variant, from the checkpoint's configuration alone."""
    return plan_layers(empty_model(checkpoint), checkpoint.config.model_type, variant)


def quantize(
    checkpoint: Checkpoint,
    variant: VariantSpec,
    output: Path,
    device: str = "auto",
    *,
    calibration: tuple[CalibrationImages, str] | None = None,
) -> LayerPlan:
    """Write `checkpoint` in the formats that `variant` asks for and return the plan that was carried out.

    The folder at `output` opens with plain transformers. It is complete or absent. `calibration` are the images on
    which `variant` was chosen, and what was chosen; they are noted there, beside those of `checkpoint`.

    Raises:
        PatternError: a skip pattern matches nothing.
        UnsupportedError: a format cannot be made on this device.
        CheckpointError: the checkpoint is quantized already, or the libraries did not follow the plan.
    """
    if checkpoint.is_quantized:
        raise CheckpointError(f"{checkpoint.source} is quantized already; start from the 16- or 32-bit checkpoint")
    storage.require_replaceable(output, {CONFIG_FILE})
    target = environment.resolve_device(device)
    plan = plan_for(checkpoint, variant)
    for format in {variant.format, *(planned.format for planned in plan.layers)}:
        environment.require_format(format, target)
    base = DTYPES[variant.half if variant.format in QUANTIZED_FORMATS or variant.layers else variant.format]
    config = quantization_config(plan, base)
    processor = load_processor(checkpoint)
    if config is not None and checkpoint.is_random:
        # transformers quantizes while it reads a file, so random weights are written to one first.
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(load_model(checkpoint, dtype=base), processor, Path(folder))
            model = load_model(open_checkpoint(folder), dtype=base, device=target, quantization=config)
    else:
        model = load_model(checkpoint, dtype=base, device=target, quantization=config)
    _check(plan, live_formats(model, checkpoint.config.model_type))
    with storage.staged_folder(output) as folder:
        save_checkpoint(model, processor, folder)
        if checkpoint.folder is not None and (checkpoint.folder / CALIBRATION_FILE).is_file():
            shutil.copy(checkpoint.folder / CALIBRATION_FILE, folder)
        if calibration is not None:
            save_calibration(folder, *calibration)
        # What is about to be promised must open: a save that lost the quantization is caught here.
        open_checkpoint(str(folder))
    return plan


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
