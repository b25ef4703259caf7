"""Query, key and value as one matrix product: one kernel instead of three, and the activations read once.

It is exact. The rows of a weight are independent wherever scales are per row (fp32, fp16, bf16, w8a8, fp8), so the
three weights stacked give the same outputs, up to the order in which a kernel sums. NF4, int4 and LLM.int8 pack
across rows and are left as they are.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vitopt.models.families import FUSED_LEAF

_PARTS = ("q_proj", "k_proj", "v_proj")
_ROW_SCALED = ("Tensor", "Int8Tensor", "Float8Tensor")


class FusedAttention(nn.Module):
    """Self-attention of a host model, its three input projections stacked into one."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.add_module(FUSED_LEAF, _stack([getattr(host, name) for name in _PARTS]))
        self.output_name = "o_proj" if hasattr(host, "o_proj") else "out_proj"
        self.add_module(self.output_name, getattr(host, self.output_name))
        self.config = host.config
        self.head_dim = int(host.head_dim)
        self.scaling = float(host.scaling if hasattr(host, "scaling") else host.scale)
        self.is_causal = False
        self.training = host.training

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states`: (batch, tokens, width). Returns the same shape, and the attention weights if any."""
        attended, weights = self.attend(hidden_states, attention_mask, **options)
        return getattr(self, self.output_name)(attended), weights

    def attend(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `forward`, without the product of the output."""
        batch, tokens, _ = hidden_states.shape
        projected = getattr(self, FUSED_LEAF)(hidden_states).view(batch, tokens, 3, -1, self.head_dim)
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch, heads, tokens, head_dim)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **options
        )
        return attended.reshape(batch, tokens, -1), weights


def fuse_projections(model: nn.Module) -> int:
    """Replace, in place, every self-attention whose projections can be stacked; return how many were.

    Eager attention is left alone: its function belongs to the host's own module.
    """
    if model.config._attn_implementation == "eager":
        return 0
    hosts = [name for name, module in model.named_modules() if _can_fuse(module)]
    for name in hosts:
        model.set_submodule(name, FusedAttention(model.get_submodule(name)))
    return len(hosts)


def _can_fuse(host: nn.Module) -> bool:
    """Whether a module is self-attention over plain heads, its projections alike and scaled per row."""
    parts = [getattr(host, name, None) for name in _PARTS]
    # A host that holds more than its projections, as Swin does its position bias, also computes more.
    plain = {name for name, _ in host.named_children()} in ({*_PARTS, "o_proj"}, {*_PARTS, "out_proj"})
    if not (plain and hasattr(host, "head_dim") and all(type(part) is nn.Linear for part in parts)):
        return False
    weights = [part.weight.data for part in parts if part is not None]
    alike = len({(type(weight), weight.dtype, weight.shape) for weight in weights}) == 1
    return alike and type(weights[0]).__name__ in _ROW_SCALED


def _stack(parts: list[nn.Linear]) -> nn.Linear:
    rows, columns = sum(part.out_features for part in parts), parts[0].in_features
    has_bias = any(part.bias is not None for part in parts)
    with torch.device("meta"):
        stacked = nn.Linear(columns, rows, bias=has_bias)
    stacked.weight = nn.Parameter(_stack_rows([part.weight.data for part in parts]), requires_grad=False)
    if has_bias:
        # BEiT's key has no bias: zeros stand for it.
        like = next(part.bias for part in parts if part.bias is not None)
        biases = [like.new_zeros(part.out_features) if part.bias is None else part.bias.data for part in parts]
        stacked.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return stacked


def _stack_rows(weights: list[torch.Tensor]) -> torch.Tensor:
    first = weights[0]
    if type(first) is torch.Tensor:
        return torch.cat(weights)
    # torchao's tensors wrap values and scales, each with a row per row of the weight.
    names, context = first.__tensor_flatten__()
    inner = {name: torch.cat([getattr(weight, name) for weight in weights]) for name in names}
    shape = torch.Size([sum(weight.shape[0] for weight in weights), first.shape[1]])
    return type(first).__tensor_unflatten__(inner, context, shape, (shape[1], 1))
