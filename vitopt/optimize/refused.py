"""fp8 products that a device's library refuses: those layers compute in 16 bit for such a batch, and it is said.

cuBLAS has no row-scaled fp8 product for many columns and few rows: on an H100 none for 9216 columns and up to 256 rows
(torchao issue 4582). A ViT at batch 1 has 197 rows, and its fc2 4,096 columns.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn

_REFUSAL = "CUBLAS_STATUS_NOT_SUPPORTED"


class PartlyHalfLinear(nn.Linear):
    """A linear layer that also holds its weight in 16 bit, for inputs of `refused_rows` rows."""

    def __init__(self, host: nn.Linear, half: torch.Tensor):
        nn.Module.__init__(self)
        self.in_features, self.out_features = host.in_features, host.out_features
        self.weight, self.bias = host.weight, host.bias
        self.register_buffer("half_weight", half, persistent=False)
        self.refused_rows: set[int] = set()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input`: (..., columns). Returns (..., out features)."""
        weight = self.half_weight if input.numel() // self.in_features in self.refused_rows else self.weight
        return nn.functional.linear(input, weight, self.bias)


def fall_back_where_refused(model: nn.Module, call: Callable[[], object]) -> list[str]:
    """Make `call`, which runs `model`; module names of fp8 layers that refused it and take 16 bit for its rows.

    The layers are replaced in place. Any other error is raised.
    """
    refused: dict[str, int] = {}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight.data).__name__ == "Float8Tensor"
    }

    def attempt(name: str, layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        try:
            return type(layer).forward(layer, input)
        except RuntimeError as error:
            if _REFUSAL not in str(error):
                raise
            refused[name] = input.numel() // layer.in_features
            return nn.functional.linear(input, layer.weight.dequantize(), layer.bias)

    for name, layer in layers.items():
        layer.forward = functools.partial(attempt, name, layer)
    try:
        call()
    finally:
        for layer in layers.values():
            del layer.forward
    for name, rows in refused.items():
        layer = layers[name]
        if not isinstance(layer, PartlyHalfLinear):
            layer = PartlyHalfLinear(layer, layer.weight.dequantize())
            model.set_submodule(name, layer)
        layer.refused_rows.add(rows)
    return list(refused)
