"""How a step that leaves the answers as they are writes its checkpoint: held against the model's own answers first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from vitopt import storage
from vitopt.data.images import ImageSet
from vitopt.data.pixels import random_pixels
from vitopt.environment import devices
from vitopt.errors import UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, save_checkpoint
from vitopt.models.forward import logits
from vitopt.models.origin import note_origin
from vitopt.transformation import note_images, require_float

Made = TypeVar("Made")
# Largest change of a logit, as a share of the largest: some of the type's own rounding.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


def write_equivalent(
    checkpoint: Checkpoint,
    output: Path,
    device: str,
    step: str,
    change: Callable[[PreTrainedModel, Any], Made],
    images: ImageSet | None = None,
    purpose: str = "",
) -> Made:
    """Write `checkpoint` with the weights that `change` (model, processor) leaves in place; returns what that returns.

    `step`: its name. `images`: those that it looked at, for a `purpose`.

    Raises:
        CheckpointError: the checkpoint is quantized already.
        UnsupportedError: the answers would change.
        StorageError: the output would replace something else, is in use, or cannot be written.
    """
    require_float(checkpoint)
    with storage.reserved(output, checkpoint.folder):
        model, processor = load_model(checkpoint, device=devices.resolve_device(device)), load_processor(checkpoint)
        pixels = random_pixels(2, checkpoint.image_size).to(model.device)
        with torch.inference_mode():
            before = logits(model, pixels)
            made = change(model, processor)
            after = logits(model, pixels)
        changed = float((after - before).abs().max() / before.abs().max())
        if not changed <= _TOLERANCE[model.dtype]:
            raise UnsupportedError(
                f"the step {step} does not fit the blocks of {checkpoint.source}: its answers would change by "
                f"{changed:.2g}; leave the step out"
            )
        with storage.staged_folder(output) as folder:
            save_checkpoint(model, processor, folder)
            note_images(checkpoint, images, purpose, folder)
            note_origin(checkpoint, folder, step, **({} if images is None else {"images": len(images)}))
    return made
