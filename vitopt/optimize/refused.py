"""8-bit products that a device's library refuses: those layers get more rows, or compute in 16 bit, and it is said.

Two are known. cuBLAS has no row-scaled fp8 product for many columns and few rows: on an H100 none for 9216 columns and
up to 256 rows (torchao issue 4582); a ViT at batch 1 has 197 rows, and its fc2 4,096 columns. `torch._int_mm` wants
more than 16 rows on CUDA (pytorch pull request 178469); a last block that computes the class token alone has one for
each image.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

DEVICES = ("cuda",)  # types of devices whose libraries refuse shapes
# The last is how row scales are refused that fit no way to scale.
_REFUSALS = ("CUBLAS_STATUS_NOT_SUPPORTED", "needs to be greater than 16", "Invalid scaling configuration")
_ENOUGH_ROWS = (32, 272)  # where the known limits end, and the tiles of matrix units are full
_EIGHT_BITS = ("Float8Tensor", "Int8Tensor")


@dataclass(frozen=True)
class Refused:
    """Module names of layers that refused a batch's rows: those that get more rows, and those that take 16 bit."""

    padded: tuple[str, ...] = ()
    half: tuple[str, ...] = ()


class FittingLinear(nn.Linear):
    """A linear layer that meets inputs of some numbers of rows in another way than its 8-bit product as it is.

    `padded_rows`: number of rows -> to how many they are filled up with zeros, which is exact: a row of a product
    depends on no other, and each row has a scale of its own. `half_rows`: those for which it takes `half_weight`.
    """

    def __init__(self, host: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = host.in_features, host.out_features
        self.weight, self.bias = host.weight, host.bias
        self.product = host.forward  # of any kind of layer; no module of its own, so that no weight is there twice
        self.register_buffer("half_weight", None, persistent=False)
        self.padded_rows: dict[int, int] = {}
        self.half_rows: set[int] = set()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input`: (..., columns). Returns (..., out features)."""
        rows = input.numel() // self.in_features
        if rows in self.half_rows:
            return nn.functional.linear(input, self.half_weight, self.bias)
        if rows in self.padded_rows:
            return _padded(self.product, input, self.padded_rows[rows])
        return self.product(input)


def _padded(product: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor, to_rows: int) -> torch.Tensor:
    # After the last token of each image, as scales may differ between tokens.
    tokens, images = input.shape[-2], input.numel() // input.shape[-1] // input.shape[-2]
    return product(nn.functional.pad(input, (0, 0, 0, -(-to_rows // images) - tokens)))[..., :tokens, :]


def fit_where_refused(model: nn.Module, call: Callable[[], object]) -> Refused:
    """Make `call`, which runs `model`; the 8-bit layers that refused its rows, replaced in place where they did.

    Rows are filled up to what the device takes, else the layer takes 16 bit for them. Any other error is raised.
    """
    found: dict[str, tuple[int, int | None]] = {}  # rows, and to how many they are filled up
    layers = {name: module for name, module in model.named_modules() if _is_eight_bit(module)}

    def attempt(name: str, layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        rows, product = input.numel() // layer.in_features, functools.partial(type(layer).forward, layer)
        for more in (rows, *(enough for enough in _ENOUGH_ROWS if enough > rows)):
            try:
                _require_product(layer.weight, more)
                output = product(input) if more == rows else _padded(product, input, more)
            except (RuntimeError, ValueError) as error:
                if not any(words in str(error) for words in _REFUSALS):
                    raise
            else:
                if more != rows:
                    found[name] = rows, more
                return output
        found[name] = rows, None
        return nn.functional.linear(input, layer.weight.dequantize(), layer.bias)

    for name, layer in layers.items():
        layer.forward = functools.partial(attempt, name, layer)
    try:
        call()
    finally:
        for layer in layers.values():
            del layer.forward
    for name, (rows, filled_to) in found.items():
        layer = layers[name]
        if not isinstance(layer, FittingLinear):
            layer = FittingLinear(layer)
            model.set_submodule(name, layer)
        if filled_to is not None:
            layer.padded_rows[rows] = filled_to
        else:
            layer.half_rows.add(rows)
            layer.half_weight = layer.weight.dequantize() if layer.half_weight is None else layer.half_weight
    return Refused(
        tuple(name for name, (_, filled_to) in found.items() if filled_to is not None),
        tuple(name for name, (_, filled_to) in found.items() if filled_to is None),
    )


def half_layers(model: nn.Module) -> int:
    """Layers that take 16 bit for a batch that was met."""
    return sum(isinstance(module, FittingLinear) and bool(module.half_rows) for module in model.modules())


def _is_eight_bit(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module.weight.data).__name__ in _EIGHT_BITS


def _require_product(weight: torch.Tensor, rows: int) -> None:
    """Make the product that compiled code will make of int8 values: torchao's eager one hides that it was refused."""
    if type(weight.data).__name__ == "Int8Tensor":
        values = weight.qdata
        torch._int_mm(values.new_zeros(rows, values.shape[1]), values.t())
