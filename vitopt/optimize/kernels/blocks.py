"""Blocks of a ViT whose products take in what stands around them: LayerNorm, GELU and the addition to the residual.

Products that were measured faster so, and only those; the others are torch's own, which the compiler joins as it can.
A block is then five kernels: both attention products, attention, both products of the MLP.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vitopt.models.families import FUSED_LEAF
from vitopt.optimize.blocks import Block, GeluMlp, is_plain, linear_gelu
from vitopt.optimize.compiled import compiler_options, compiling
from vitopt.optimize.fuse import FusedAttention
from vitopt.optimize.kernels.product import Gelu, Tile, fused_linear
from vitopt.optimize.kernels.tiles import candidates, fastest


class FusedLinear(nn.Linear):
    """A linear layer with the norm before it, GELU after it, or an addition to its outputs.

    The norm's scale and shift are part of its weight and bias, which are rounded once more to their type.
    `tiles`: rows of inputs -> the tile of the kernel, None for torch; rows that are not there are torch's.
    """

    def __init__(self, host: nn.Linear, norm: nn.LayerNorm | None, gelu: Gelu = "none"):
        nn.Module.__init__(self)
        self.in_features, self.out_features = host.in_features, host.out_features
        self.weight, self.bias = (host.weight, host.bias) if norm is None else folded(host, norm)
        sums = None if norm is None else self.weight.float().sum(1)
        self.register_buffer("weight_sums", sums, persistent=False)
        self.eps = 0.0 if norm is None else float(norm.eps)
        self.gelu, self.dependent = gelu, False
        self.tiles: dict[int, Tile | None] = {}

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`input`: (..., in features). Returns (..., out features), added to `residual` if there is one."""
        tile = self.tiles.get(input.numel() // self.in_features)
        if tile is not None:
            return self.by_kernel(input, self.weight, residual, tile)
        return _by_torch(input, self.weight, self.bias, residual, self.weight_sums is not None, self.eps, self.gelu)

    def by_kernel(
        self, input: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, tile: Tile
    ) -> torch.Tensor:
        """As `forward`, with another `weight`."""
        how = (self.eps, self.gelu, list(tile), self.dependent)
        return fused_linear(input, weight, self.bias, self.weight_sums, residual, *how)


def _by_torch(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
    normed: bool, eps: float, gelu: str,
) -> torch.Tensor:  # fmt: skip
    if normed:
        input = nn.functional.layer_norm(input, input.shape[-1:], eps=eps)
    if gelu == "tanh":
        return linear_gelu(input, weight, bias)
    found = nn.functional.linear(input, weight, bias)
    if gelu == "erf":
        found = nn.functional.gelu(found)
    return found if residual is None else found + residual


class FusedBlock(nn.Module):
    """A pre-norm block, without its host's dropout, whose attention or MLP consists of fused products."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.attention, self.mlp = host.attention, host.mlp
        self.layernorm_before, self.layernorm_after = host.layernorm_before, host.layernorm_after

    def forward(self, hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """`hidden_states`: (batch, tokens, width). Returns the same, fewer tokens where attention gives fewer."""
        if isinstance(self.layernorm_before, nn.Identity):
            attended, _ = self.attention.attend(hidden_states, *args, **options)
            residual = getattr(self.attention, self.attention.output_name)(attended, hidden_states)
        else:
            attended, _ = self.attention(self.layernorm_before(hidden_states), *args, **options)
            residual = attended + hidden_states[:, : attended.shape[1]]
        if isinstance(self.layernorm_after, nn.Identity):
            return self.mlp.fc2(self.mlp.fc1(residual), residual)
        return self.mlp(self.layernorm_after(residual)) + residual


def folded(host: nn.Linear, norm: nn.LayerNorm) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias with which `host` gives, of rows that are normalised alone, what it gives after `norm`."""
    weight, dtype = host.weight.data.float(), host.weight.dtype
    bias = None if host.bias is None else host.bias.data.float()
    if norm.bias is not None:
        shift = weight @ norm.bias.data.float()
        bias = shift if bias is None else bias + shift
    if norm.weight is not None:
        weight = weight * norm.weight.data.float()
    parts = (None if part is None else nn.Parameter(part.to(dtype), requires_grad=False) for part in (weight, bias))
    return tuple(parts)  # type: ignore[return-value]


def fuse_products(model: nn.Module, names: tuple[str, ...]) -> int:
    """Replace, in place, the products of all blocks that can take in what stands around them; how many were.

    Attention can where query, key and value are one product, an MLP where it has GELU; both where no layer of theirs is
    quantized. Which of them do is measured later (`choose_tiles`).
    """
    replaced = 0
    for name in names:
        host = model.get_submodule(name)
        if not is_plain(host) or (isinstance(host, Block) and host.carries):
            continue
        block, attention, mlp = FusedBlock(host), host.attention, host.mlp
        if type(attention) is FusedAttention and _are_plain(*attention.children()):
            first, last = getattr(attention, FUSED_LEAF), getattr(attention, attention.output_name)
            setattr(attention, FUSED_LEAF, FusedLinear(first, block.layernorm_before))
            setattr(attention, attention.output_name, FusedLinear(last, None))
            block.layernorm_before = nn.Identity()
            replaced += 2
        if (gelu := _gelu_of(mlp)) and _are_plain(mlp.fc1, mlp.fc2):
            mlp.fc1 = FusedLinear(mlp.fc1, block.layernorm_after, gelu)
            mlp.fc2 = FusedLinear(mlp.fc2, None)
            block.layernorm_after = nn.Identity()
            replaced += 2
        if any(isinstance(module, FusedLinear) for module in block.modules()):
            model.set_submodule(name, block)
    return replaced


def fused_layers(model: nn.Module) -> list[FusedLinear]:
    """The layers that `fuse_products` made."""
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def _are_plain(*layers: nn.Module) -> bool:
    return all(type(layer) is nn.Linear and type(layer.weight.data) is torch.Tensor for layer in layers)


def _gelu_of(mlp: nn.Module) -> Gelu | None:
    if isinstance(mlp, GeluMlp):
        return "tanh"
    children = dict(mlp.named_children())
    exact = type(children.get("activation_fn")).__name__ == "GELUActivation"
    return "erf" if exact and set(children) == {"fc1", "fc2", "activation_fn"} else None


def choose_tiles(
    model: nn.Module, call: Callable[[], object], *, autotune: bool = False, dependent: bool = False
) -> tuple[str, ...]:
    """Measure, while `call` runs `model`, what is fastest for its rows; names of the layers that torch keeps.

    Layers of one shape are measured once, against what torch compiles, with `autotune` after it tried its kernels,
    with `dependent` kernels that are launched before the one before them has ended.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FusedLinear)}
    met: dict[str, int] = {}
    chosen: dict[tuple[Any, ...], Tile | None] = {}

    def choose(name: str, layer: FusedLinear, args: tuple[torch.Tensor, ...]) -> None:
        input, residual = args[0], args[1] if len(args) > 1 else None
        met[name] = rows = input.numel() // layer.in_features
        # What is added to the output of attention torch joins with the norm that follows, so it costs nothing there.
        joined = residual is not None and not name.endswith("fc2")
        normed, layer.dependent = layer.weight_sums is not None, dependent
        key = (rows, layer.out_features, layer.in_features, str(layer.weight.dtype), normed, layer.gelu, joined,
               residual is not None, layer.bias is not None, layer.dependent, autotune)  # fmt: skip
        if key not in chosen:
            chosen[key] = _fastest(" ".join(map(str, key)), layer, input, residual, joined, autotune)
        layer.tiles[rows] = chosen[key]

    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: choose(name, layer, args))
        for name, layer in layers.items()
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(name for name, rows in met.items() if layers[name].tiles[rows] is None)


def _fastest(
    key: str, layer: FusedLinear, input: torch.Tensor, residual: torch.Tensor | None, joined: bool, autotune: bool
) -> Tile | None:
    facts = torch.cuda.get_device_properties(input.device)
    weight = layer.weight
    tiles = candidates(
        input.numel() // layer.in_features, layer.out_features, layer.in_features, weight.itemsize,
        facts.multi_processor_count,
    )  # fmt: skip
    # In a whole model a layer's weight comes from memory: between two calls all others have passed through the cache.
    weights = [weight.clone() for _ in range(1 + math.ceil(2 * facts.L2_cache_size / weight.nbytes))]
    torchs = torch.compile(_by_torch, dynamic=False, options=compiler_options(autotune, layer.dependent))
    how = (None if joined else residual, layer.weight_sums is not None, layer.eps, layer.gelu)
    with torch.compiler.set_stance("default"), compiling(autotune):
        return fastest(
            key,
            input.device,
            tiles,
            lambda tile: [layer.by_kernel(input, weight, residual, tile) for weight in weights],
            lambda: [torchs(input, weight, layer.bias, *how) for weight in weights],
        )
