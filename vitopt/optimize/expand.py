"""4 bit on disk, full speed in use: packed layers expand to a format that computes fast, while loading."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vitopt.formats import FORMATS, QUANTIZED_FORMATS, Format, RunAs
from vitopt.models.names import linear_layers
from vitopt.optimize.formats import QUANTIZES, format_of

EXPANDABLE: tuple[Format, ...] = tuple(format for format, facts in FORMATS.items() if facts.expands)


def expand(model: PreTrainedModel, model_type: str, run_as: RunAs) -> None:
    """Turn packed layers into bf16, or into `w8a8` or `fp8`, in place; layers kept in 16 bit become bf16.

    A model without packed layers gives all its linear layers but the head.
    """
    layers = linear_layers(model, model_type)
    packed = [layer.module for layer in layers if format_of(model.get_submodule(layer.module)) in QUANTIZED_FORMATS]
    if packed:
        model.dequantize(dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    if run_as == "bf16":
        return
    _quantize(model, set(packed or [layer.module for layer in layers if not layer.is_head]), QUANTIZES[run_as]())


def _quantize(model: nn.Module, modules: set[str], config: Any) -> None:
    from torchao.quantization import quantize_

    quantize_(model, config, filter_fn=lambda module, name: name in modules)
