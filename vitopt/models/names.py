"""Logical layer names: `block.21`, `block.*.fc2`, `block.4-7.query`, `classifier`.

Users write these; the modules of the installed transformers version are found here and nowhere else.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from vitopt.errors import CheckpointError, PatternError
from vitopt.layers import LINEARS, QKV
from vitopt.models.families import FAMILIES, HEAD, Family, why_not_supported

# What transformers and timm call the parameters that are tokens themselves.
_PREFIX_TOKENS = (
    "cls_token", "class_embedding", "distillation_token", "dist_token", "register_tokens", "reg_token",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One linear layer of a model."""

    logical: str
    module: str
    parameters: int
    block: int | None

    @property
    def is_head(self) -> bool:
        """Whether it gives the logits, or one of two that are averaged."""
        return self.block is None


def linear_layers(model: nn.Module, model_type: str) -> list[Layer]:
    """All linear layers that have a logical name, in order of execution, the head last.

    Works on live, quantized and meta-device models alike. Linear layers outside the blocks other than the
    head (a pooling head, say) and those that only make a position bias are not listed: they stay in 16 bit.

    Raises:
        CheckpointError: the family is not supported, or its modules are not those that are expected.
    """
    if reason := why_not_supported(model_type):
        raise CheckpointError(f"model type {model_type!r} is not supported: {reason}")
    family = FAMILIES[model_type]
    pattern = re.compile(rf"({family.block})\.(.+)")
    blocks: dict[str, int] = {}
    layers: list[Layer] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name in family.heads:
            layers.append(Layer(family.heads[name], name, _element_count(module), None))
        elif match := pattern.fullmatch(name):
            prefix, inside = match.groups()
            block = blocks.setdefault(prefix, len(blocks))
            linears = _linears_of(inside, family)
            if linears is None or _computes_beside(model, name):
                raise CheckpointError(_explain_unknown(model_type, name))
            for linear in linears:
                layers.append(Layer(f"block.{block}.{linear}", name, _element_count(module) // len(linears), block))
    if not blocks:
        raise CheckpointError(
            f"no block of this {model_type} model was found under the names that vitopt knows; "
            "use a transformers version from 5.9 on"
        )
    heads = [layer for layer in layers if layer.is_head]
    if len(heads) > 1:
        layers = [replace(layer, logical=f"{HEAD}.class") if layer.logical == HEAD else layer for layer in layers]
    counted = Counter(layer.logical for layer in layers)
    if twice := [layer.module for layer in layers if counted[layer.logical] > 1]:
        raise CheckpointError(_explain_unknown(model_type, twice[-1]))
    return layers


def _linears_of(inside: str, family: Family) -> tuple[str, ...] | None:
    """Logical names of a module by its name inside the block: none for one that stays as it is, None if unknown."""
    if inside.endswith(family.unnamed):
        return ()
    parts = inside.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts)))
    return next((family.linears[ending] for ending in endings if ending in family.linears), None)


def _computes_beside(model: nn.Module, name: str) -> bool:
    # timm's attention may keep biases of its own, and then multiplies with the weight instead of calling the layer.
    return getattr(model.get_submodule(name.rpartition(".")[0]), "q_bias", None) is not None


def _explain_unknown(model_type: str, module: str) -> str:
    # Left out of a plan, it would be quantized or not without the plan saying so.
    return (
        f"this {model_type} model has a layer in its blocks that vitopt does not know ({module}): use one whose blocks "
        "hold plain attention and an MLP of fc1 and fc2"
    )


def block_names(model: nn.Module, model_type: str) -> tuple[str, ...]:
    """Full module names of the transformer blocks, in order."""
    pattern = re.compile(FAMILIES[model_type].block)
    return tuple(name for name, _ in model.named_modules() if pattern.fullmatch(name))


def prefix_tokens(model: nn.Module) -> int:
    """How many tokens stand before those of the patches: class and distillation token, registers."""
    found = {name.rpartition(".")[2]: parameter for name, parameter in model.named_parameters()}
    return sum(found[name].numel() // found[name].shape[-1] for name in _PREFIX_TOKENS if name in found)


def is_in_block(name: str, model_type: str) -> bool:
    """Whether a parameter of that full name belongs to a transformer block."""
    return re.match(rf"(?:{FAMILIES[model_type].block})\.", name) is not None


def _element_count(linear: nn.Linear) -> int:
    # A packed 4-bit weight has fewer elements than the matrix it stands for; in_features and out_features stay.
    return linear.in_features * linear.out_features


def select(patterns: Iterable[str], layers: list[Layer]) -> dict[str, str]:
    """Map logical name -> the first pattern that names it, for all layers that a pattern names.

    A pattern is a logical name in which a part may be `*`, and a block number may be a range `20-23`. It
    names a layer, or a whole block, as `block.21` does; `query` alone is short for `block.*.query`.

    Raises:
        PatternError: a pattern names nothing; the message lists what exists.
    """
    chosen: dict[str, str] = {}
    for pattern in patterns:
        named = [layer.logical for layer in layers if _matches(pattern, layer.logical)]
        if not named:
            raise PatternError(f"pattern {pattern!r} matches no layer; this model has {_what_exists(layers)}")
        for logical in named:
            chosen.setdefault(logical, pattern)
    return chosen


def _matches(pattern: str, logical: str) -> bool:
    if pattern in (QKV, *LINEARS):
        pattern = f"block.*.{pattern}"
    wanted, actual = pattern.split("."), logical.split(".")
    # A pattern with fewer parts names all that lies below it.
    return len(wanted) <= len(actual) and all(map(_part_matches, wanted, actual))


def _part_matches(wanted: str, actual: str) -> bool:
    if wanted in ("*", actual):
        return True
    bounds = re.fullmatch(r"(\d{1,9})-(\d{1,9})", wanted)
    return bounds is not None and actual.isdigit() and int(bounds[1]) <= int(actual) <= int(bounds[2])


def _what_exists(layers: list[Layer]) -> str:
    blocks = [layer.block for layer in layers if layer.block is not None]
    linears = list(dict.fromkeys(layer.logical.split(".")[2] for layer in layers if layer.block is not None))
    heads = [layer.logical for layer in layers if layer.block is None]
    head = f", and {' and '.join(heads)}" if heads else ""
    return f"block.0 to block.{max(blocks)}, in each of them {', '.join(linears)}{head}"
