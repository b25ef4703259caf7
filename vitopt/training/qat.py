"""Quantization-aware training: layers compute with the values that their format will hold (arXiv 1712.05877).

Each step rounds by the functions that make the format, so that quantizing the trained weights gives what the last step
computed with. torchao's own fake quantizers round to other grids than the formats that vitopt makes: they know no
symmetric scale of a token, none of tinygemm's zero points, and no NF4. Gradients pass as if nothing were rounded
(straight-through estimator, arXiv 1308.3432).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from vitopt.errors import UnsupportedError
from vitopt.models.names import select
from vitopt.optimize.plan import plan_layers
from vitopt.recipe import VariantSpec
from vitopt.steps import FinetuneSpec

Rounding = Callable[[torch.Tensor], torch.Tensor]


def round_nf4(weight: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' NF4 in blocks of 64, scales quantized too; of (rows, columns), in bf16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.bfloat16().contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return dequantize_4bit(packed, state)


def round_int4(weight: torch.Tensor) -> torch.Tensor:
    """tinygemm's int4 in groups of 64, each with a scale and a zero point; of (rows, columns), in bf16."""
    from torchao.quantization import quant_primitives as primitives

    values, block = weight.bfloat16(), (1, 64)
    limits = {"quant_min": 0, "quant_max": 15}
    scale, zero = primitives._choose_qparams_affine_tinygemm(
        values,
        mapping_type=primitives.MappingType.ASYMMETRIC,
        block_size=block,
        target_dtype=torch.int32,
        scale_dtype=values.dtype,
        zero_point_dtype=values.dtype,
        **limits,
    )
    codes = primitives._quantize_affine_tinygemm(values, block, scale, zero, torch.int32, **limits)
    return primitives._dequantize_affine_tinygemm(
        codes, block, scale, zero, torch.int32, **limits, output_dtype=values.dtype
    )


def round_int8(values: torch.Tensor) -> torch.Tensor:
    """torchao's int8 with a symmetric scale for each row; of (..., columns), in float32."""
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows import Int8Tensor

    return Int8Tensor.from_hp(values, PerRow()).dequantize(output_dtype=torch.float32)


def _of_bf16(weight: torch.Tensor) -> torch.Tensor:
    return round_int8(weight.bfloat16())


# format -> how it rounds a weight, and the inputs of its layer where it rounds those
ROUNDINGS: dict[str, tuple[Rounding, Rounding | None]] = {
    "nf4": (round_nf4, None),
    "int4": (round_int4, None),
    "w8a8": (_of_bf16, round_int8),
}


class StraightThrough(torch.autograd.Function):
    """`apply(values, rounding)`: rounded values, whose gradients are those of the values."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        return rounding(values).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


class RoundedLinear(nn.Linear):
    """A linear layer that computes with what `format` will hold of its weight; its parameters are those of `host`."""

    def __init__(self, host: nn.Linear, format: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = host.in_features, host.out_features
        self.weight, self.bias = host.weight, host.bias
        self._of_weight, self._of_inputs = ROUNDINGS[format]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input`: (..., columns). Returns (..., out features)."""
        if self._of_inputs is not None:
            input = StraightThrough.apply(input, self._of_inputs)
        return functional.linear(input, StraightThrough.apply(self.weight, self._of_weight), self.bias)


def held_layers(model: PreTrainedModel, spec: FinetuneSpec) -> list[str]:
    """Modules of the layers of `spec.targets` that `quantize` would hold in `spec.format`.

    Raises:
        PatternError: a target matches no layer.
        UnsupportedError: the format can hold none of them.
    """
    assert spec.format is not None
    plan = plan_layers(model, model.config.model_type, VariantSpec(name="trained", format=spec.format))
    chosen = select(spec.targets, [planned.layer for planned in plan.layers])
    held = [p.layer.module for p in plan.layers if p.format == spec.format and p.layer.logical in chosen]
    if not held:
        raise UnsupportedError(f"no layer of `targets` is held in {spec.format}: name others, as block")
    return held


def train_rounded(model: PreTrainedModel, spec: FinetuneSpec) -> None:
    """Let the layers that `held_layers` names compute with what `spec.format` will hold, in place."""
    assert spec.format is not None
    for name in held_layers(model, spec):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, RoundedLinear(model.get_submodule(name), spec.format))
