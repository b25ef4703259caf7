"""What a run will take on this machine: a few timed calls, multiplied. An estimate, and it is called one."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor
from vitopt.measure.latency import clock_for
from vitopt.models.checkpoint import Checkpoint, empty_model
from vitopt.models.names import linear_layers
from vitopt.recipe import CHOOSING, FinetuneSpec, Recipe, VariantSpec

_SECONDS = 2.0  # for each type of number
_MOST_CALLS = 20
_WARMUP_CALLS = 15
_SEARCH_LOOKS = 20  # mixtures that a search for a skip list evaluates, about
_CHOOSING_DECODES = 3  # for the table of damage, for that of recovery, and for the search
_CONFIRMING_MODELS = 3  # in 16 bit, quantized, and with the skip list that was found
_TRAINING_PASSES = 3  # forward, and backward twice as much


@dataclass(frozen=True)
class StageTime:
    """A stage of a run and about how long it will take."""

    name: str
    seconds: float


@torch.inference_mode()
def seconds_per_image(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one call with one image, of a model of this shape whose weights are zero; median of a few calls."""
    model = empty_model(checkpoint).to(dtype).to_empty(device=device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()  # memory as it is found holds numbers that are slow to compute with
    pixels = torch.zeros(1, 3, *checkpoint.image_size, dtype=dtype, device=device)
    clock = clock_for(device)
    model(pixel_values=pixels)
    samples: list[float] = []
    while len(samples) < _MOST_CALLS and sum(samples) < 1000 * _SECONDS:
        samples.append(clock.time(lambda: model(pixel_values=pixels)))
    return sorted(samples)[len(samples) // 2] / 1000


def seconds_to_decode(images: ImageSet, preprocess: Preprocessor) -> float:
    """Seconds to decode and prepare one image; mean of a few."""
    few = range(min(5, len(images)))
    started = time.perf_counter()
    for index in few:
        preprocess(images.image(index))
    return (time.perf_counter() - started) / len(few)


def stages(
    recipe: Recipe,
    checkpoint: Checkpoint,
    seconds: Mapping[str, float],
    decode: float,
    images: Mapping[str, int],
    compared: Mapping[str, Sequence[VariantSpec]] = MappingProxyType({}),
) -> list[StageTime]:
    """About how long the long stages take.

    `seconds` per image by `number_type`; `images` per split: `train`, `test`, and by name of a variant that leaves its
    skip list or format open, its calibration images. `compared`: by name of a variant whose format is open, what is
    measured to choose one. Compiling is not in it.
    """
    times = []
    trainings = {} if recipe.finetune is None else {"finetune": recipe.finetune}
    for variant in recipe.variants:
        trainings |= {
            f"steps/{name}": step.settings
            for name, step in zip(variant.step_names, variant.steps, strict=True)
            if isinstance(step.settings, FinetuneSpec)
        }
    for name, spec in trainings.items():
        if "train" in images:
            per_image = _TRAINING_PASSES * seconds["fp32"] + decode
            times.append(StageTime(name, spec.epochs * images["train"] * per_image))
    layers = linear_layers(empty_model(checkpoint), checkpoint.config.model_type)
    latency = recipe.evaluate.latency
    calls = latency.iterations + _WARMUP_CALLS
    for variant in recipe.variants:
        if variant.name not in images:
            continue
        if variant.chooses_format:
            of_compared = sum(seconds[number_type(candidate)] for candidate in compared[variant.name])
            total = images[variant.name] * (decode + of_compared) + latency.batch_sizes[0] * calls * of_compared
            times.append(StageTime(f"format {variant.name}", total))
            continue
        blocks = {layer.block for layer in layers if layer.block is not None}
        units = len(blocks) if variant.auto.granularity == "block" else len(layers) - 1
        per_pass = seconds[number_type(variant)]
        choosing = -(-images[variant.name] // CHOOSING)
        confirming = images[variant.name] - choosing
        # Two mixtures per unit, of which on average half of the blocks run anew.
        total = choosing * (_CHOOSING_DECODES * decode + (units + _SEARCH_LOOKS) * per_pass)
        total += confirming * (decode + _CONFIRMING_MODELS * per_pass)
        times.append(StageTime(f"sensitivity {variant.name}", total))
    of_variants = sum(seconds[number_type(variant)] for variant in recipe.variants)
    if "test" in images:
        times.append(StageTime("evaluate: accuracy", images["test"] * (decode + of_variants)))
    times.append(StageTime("evaluate: latency", sum(latency.batch_sizes) * calls * of_variants))
    return times


def number_type(variant: VariantSpec) -> str:
    """`fp32` or `bf16`: what its arithmetic is taken to cost; that of quantized and open formats is unknown before."""
    return "fp32" if (variant.run_as or variant.format) == "fp32" else "bf16"
