"""Calling a model, and the arithmetic of a call. Some families do not cast their pixels, so it is done here for all."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitopt.environment.devices import DTYPES
from vitopt.models.checkpoint import Checkpoint, empty_model


def input_dtype(model: nn.Module) -> torch.dtype:
    """Floating-point type of what a model holds unquantized, in which it takes pixels."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.dtype in DTYPES.values())


def logits(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """(batch, classes), in the model's type, from images of any: (batch, 3, height, width)."""
    outputs: torch.Tensor = model(pixel_values=pixel_values.to(input_dtype(model))).logits
    return outputs


def flops_per_image(checkpoint: Checkpoint, rewrite: Callable[[nn.Module], object] = lambda model: None) -> int:
    """Arithmetic of one image in matrix products and convolutions, a multiply-add counted as two.

    `rewrite` makes of the checkpoint's model, in place, the one that runs.
    """
    model = empty_model(checkpoint)
    rewrite(model)
    # Attention as matrix products: what its kernels do is not counted on the meta device.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        logits(model, torch.empty(1, 3, *checkpoint.image_size, device="meta"))
    return int(counter.get_total_flops())
