"""A step that rotates the channels of all tokens, the model's function unchanged: no column of weights stands out then,
which is meant to make few bits lose less. Of ViT-Tiny that is not shown (docs/design.md), so measure it.

As QuaRot (arXiv 2404.00456), for LayerNorm: once its factors and offsets are part of the linear layers behind it, a
LayerNorm takes off the mean over channels and divides by one number. A rotation that leaves the vector of ones where it
is commutes with both. So what makes tokens (embeddings, output projection, fc2) is rotated, what takes them is rotated
back, and what comes out is an ordinary checkpoint.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vitopt.data.images import ImageSet
from vitopt.errors import UnsupportedError
from vitopt.layers import QKV
from vitopt.models.checkpoint import Checkpoint
from vitopt.models.families import FAMILIES
from vitopt.models.names import block_names, is_in_block, linear_layers
from vitopt.optimize.equivalent import write_equivalent
from vitopt.steps import RotateSpec

_TAKES = ({"query", "key", "value", QKV}, {"fc1"})  # kinds of layers behind the first and the second norm of a block
_MAKES = ("output", "fc2")


@dataclass(frozen=True)
class Rotated:
    """How many channels were rotated."""

    channels: int

    def summary(self) -> str:
        """In a few words, for the line that a run prints."""
        return f"rotated {self.channels} channels"


def rotate(
    checkpoint: Checkpoint,
    spec: RotateSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet | None = None,
    seed: int = 0,
) -> Rotated:
    """Write a checkpoint with the same answers whose tokens are rotated at random.

    Raises:
        CheckpointError: the checkpoint is quantized already.
        UnsupportedError: tokens of this model pass through more than LayerNorms and linear layers.
        StorageError: the output would replace something else, is in use, or cannot be written.
    """

    def change(model: PreTrainedModel, processor: Any) -> Rotated:
        try:
            return turn(model, checkpoint.config.model_type, seed)
        except UnsupportedError as error:
            raise UnsupportedError(f"{checkpoint.source} cannot be rotated: {error}; leave the step out") from error

    return write_equivalent(checkpoint, output, device, "rotate", change)


@torch.inference_mode()
def turn(model: nn.Module, model_type: str, seed: int) -> Rotated:
    """Rotate the channels of a live model in place.

    Raises:
        UnsupportedError: it has not one LayerNorm behind its blocks, or not two in each of them before what they do.
    """
    norms = FAMILIES[model_type].norms
    outside = {name: module for name, module in model.named_modules() if not is_in_block(name, model_type)}
    last = [module for module in outside.values() if isinstance(module, nn.LayerNorm)]
    if norms is None or len(last) != 1:
        why = "they stand behind attention and MLP" if norms is None else f"{len(last)} stand outside of its blocks"
        raise UnsupportedError(f"its LayerNorms have to stand before what blocks do, and one behind all blocks; {why}")
    layers = linear_layers(model, model_type)
    heads = _modules(model, (layer.module for layer in layers if layer.is_head))
    _fold(last[0], heads)
    takes, makes = heads, []
    for index, name in enumerate(block_names(model, model_type)):
        block = model.get_submodule(name)
        of_kind = {layer.logical.rpartition(".")[2]: layer.module for layer in layers if layer.block == index}
        for norm, kinds in zip(norms, _TAKES, strict=True):
            behind = _modules(model, (module for kind, module in of_kind.items() if kind in kinds))
            _fold(block.get_submodule(norm), behind)
            takes += behind
        written = _modules(model, (of_kind[kind] for kind in _MAKES))
        for factors, linear in zip(_layer_scales(block, last[0].weight.shape), written, strict=False):
            _multiply(linear, factors)
        makes += written
    width = last[0].weight.numel()
    rotation = _rotation(width, seed).to(last[0].weight.device)
    for linear in takes:
        _set(linear.weight, _columns(linear.weight, width).double() @ rotation.T)
    convolutions = [module for module in outside.values() if isinstance(module, nn.Conv2d)]
    for maker in (*makes, *(module for module in convolutions if module.out_channels == width)):
        _set(maker.weight, rotation @ maker.weight.flatten(1).double())
        if maker.bias is not None:
            _set(maker.bias, rotation @ maker.bias.double())
    for name, parameter in model.named_parameters():
        if not is_in_block(name, model_type) and parameter.ndim == 3 and parameter.shape[-1] == width:
            _set(parameter, parameter.double() @ rotation.T)  # tokens and positions of the embeddings
    return Rotated(width)


def _modules(model: nn.Module, names: Iterable[str]) -> list[Any]:
    return [model.get_submodule(name) for name in dict.fromkeys(names)]


def _columns(weight: torch.Tensor, width: int) -> torch.Tensor:
    """A view (rows, any, width): a head may take several tokens side by side."""
    return weight.view(len(weight), -1, width)


def _fold(norm: nn.LayerNorm, behind: Iterable[nn.Linear]) -> None:
    """Make the norm's factors and offsets part of the layers `behind` it.

    An offset of a key without a bias is left out: it adds the same to all scores of a query.
    """
    for linear in behind:
        columns = _columns(linear.weight, norm.weight.numel())
        if linear.bias is not None:
            linear.bias += (columns @ norm.bias).sum(1)
        columns *= norm.weight
    norm.weight.fill_(1)
    norm.bias.zero_()


def _layer_scales(block: nn.Module, shape: torch.Size) -> list[torch.Tensor]:
    """Factors of what a block's attention and its MLP add to the tokens, as in DINOv2."""
    inside = [module for module in block.modules() if not isinstance(module, nn.LayerNorm | nn.Linear)]
    return [one for module in inside for one in module.parameters(recurse=False) if one.shape == shape]


def _multiply(linear: nn.Linear, factors: torch.Tensor) -> None:
    linear.weight *= factors[:, None]
    if linear.bias is not None:
        linear.bias *= factors
    factors.fill_(1)


def _set(parameter: torch.Tensor, values: torch.Tensor) -> None:
    parameter.copy_(values.view(parameter.shape))


def _rotation(width: int, seed: int) -> torch.Tensor:
    """(width, width), float64, orthogonal, at random among those that leave the vector of ones where it is."""
    generator = torch.Generator().manual_seed(seed)

    def basis() -> torch.Tensor:
        # Its first column is a multiple of the vector of ones, the same one each time.
        drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
        drawn[:, 0] = 1
        return torch.linalg.qr(drawn)[0]

    return basis() @ basis().T
