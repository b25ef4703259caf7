"""The blocks of a ViT with less work between its matrix products: the same functions, other kernels.

Blocks are x + attention(norm(x)), then x + mlp(norm(x)) ("An Image is Worth 16x16 Words", arXiv 2010.11929, eq. 2 and
3). Each change replaces modules in place under the names that they had, so that layers are still found.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Carried(NamedTuple):
    """What a block leaves to the next beside tokens: `delta` is yet to be added, `sizes` are patches of each token."""

    hidden: torch.Tensor  # (batch, tokens, width)
    delta: torch.Tensor | None = None  # (batch, tokens, width)
    sizes: torch.Tensor | None = None  # (batch, tokens), float32; None where each is one patch


class Reduces(Protocol):
    """Makes fewer tokens in a block, between its attention and its MLP."""

    def bias(self, sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """What the scores of attention get for tokens of these sizes."""

    def __call__(
        self, hidden: torch.Tensor, sizes: torch.Tensor | None, noted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens and sizes that are left, given what attention noted."""


_PARTS = {"attention", "layernorm_before", "layernorm_after", "mlp", "dropout"}
# Classes whose head looks at the first token alone.
_OF_CLASS_TOKEN = ("ViTForImageClassification", "DeiTForImageClassification", "ViTMSNForImageClassification")


class Block(nn.Module):
    """A pre-norm block, without its host's dropout.

    With `carries` it leaves its last addition to who comes next. `reduce` makes fewer tokens; sizes are handed on, but
    by the `last` block.
    """

    def __init__(self, host: nn.Module):
        super().__init__()
        self.attention, self.mlp = host.attention, host.mlp
        self.layernorm_before, self.layernorm_after = host.layernorm_before, host.layernorm_after
        self.carries, self.last = False, False
        self.reduce: Reduces | None = None

    def forward(self, hidden_states: torch.Tensor | Carried, *args: Any, **options: Any) -> torch.Tensor | Carried:
        """`hidden_states`: (batch, tokens, width), or what a block before carries. Returns the same, fewer tokens where
        attention gives fewer, the first ones, or where some are reduced."""
        given = hidden_states if isinstance(hidden_states, Carried) else Carried(hidden_states)
        # Done here an addition is one kernel with the norm that follows; at the end of a block it is one of its own.
        residual, sizes = given.hidden if given.delta is None else given.delta + given.hidden, given.sizes
        if self.reduce is not None and sizes is not None:
            options["bias"] = self.reduce.bias(sizes, residual.dtype)
        attended, noted = self.attention(self.layernorm_before(residual), *args, **options)
        residual = attended + residual[:, : attended.shape[1]]
        if self.reduce is not None:
            residual, sizes = self.reduce(residual, sizes, noted)
        delta = self.mlp(self.layernorm_after(residual))
        if self.last:
            return delta + residual
        if self.carries:
            return Carried(residual, delta, sizes)
        return delta + residual if sizes is None else Carried(delta + residual, sizes=sizes)


class ClassTokenAttention(nn.Module):
    """Attention of the first token alone: keys and values of all tokens, one query."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = host.q_proj, host.k_proj, host.v_proj, host.o_proj
        self.config, self.is_causal = host.config, False
        self.heads, self.scaling = host.q_proj.out_features // host.head_dim, float(host.scaling)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states`: (batch, tokens, width). Returns (batch, 1, width), and the attention weights if any."""
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(hidden_states[:, :1]), self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **options
        )
        return self.o_proj(attended.flatten(2)), weights


class GeluMlp(nn.Module):
    """fc1, GELU, fc2, in which GELU is the epilogue of fc1's matrix product: tanh's approximation of it."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = host.fc1, host.fc2

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`hidden_states`: (..., width). Returns the same shape."""
        return self.fc2(linear_gelu(hidden_states, self.fc1.weight, self.fc1.bias))


# An operator of its own: torch's `_addmm_activation` is not the same function on every device, see below.
@torch.library.custom_op("vitopt::linear_gelu", mutates_args=())
def linear_gelu(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(inputs weight^T + bias) with gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).

    `inputs`: (..., in); `weight`: (out, in). Returns (..., out). On CUDA it is one kernel of cuBLASLt.
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if inputs.is_cuda:
        found = torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    else:  # there it is the exact GELU; what is measured on a CPU is to hold on a GPU
        found = nn.functional.gelu(torch.addmm(bias, rows, weight.t()), approximate="tanh")
    return found.view(*inputs.shape[:-1], weight.shape[0])


@linear_gelu.register_fake
def _(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def carry_residuals(model: nn.Module, names: tuple[str, ...]) -> int:
    """Let each block but the last leave its last addition to the next one, in place; how many do. Exact."""
    if not all(is_plain(model.get_submodule(name)) for name in names):
        return 0
    for name in names[:-1]:
        as_block(model, name).carries = True
    if len(names) > 1:
        as_block(model, names[-1])  # it takes what the one before carries
    return len(names) - 1


def narrow_last_block(model: nn.Module, names: tuple[str, ...]) -> int:
    """Let the last block compute the first token alone where the head looks at no other; 1, or 0 if it cannot. Exact.

    Eager attention is left alone: its function belongs to the host's own module.
    """
    host = model.get_submodule(names[-1])
    attention = getattr(host, "attention", None)
    separate = all(hasattr(attention, part) for part in ("q_proj", "k_proj", "v_proj", "o_proj", "scaling"))
    eager = model.config._attn_implementation == "eager"
    if eager or type(model).__name__ not in _OF_CLASS_TOKEN or not (is_plain(host) and separate):
        return 0
    as_block(model, names[-1]).attention = ClassTokenAttention(attention)
    return 1


def join_gelu(model: nn.Module) -> int:
    """Replace, in place, every MLP whose GELU can be the epilogue of its first product; how many were.

    That is one of an unquantized layer with a bias. Its answers differ by those of tanh's approximation.
    """
    hosts = [name for name, module in model.named_modules() if _has_gelu(module)]
    for name in hosts:
        model.set_submodule(name, GeluMlp(model.get_submodule(name)))
    return len(hosts)


def _has_gelu(host: nn.Module) -> bool:
    if {name for name, _ in host.named_children()} != {"fc1", "fc2", "activation_fn"}:
        return False
    plain = type(host.fc1) is nn.Linear and type(host.fc1.weight.data) is torch.Tensor and host.fc1.bias is not None
    return plain and type(host.activation_fn).__name__ == "GELUActivation"


def is_plain(host: nn.Module) -> bool:
    """Whether a block is one of those that this file knows, as its host made it or rewritten."""
    return isinstance(host, Block) or {name for name, _ in host.named_children()} == _PARTS


def as_block(model: nn.Module, name: str) -> Block:
    """The block of this name as a `Block`, which replaces its host where it is none yet."""
    host = model.get_submodule(name)
    if not isinstance(host, Block):
        host = Block(host)
        model.set_submodule(name, host)
    return host
