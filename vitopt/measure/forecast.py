"""What a run will take on this machine: a few timed calls, multiplied. An estimate."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor
from vitopt.measure import end_to_end
from vitopt.measure.latency import clock_for
from vitopt.models.checkpoint import Checkpoint, empty_model
from vitopt.models.names import linear_layers
from vitopt.recipe import CHOOSING, FinetuneSpec, Recipe, VariantSpec
from vitopt.run_spec import granularity_of

_SECONDS = 2.0  # for each type of number
_MOST_CALLS = 20
_WARMUP_CALLS = 15
_SEARCH_LOOKS = 20  # mixtures that a search for a skip list evaluates, about
_CANDIDATES = 8  # units that are scored exactly after a sample
_CHOOSING_DECODES = 3  # for the table of damage, for that of recovery, and for the search
_CONFIRMING_MODELS = 3  # in 16 bit, quantized, and with the skip list that was found
_TRAINING_PASSES = 3  # forward, and backward twice as much


@dataclass(frozen=True)
class StageTime:
    """A stage of a run, about how long it will take, and in words what it will do; one that `stands` takes no time."""

    name: str
    seconds: float
    what: str = ""
    stands: bool = False


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
    measured: Collection[str] | None = None,
) -> list[StageTime]:
    """About how long the long stages take; see `left_out`.

    `seconds` per image by `number_type`; `images` per split: `train`, `test`, and by name of a variant that leaves its
    skip list or format open, its calibration images. `compared`: by name of a variant whose format is open, what is
    measured to choose one. `measured`: names of the variants that are measured, all of them if None.
    """
    times = []
    trainings = {} if recipe.finetune is None else {"finetune": recipe.finetune}
    for variant in recipe.variants:
        trainings |= {
            f"steps/{name}": step.settings
            for name, step in variant.all_steps.items()
            if isinstance(step.settings, FinetuneSpec)
        }
    for name, spec in trainings.items():
        if "train" in images:
            per_image = _TRAINING_PASSES * seconds["fp32"] + decode
            times.append(StageTime(name, spec.epochs * images["train"] * per_image))
    latency = recipe.evaluate.latency
    calls = latency.iterations + _WARMUP_CALLS
    for variant in recipe.variants:
        if variant.name not in images:
            continue
        if variant.chooses_format:
            of_compared = sum(seconds[number_type(candidate)] for candidate in compared[variant.name])
            total = images[variant.name] * (decode + of_compared) + latency.batch_sizes[0] * calls * of_compared
            ways = f"{len(compared[variant.name])} ways to run it on {images[variant.name]:,} calibration images"
            times.append(StageTime(f"format {variant.name}", total, ways))
        else:
            times.append(_search(variant, checkpoint, seconds[number_type(variant)], decode, images[variant.name]))
    rows = [seconds[number_type(v)] for v in recipe.variants if measured is None or v.name in measured]
    if rows and "test" in images:
        times.append(StageTime("evaluate: accuracy", images["test"] * (decode + sum(rows))))
    if rows:
        times.append(StageTime("evaluate: latency", sum(latency.batch_sizes) * calls * sum(rows)))
    if rows and "test" in images and recipe.evaluate.end_to_end:
        calls = end_to_end.TURNS * (1 + end_to_end.CALLS_A_TURN)
        whole = (calls * size * (len(rows) * decode + sum(rows)) for size in latency.batch_sizes)
        times.append(StageTime("evaluate: end to end", sum(min(t, end_to_end.SECONDS * len(rows)) for t in whole)))
    return times


def _search(variant: VariantSpec, checkpoint: Checkpoint, per_pass: float, decode: float, images: int) -> StageTime:
    """The sensitivity and the search for a skip list."""
    name, auto = f"sensitivity {variant.name}", variant.auto
    if auto.sensitivity is not None:
        return StageTime(name, 0.0, f"taken from {auto.sensitivity}")
    layers = linear_layers(empty_model(checkpoint), checkpoint.config.model_type)
    blocks = {layer.block for layer in layers if layer.block is not None}
    granularity = auto.granularity or granularity_of(variant.engine)
    kinds = {layer.logical.rpartition(".")[2] for layer in layers if layer.block is not None}
    units = {"block": len(blocks), "kind": len(kinds), "linear": len(layers) - 1}[granularity]
    choosing = -(-images // CHOOSING)
    confirming = images - choosing
    sampled = 0 if auto.sample is None else min(auto.sample, choosing) * units
    units = units if auto.sample is None else min(units, _CANDIDATES)
    # Two mixtures per unit, of which on average half of the blocks run anew.
    total = choosing * (_CHOOSING_DECODES * decode + (units + _SEARCH_LOOKS) * per_pass) + sampled * per_pass / 2
    total += confirming * (decode + _CONFIRMING_MODELS * per_pass)
    what = f"of {images:,} images of {auto.split} {choosing:,} choose by about {2 * units + _SEARCH_LOOKS} evaluations"
    return StageTime(name, total, f"{what}, {confirming:,} confirm")


def left_out(recipe: Recipe) -> str:
    """What a run also does and no estimate holds, in words."""
    compiles = any(v.compile or (v.chooses_format and v.fastest.compile) for v in recipe.variants)
    parts = ["making the variants' checkpoints", "memory", *(["compiling"] if compiles else [])]
    parts += ["calibrating adaptive variants"] if any(v.adaptive for v in recipe.variants) else []
    parts += [name for name in ("throughput", "roofline") if getattr(recipe.evaluate, name)]
    return f"not in these estimates: {', '.join(parts)}"


def number_type(variant: VariantSpec) -> str:
    """`fp32` or `bf16`: what its arithmetic is taken to cost; that of quantized and open formats is unknown before."""
    return "fp32" if (variant.run_as or variant.format) == "fp32" else "bf16"
