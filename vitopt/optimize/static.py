"""8-bit layers whose inputs are quantized by one scale that calibration gave: no row is looked at for its own.

What makes a layer's inputs, LayerNorm or GELU, can then write 8 bits at once: compiled, the quantization is part of its
kernel. A scale for all tokens is coarser than one for each, in int8 above all, where a few large values take the steps
of all others: layers that lose too much by it keep scales of their rows ("SmoothQuant", arXiv 2211.10438, section 3).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from vitopt.models.activations import LayerInputs
from vitopt.models.names import linear_layers


@dataclass(frozen=True)
class _Kind:
    """A format's values: their type, the largest that is used, and how much of the inputs' squares may be lost.

    On ViT-Tiny and photos int8 loses 2e-4 to 1e-3 before most products, and 2e-3 to 4e-2 before fc2, where it costs 7
    of 100 classes; fp8 rounds away 7e-4 of any values that it holds.
    """

    dtype: torch.dtype
    largest: float
    most_noise: float


KINDS = {"w8a8": _Kind(torch.int8, 127.0, 1e-3), "fp8": _Kind(torch.float8_e4m3fn, 448.0, 3e-3)}
_OF_TENSOR = {"Int8Tensor": "w8a8", "Float8Tensor": "fp8"}  # torchao's


class StaticLinear(nn.Linear):
    """An 8-bit layer that quantizes all its inputs by one scale; its weight keeps a scale for each row."""

    def __init__(self, host: nn.Linear, largest: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = host.in_features, host.out_features
        self.weight, self.bias = host.weight, host.bias
        self.format = _OF_TENSOR[type(host.weight.data).__name__]
        # A tensor, as a number would be compiled into the code that all blocks share.
        scale = torch.tensor(scale_of(largest, self.format), device=host.weight.device)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input`: (..., columns). Returns (..., out features)."""
        values = quantized(input.flatten(0, -2), self.scale, self.format)
        weight, scales = self.weight.qdata, self.weight.scale.float()
        if self.format == "w8a8":
            found = torch._int_mm(values, weight.t()).float() * (self.scale * scales.flatten())
            found = (found if self.bias is None else found + self.bias).to(input.dtype)
        else:
            found = torch._scaled_mm(
                values,
                weight.t(),
                scale_a=self.scale.expand(len(values), 1).contiguous(),
                scale_b=scales.t(),
                bias=self.bias,
                out_dtype=input.dtype,
                use_fast_accum=self.weight.mm_config.use_fast_accum,
            )
        return found.view(*input.shape[:-1], self.out_features)


def scale_of(largest: float, format: str) -> float:
    """What one step of the format's values stands for where the largest input is its largest value."""
    return max(largest, 1e-12) / KINDS[format].largest


def quantized(inputs: torch.Tensor, scale: torch.Tensor, format: str) -> torch.Tensor:
    """`inputs` over `scale`, in the format's type; what is larger than it holds is cut off."""
    kind = KINDS[format]
    scaled = (inputs.float() / scale).clamp(-kind.largest, kind.largest)
    return (scaled if kind.dtype.is_floating_point else scaled.round()).to(kind.dtype)


def use_static_scales(model: nn.Module, model_type: str, inputs: Mapping[str, LayerInputs]) -> int:
    """Replace, in place, the 8-bit layers that lose little by one scale for their `inputs` (by logical name); how many.

    Layers whose inputs were not observed stay as they are.
    """
    # Query, key and value may be one layer: they have the same inputs.
    layers = linear_layers(model, model_type)
    known = {layer.module: inputs[layer.logical] for layer in layers if layer.logical in inputs}
    replaced = 0
    for name, found in known.items():
        host = model.get_submodule(name)
        format = _OF_TENSOR.get(type(host.weight.data).__name__)
        if format is not None and found.noise.get(format, 1.0) <= KINDS[format].most_noise:
            model.set_submodule(name, StaticLinear(host, found.largest))
            replaced += 1
    return replaced
