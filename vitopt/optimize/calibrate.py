"""A step that observes how large the inputs of a checkpoint's layers are, for `static_scales`."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitopt import progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor, batches
from vitopt.environment import devices
from vitopt.models.activations import LayerInputs, save_activations
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, save_checkpoint
from vitopt.models.origin import note_origin
from vitopt.optimize.inputs import collect
from vitopt.optimize.static import KINDS
from vitopt.steps import CalibrateSpec
from vitopt.transformation import note_images, require_float, require_images

_BATCH = 16


@dataclass(frozen=True)
class Calibrated:
    """What was observed: by logical name of a layer."""

    layers: dict[str, LayerInputs]

    def summary(self) -> str:
        """In a few words, for the line that a run prints."""
        return f"observed the inputs of {len(self.layers)} layers"


def calibrate(
    checkpoint: Checkpoint,
    spec: CalibrateSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet | None = None,
    seed: int = 0,
) -> Calibrated:
    """Write the same checkpoint with `activations.json` beside it: what its layers take over `images`.

    Quantized from there, it can run with `static_scales`. The images are noted as seen.

    Raises:
        DataError: there are no images.
        CheckpointError: the checkpoint is quantized already.
        MeasurementError: an input is no finite number.
        StorageError: the output would replace something else, is in use, or cannot be written.
    """
    images = require_images(images, "`calibrate`")
    require_float(checkpoint)
    with storage.reserved(output, checkpoint.folder):
        target = devices.resolve_device(device)
        model, processor = load_model(checkpoint, device=target), load_processor(checkpoint)
        preprocess = Preprocessor(processor)
        stream = progress.track(batches(images, preprocess, _BATCH), "calibration", -(-len(images) // _BATCH))
        found = observe(model, checkpoint.config.model_type, (batch.pixel_values for batch in stream))
        with storage.staged_folder(output) as folder:
            save_checkpoint(model, processor, folder)
            save_activations(found, folder)
            note_images(checkpoint, images, "activation scales", folder)
            note_origin(checkpoint, folder, "calibrate", images=len(images))
    return Calibrated(found)


def observe(model: nn.Module, model_type: str, pixels: Iterable[torch.Tensor]) -> dict[str, LayerInputs]:
    """Logical name of each linear layer in a block -> its inputs over all `pixels`, (batch, 3, height, width).

    Raises:
        MeasurementError: an input is no finite number.
    """
    found: dict[str, LayerInputs] = {}
    for one in collect(model, model_type, pixels):
        smallest, largest = one.ranges
        noise = {format: max(one.lost(format)) for format in KINDS}
        found |= dict.fromkeys((layer.logical for layer in one.layers), LayerInputs(smallest, largest, noise))
    return found
