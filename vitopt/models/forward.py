"""Calling a model: some families do not cast the pixels that they are given, so it is done here for all."""

import torch
from torch import nn

from vitopt.environment import DTYPES


def input_dtype(model: nn.Module) -> torch.dtype:
    """Floating-point type of what a model holds unquantized, in which it takes pixels."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.dtype in DTYPES.values())


def logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """(batch, classes), in the model's type, from images of any: (batch, 3, height, width)."""
    found: torch.Tensor = model(pixel_values=pixel_values.to(input_dtype(model))).logits
    return found
