"""8-bit layers whose inputs are quantized by scales that calibration gave: no row is looked at for its own.

What makes a layer's inputs, LayerNorm or GELU, can then write 8 bits at once: compiled, the quantization is part of its
kernel. One scale for all is coarser than one for each row, in int8 above all. So the middle of its range is taken off
each column, and the layer's outputs get what that is worth, which is exact; and the class token and others before the
patches have scales of their own, as they differ from patches. The step `smooth` makes columns alike beforehand. Layers
that lose much nevertheless, as behind some GELUs, keep scales of their rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vitopt.errors import CheckpointError
from vitopt.models.activations import LayerInputs
from vitopt.models.names import linear_layers


@dataclass(frozen=True)
class _Kind:
    """A format's values: their type, the largest that is used, and how much of an output's square may be lost."""

    dtype: torch.dtype
    largest: float
    most_noise: float


KINDS = {"w8a8": _Kind(torch.int8, 127.0, 1e-3), "fp8": _Kind(torch.float8_e4m3fn, 448.0, 1e-2)}
_OF_TENSOR = {"Int8Tensor": "w8a8", "Float8Tensor": "fp8"}  # torchao's


@dataclass(frozen=True)
class Scales:
    """How inputs become 8-bit values: (input - shift) / scale. `shift`: (groups, columns); `scale`: (groups, 1)."""

    shift: torch.Tensor
    scale: torch.Tensor


class StaticLinear(nn.Linear):
    """An 8-bit layer that quantizes its inputs by `Scales`; its weight keeps a scale for each row."""

    def __init__(self, host: nn.Linear, inputs: LayerInputs):
        nn.Module.__init__(self)
        self.in_features, self.out_features = host.in_features, host.out_features
        self.weight, self.bias = host.weight, host.bias
        self.format = _OF_TENSOR[type(host.weight.data).__name__]
        device = host.weight.device
        scales = scales_of(inputs.smallest.to(device), inputs.largest.to(device), self.format)
        # Tensors, as numbers would be compiled into the code that all blocks share.
        self.register_buffer("shift", scales.shift, persistent=False)
        self.register_buffer("scale", scales.scale, persistent=False)
        if self.format == "w8a8":
            offset = scales.shift @ host.weight.dequantize().float().t()
            offset = offset if self.bias is None else offset + self.bias.float()
            self.register_buffer("offset", offset, persistent=False)  # (groups, out features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input`: (..., tokens, columns), those before the patches first. Returns (..., tokens, out features)."""
        group = torch.arange(input.shape[-2], device=input.device).clamp(max=len(self.scale) - 1)
        scale, shape = self.scale[group], (*input.shape[:-1], self.out_features)
        values = quantized(input, self.shift[group], scale, self.format).flatten(0, -2)
        weight, scales = self.weight.qdata, self.weight.scale.float()
        if self.format == "w8a8":
            product = torch._int_mm(values, weight.t()).view(shape).float()
            return (product * (scale * scales.flatten()) + self.offset[group]).to(input.dtype)
        return torch._scaled_mm(
            values,
            weight.t(),
            scale_a=scale.expand(*input.shape[:-1], 1).reshape(-1, 1).contiguous(),
            scale_b=scales.t(),
            bias=self.bias,
            out_dtype=input.dtype,
            use_fast_accum=self.weight.mm_config.use_fast_accum,
        ).view(shape)


def scales_of(smallest: torch.Tensor, largest: torch.Tensor, format: str) -> Scales:
    """Scales for inputs from `smallest` to `largest`, (groups, columns) each."""
    kind = KINDS[format]
    if kind.dtype.is_floating_point:  # its steps grow with its values: a shift would make those of small ones coarser
        shift, reach = torch.zeros_like(smallest[:, :1]), torch.maximum(largest, -smallest)
    else:
        shift, reach = (largest + smallest) / 2, (largest - smallest) / 2
    return Scales(shift, reach.amax(1, keepdim=True).clamp(min=1e-12) / kind.largest)


def quantized(inputs: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, format: str) -> torch.Tensor:
    """(`inputs` - `shift`) / `scale`, in the format's type; what is larger than it holds is cut off."""
    kind = KINDS[format]
    scaled = ((inputs.float() - shift) / scale).clamp(-kind.largest, kind.largest)
    return (scaled if kind.dtype.is_floating_point else scaled.round()).to(kind.dtype)


def rounded(weight: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight`, (out features, columns), as values of the format and a scale for each row, (out features, 1)."""
    kind = KINDS[format]
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / kind.largest
    values = weight / scale
    return (values if kind.dtype.is_floating_point else values.round()).to(kind.dtype), scale


def use_static_scales(model: nn.Module, model_type: str, inputs: Mapping[str, LayerInputs]) -> int:
    """Replace, in place, the 8-bit layers that lose little by scales for their `inputs` (by logical name); how many.

    Layers whose inputs were not observed stay as they are.

    Raises:
        CheckpointError: other layers were observed.
    """
    # Query, key and value may be one layer: they have the same inputs.
    layers = linear_layers(model, model_type)
    known = {layer.module: (layer.logical, inputs[layer.logical]) for layer in layers if layer.logical in inputs}
    replaced = 0
    for name, (logical, found) in known.items():
        host = model.get_submodule(name)
        format = _OF_TENSOR.get(type(host.weight.data).__name__)
        if found.smallest.shape[1] != host.in_features:
            raise CheckpointError(
                f"the inputs of {logical} were observed in a layer of {found.smallest.shape[1]} columns, and it has "
                f"{host.in_features}: do the step `calibrate` on this checkpoint"
            )
        if format is not None and found.noise.get(format, 1.0) <= KINDS[format].most_noise:
            model.set_submodule(name, StaticLinear(host, found))
            replaced += 1
    return replaced
