"""A step that observes how large the inputs of a checkpoint's layers are, for `static_scales`."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitopt import progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor, batches
from vitopt.environment import devices
from vitopt.errors import CheckpointError, DataError, MeasurementError
from vitopt.models.activations import LayerInputs, save_activations
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, save_checkpoint
from vitopt.models.forward import logits
from vitopt.models.names import linear_layers
from vitopt.models.origin import note_origin
from vitopt.optimize.static import KINDS, quantized, scale_of
from vitopt.steps import CalibrateSpec
from vitopt.transformation import note_images

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
    if images is None or len(images) == 0:
        raise DataError("`calibrate` observes layers on calibration images, and there are none: give it data")
    if checkpoint.is_quantized:
        raise CheckpointError(f"{checkpoint.source} is quantized already; start from the 16- or 32-bit checkpoint")
    with storage.reserved(output, checkpoint.folder):
        target = devices.resolve_device(device)
        model, processor = load_model(checkpoint, device=target), load_processor(checkpoint)
        preprocess = Preprocessor(processor)

        def pixels() -> Iterator[torch.Tensor]:
            stream = batches(images, preprocess, _BATCH)
            return (batch.pixel_values for batch in progress.track(stream, "calibration", -(-len(images) // _BATCH)))

        found = observe(model, checkpoint.config.model_type, pixels)
        with storage.staged_folder(output) as folder:
            save_checkpoint(model, processor, folder)
            save_activations(found, folder)
            note_images(checkpoint, images, "activation scales", folder)
            note_origin(checkpoint, folder, "calibrate", images=len(images))
    return Calibrated(found)


def observe(model: nn.Module, model_type: str, pixels: Callable[[], Iterable[torch.Tensor]]) -> dict[str, LayerInputs]:
    """Logical name of each linear layer in a block -> its inputs over all `pixels`, (batch, 3, height, width), twice.

    Raises:
        MeasurementError: an input is no finite number.
    """
    layers = [layer for layer in linear_layers(model, model_type) if not layer.is_head]
    modules = {layer.module: model.get_submodule(layer.module) for layer in layers}
    largest = dict.fromkeys(modules, 0.0)
    lost = {name: dict.fromkeys(KINDS, 0.0) for name in modules}
    squares = dict.fromkeys(modules, 0.0)

    def measure(name: str, inputs: torch.Tensor) -> None:
        found = float(inputs.abs().max())  # NaN compares as false
        largest[name] = largest[name] if found <= largest[name] else found

    def lose(name: str, inputs: torch.Tensor) -> None:
        squares[name] += float(inputs.double().square().sum())
        for format in KINDS:
            scale = inputs.new_tensor(scale_of(largest[name], format), dtype=torch.float32)
            back = quantized(inputs, scale, format).float() * scale
            lost[name][format] += float((back - inputs.float()).double().square().sum())

    for look in (measure, lose):
        with ExitStack() as hooks, torch.inference_mode():
            for name, module in modules.items():
                hook = module.register_forward_pre_hook(lambda _, given, name=name, look=look: look(name, given[0]))
                hooks.callback(hook.remove)
            for batch in pixels():
                logits(model, batch.to(next(model.parameters()).device))
        if not all(map(math.isfinite, largest.values())):
            raise MeasurementError("inputs of layers are not all finite numbers: the model's 16-bit type overflows")

    def found(name: str) -> LayerInputs:
        of_all = max(squares[name], 1e-30)
        return LayerInputs(largest[name], {format: loss / of_all for format, loss in lost[name].items()})

    return {layer.logical: found(layer.module) for layer in layers}
