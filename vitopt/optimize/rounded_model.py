"""A quantized model gets the weights that calibration images choose: rounded block by block, then tuned."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from vitopt.data.images import ImageSet
from vitopt.data.pixels import Augmentation, PixelDataset, Preprocessor, batches
from vitopt.formats import QUANTIZED_FORMATS
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor
from vitopt.optimize.blockwise import round_blocks
from vitopt.optimize.importance import token_importance
from vitopt.optimize.packed import PACKINGS
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.tuning import tune
from vitopt.recipe import RoundingSpec
from vitopt.transformation import require_images

_BATCH = 16
_SEED = 0
_SMALLEST_CROP = 0.35  # of an image's area: crops that round are as varied as images are


def round_on_images(
    quantized: nn.Module, checkpoint: Checkpoint, plan: LayerPlan, spec: RoundingSpec, images: ImageSet | None
) -> None:
    """Fill `quantized`, which the library made of `checkpoint` as `plan` says, with weights that `images` choose.

    Formats and shapes stay. No labels are used.

    Raises:
        DataError: there are no images.
        MeasurementError: what a layer is given, or the logits, are no finite numbers.
    """
    images = require_images(images, "`rounding: gptq`", "data (--calibrate)")
    device = next(quantized.parameters()).device
    planned = {item.layer: PACKINGS[item.format] for item in plan.layers if item.format in QUANTIZED_FORMATS}
    model = load_model(checkpoint, dtype=torch.float32, device=device)
    preprocess = Preprocessor(load_processor(checkpoint))
    grids = {layer.logical: packing.grid(quantized.get_submodule(layer.module)) for layer, packing in planned.items()}

    def pixels() -> Iterator[torch.Tensor]:
        return (part.to(device) for part in _photos_and_crops(images, preprocess, spec.crops))

    total = -(-len(images) // _BATCH) * (1 + spec.crops)
    importance = token_importance(model, planned, pixels(), total) if spec.search_scales else None
    rounded = round_blocks(model, checkpoint.config.model_type, planned, grids, pixels(), spec, importance)
    if spec.tuning_steps:
        exact = load_model(checkpoint, dtype=torch.float32, device=device)
        augmented = _augmented(images, preprocess, spec)
        model.requires_grad_(True)
        rounded = tune(model, exact, planned, rounded, augmented, spec.tuning_steps, spec.learning_rate)
    with torch.no_grad():
        for layer, packing in planned.items():
            packing.write(quantized.get_submodule(layer.module), rounded[layer.logical])
        weights = {f"{layer.module}.weight" for layer in planned}
        for name, parameter in model.named_parameters():
            if name not in weights:
                quantized.get_parameter(name).copy_(parameter)


def _photos_and_crops(images: ImageSet, preprocess: Preprocessor, crops: int) -> Iterator[torch.Tensor]:
    """All images in batches, then so many random crops of each: the same ones each time."""
    for batch in batches(images, preprocess, _BATCH):
        yield batch.pixel_values
    cropped = PixelDataset(images, preprocess, Augmentation(smallest_area=_SMALLEST_CROP))
    for seed in range(crops):
        for start in range(0, len(images), _BATCH):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(images) * seed + start)
                made = [cropped[index] for index in range(start, min(start + _BATCH, len(images)))]
            yield _pixels(made)


def _augmented(images: ImageSet, preprocess: Preprocessor, spec: RoundingSpec) -> Iterator[torch.Tensor]:
    """A batch for each step of the tuning: random images, cropped and mirrored at random."""
    torch.manual_seed(_SEED)
    sampler = RandomSampler(images, replacement=True, num_samples=spec.tuning_steps * spec.batch_size)
    pixels = PixelDataset(images, preprocess, Augmentation())
    yield from DataLoader(pixels, spec.batch_size, sampler=sampler, collate_fn=_pixels)


def _pixels(items: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.stack([item["pixel_values"] for item in items])
