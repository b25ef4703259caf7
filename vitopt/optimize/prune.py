"""A step that removes whole blocks and units of the feed-forward layers: an ordinary, smaller model of the same kind.

All blocks keep one width, so that config.json describes the result and plain transformers opens it. Heads stay: the
configurations of transformers declare no width of a head, which would be needed beside fewer of them.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from vitopt import progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor, batches
from vitopt.environment import devices
from vitopt.errors import MeasurementError, RecipeError
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, parameter_count, save_checkpoint
from vitopt.models.forward import logits
from vitopt.models.names import block_names, linear_layers
from vitopt.models.origin import note_origin
from vitopt.steps import PruneSpec
from vitopt.transformation import note_images, require_float, require_images

_BATCH = 16
_OF_BACKBONES = ("stage_names", "out_features", "out_indices")
_MULTIPLE = 64  # what NF4 and int4 hold, and what matrix products like
_DAMPING = 1e-4  # of the mean square of an activation, for fewer rows than units


@dataclass(frozen=True)
class Pruned:
    """`removed`: numbers of the blocks that are gone. `units`: of each feed-forward layer, before and after; None where
    none is gone. `kl`: mean divergence of the answers from those before, over the calibration images, in nats."""

    removed: tuple[int, ...]
    units: tuple[int, int] | None
    parameters: tuple[int, int]
    kl: float

    def summary(self) -> str:
        """In a few words, for the line that a run prints."""
        did = [f"without {', '.join(f'block.{number}' for number in self.removed)}"] if self.removed else []
        did += [f"{self.units[1]} of {self.units[0]} units"] if self.units else []
        before, after = self.parameters
        return f"{', '.join(did)}: {after / 1e6:.1f} of {before / 1e6:.1f} M parameters, KL {self.kl:.3g}"


def pruned_config(config: PretrainedConfig, spec: PruneSpec) -> PretrainedConfig:
    """What describes the smaller model.

    Raises:
        RecipeError: there is nothing to remove, or too little would be left, or no configuration of this family
            describes the result.
    """
    result = copy.deepcopy(config)
    part = getattr(result, "vision_config", result)
    blocks, width = (getattr(part, key, 0) for key in ("num_hidden_layers", "intermediate_size"))
    if not blocks or (spec.mlp and not width):
        what = "feed-forward width" if blocks else "number of blocks"
        raise RecipeError(f"`prune`: no configuration of a {config.model_type} model has a {what} to change")
    if spec.depth >= blocks:
        raise RecipeError(f"`prune: depth` {spec.depth} leaves none of the model's {blocks} blocks: take fewer")
    if spec.mlp:
        kept = max(1, round(width * (1 - spec.mlp) / _MULTIPLE)) * _MULTIPLE
        if kept >= width:
            raise RecipeError(
                f"`prune: mlp` {spec.mlp:g} removes nothing: {width} units are reduced by multiples of {_MULTIPLE}, so "
                f"take {_MULTIPLE / width:.3g} or more"
            )
        part.intermediate_size = kept
    if spec.depth:
        part.num_hidden_layers = blocks - spec.depth
        # With the number of blocks goes which of their outputs a backbone gives; an image classifier gives none.
        content = {key: value for key, value in result.to_dict().items() if key not in _OF_BACKBONES}
        result = type(config).from_dict(content)
    if spec.mlp and _widths(result) != (_widths(config)[0], {kept}):
        # SigLIP's pooling head has the width of its blocks, DINOv2 another key.
        raise RecipeError(
            f"`prune: mlp`: a {config.model_type} model cannot say a feed-forward width for its blocks alone"
        )
    return result


def _widths(config: PretrainedConfig) -> tuple[dict[str, torch.Size], set[int]]:
    """Shapes of all parameters outside the blocks, and the widths of the feed-forward layers in them."""
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    blocks, layers = block_names(model, config.model_type), linear_layers(model, config.model_type)
    outside = {name: of.shape for name, of in model.named_parameters() if not name.startswith(blocks)}
    return outside, {model.get_submodule(of.module).out_features for of in layers if of.logical.endswith(".fc1")}


def prune(
    checkpoint: Checkpoint,
    spec: PruneSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet | None = None,
    seed: int = 0,
) -> Pruned:
    """Write a checkpoint with fewer blocks or narrower feed-forward layers, as `images` show which are needed least.

    Blocks go one by one, each time the one without which the answers differ least from the whole model's (KL). Of the
    units those go whose loss the others make up for best (`without_units`). Train the result, with the original as
    teacher, to get its accuracy back.

    Raises:
        DataError: there are no images.
        CheckpointError: the checkpoint is quantized.
        RecipeError: see `pruned_config`.
        MeasurementError: an activation is no finite number.
        StorageError: the output would replace something else, is in use, or cannot be written.
    """
    images = require_images(images, "`prune`")
    require_float(checkpoint)
    config = pruned_config(checkpoint.config, spec)
    with storage.reserved(output, checkpoint.folder), torch.inference_mode():
        target = devices.resolve_device(device)
        model, processor = load_model(checkpoint, dtype=torch.float32, device=target), load_processor(checkpoint)
        stream = batches(images, Preprocessor(processor), _BATCH)
        pixels = [batch.pixel_values.to(target) for batch in stream]
        reference, parameters = _answers(model, pixels), parameter_count(model)
        removed = _remove_blocks(model, pixels, reference, spec.depth)
        width = getattr(config, "vision_config", config).intermediate_size if spec.mlp else None
        units = None if width is None else _narrow(model, pixels, width)
        kl = _divergence(reference, _answers(model, pixels))
        model.config = config
        result = Pruned(removed, units, (parameters, parameter_count(model)), kl)
        with storage.staged_folder(output) as folder:
            save_checkpoint(model, processor, folder)
            note_images(checkpoint, images, "pruning", folder)
            note_origin(
                checkpoint, folder, "prune", removed_blocks=removed, units=width, images=len(images), kl=round(kl, 4)
            )
    return result


def _answers(model: PreTrainedModel, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """(images, classes), logarithms of probabilities."""
    return torch.cat([functional.log_softmax(logits(model, batch).float(), -1) for batch in pixels])


def _divergence(reference: torch.Tensor, answers: torch.Tensor) -> float:
    return float(functional.kl_div(answers, reference, reduction="batchmean", log_target=True))


def _remove_blocks(
    model: PreTrainedModel, pixels: Sequence[torch.Tensor], reference: torch.Tensor, count: int
) -> tuple[int, ...]:
    """Take `count` blocks out of `model`; their numbers."""
    if not count:
        return ()
    names = block_names(model, model.config.model_type)
    parent, _, name = names[0].rpartition(".")[0].rpartition(".")
    host, blocks = model.get_submodule(parent), dict(enumerate(model.get_submodule(f"{parent}.{name}".strip("."))))

    def keep(numbers: Sequence[int]) -> None:
        setattr(host, name, nn.ModuleList(blocks[number] for number in numbers))

    kept = list(blocks)
    trials = sum(len(kept) - done for done in range(count))
    with progress.task("removing blocks", trials) as bar:
        for _ in range(count):
            losses = {}
            for number in kept:
                keep([other for other in kept if other != number])
                losses[number] = _divergence(reference, _answers(model, pixels))
                bar.advance()
            kept.remove(min(losses, key=lambda number: losses[number]))
    keep(kept)
    return tuple(number for number in blocks if number not in kept)


def _narrow(model: PreTrainedModel, pixels: Sequence[torch.Tensor], width: int) -> tuple[int, int]:
    """Leave `width` units in each feed-forward layer; each is shown what the narrowed ones before it give."""
    layers = {layer.logical: layer.module for layer in linear_layers(model, model.config.model_type)}
    names = [(layers[name.replace("fc2", "fc1")], module) for name, module in layers.items() if name.endswith("fc2")]
    before = 0
    for first, second in progress.track(names, "removing units", len(names)):
        fc1, fc2 = model.get_submodule(first), model.get_submodule(second)
        before = fc2.in_features
        moments = _moments(model, fc2, pixels)
        kept, weight = without_units(torch.cat([fc2.weight, fc2.bias[:, None]], 1), moments, width)
        fc1.weight, fc1.bias = (nn.Parameter(of[kept]) for of in (fc1.weight, fc1.bias))
        fc2.weight, fc2.bias = nn.Parameter(weight[:, :-1].contiguous()), nn.Parameter(weight[:, -1].contiguous())
        fc1.out_features = fc2.in_features = width
    return before, width


class _Seen(Exception):
    """A layer has got its inputs."""


def _moments(model: PreTrainedModel, layer: nn.Linear, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of x xᵀ over all inputs x of `layer`, each with a 1 at its end; (inputs + 1, inputs + 1), float64.

    Raises:
        MeasurementError: an input is no finite number.
    """
    size = layer.in_features + 1
    total, rows = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device), 0

    def add(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows
        inputs = functional.pad(given[0].flatten(0, -2), (0, 1), value=1.0)
        total.add_((inputs.T @ inputs).double())
        rows += len(inputs)
        raise _Seen  # nothing behind this layer matters

    hook = layer.register_forward_pre_hook(add)
    try:
        for batch in pixels:
            with suppress(_Seen):
                logits(model, batch)
    finally:
        hook.remove()
    if not torch.isfinite(total).all():
        raise MeasurementError("inputs of feed-forward layers are not all finite numbers: the model is broken")
    return total / rows


def without_units(weight: torch.Tensor, moments: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which `width` inputs of a layer to keep, in order, and its weight for them.

    `weight`: (outputs, inputs + 1), the bias in the last column; `moments`: as `_moments` gives. One by one that input
    goes whose removal changes the outputs least in the mean square, after the weights of all others were fitted anew
    (optimal brain surgeon, Hassibi and Stork 1992; for units: ZipLM, arXiv 2302.04089). Returns indices (width,) and a
    weight (outputs, width + 1) in the type of `weight`.
    """
    damped = moments + _DAMPING * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)
    inverse, fitted = torch.linalg.inv(damped), weight.double()
    left = torch.ones(len(moments), dtype=torch.bool, device=moments.device)
    for _ in range(len(moments) - 1 - width):
        costs = fitted.square().sum(0) / inverse.diagonal()
        costs[~left] = torch.inf
        costs[-1] = torch.inf  # the bias
        unit = costs.argmin()
        row = inverse[unit] / inverse[unit, unit]
        fitted = fitted - torch.outer(fitted[:, unit], row)
        inverse = inverse - torch.outer(inverse[:, unit], row)
        left[unit] = False
    return left[:-1].nonzero().flatten(), fitted[:, left].to(weight.dtype)
