"""LoRA beside weights that are packed in NF4, which take an eighth of their memory (QLoRA, arXiv 2305.14314).

A layer computes with what NF4 holds of weight and update together (as L4Q, arXiv 2402.04902), so that `quantize` makes
of the merged weights what the last step computed with. As published, QLoRA computes with packed weight plus exact
update, whose sum no NF4 checkpoint holds.
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from vitopt.recipe import FinetuneSpec
from vitopt.training.qat import StraightThrough, held_layers, round_nf4


class PackedLora(LoraLinear):
    """peft's LoRA of a `Linear4bit`, which computes with what NF4 holds of both together."""

    base_layer: Any

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """`x`: (..., columns). Returns (..., out features)."""
        # The whole weight is made anew for the gradients: kept, it would take the memory that packing saves.
        product: torch.Tensor = checkpoint(self._product, x, use_reentrant=False, preserve_rng_state=False)
        return product

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        weight = StraightThrough.apply(self._whole_weight(), round_nf4)
        return functional.linear(x, weight, self.base_layer.bias)

    def _whole_weight(self) -> torch.Tensor:
        """(rows, columns), float32, not rounded."""
        packed = self.base_layer.weight
        with torch.autocast(packed.device.type, enabled=False):  # the same while training and merging
            update: torch.Tensor = self.get_delta_weight(self.active_adapters[0])
            return update.add(dequantize_4bit(packed.data, packed.quant_state))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put a float32 layer of the whole weight in the place of the packed one; what peft calls for its own merge."""
        weight, bias = self._whole_weight(), self.base_layer.bias
        self.base_layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.base_layer.weight, self.base_layer.bias = nn.Parameter(weight), bias


def pack(model: PreTrainedModel, spec: FinetuneSpec) -> dict[type[nn.Module], type[nn.Module]]:
    """Pack the weights of the layers that `held_layers` names, one by one, in place.

    Returns what peft puts around such a layer.
    """
    for name in held_layers(model, spec):
        parent, _, leaf = name.rpartition(".")
        host = model.get_submodule(name)
        packed = Linear4bit(host.in_features, host.out_features, host.bias is not None, quant_type="nf4", device="meta")
        weight = Params4bit(
            host.weight.detach().bfloat16(), requires_grad=False, blocksize=64, quant_type="nf4", module=packed
        )
        packed.weight, packed.bias = weight.to(host.weight.device), host.bias
        setattr(model.get_submodule(parent), leaf, packed)
    return {Linear4bit: PackedLora}
