"""Logical layer names: `block.21`, `block.*.fc2`, `block.4-7.query`, `classifier`.

Users write these; the modules of the installed transformers version are found here and nowhere else.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from vitopt.errors import CheckpointError, PatternError
from vitopt.recipe import LINEARS, Linear

HEAD = "classifier"

# Module of a head -> its logical name, over all families. DeiT with a teacher has two heads, whose logits it averages;
# the pattern `classifier` names both.
HEADS = {
    "classifier": HEAD,
    "cls_classifier": f"{HEAD}.class",
    "distillation_classifier": f"{HEAD}.distillation",
}


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
        return self.module in HEADS


FUSED_LEAF = "qkv_proj"  # query, key and value stacked into one layer while running

# How a module's name ends -> its logical names, over all families and transformers versions known; the longest
# ending that is listed counts.
_LINEARS_OF_ENDING: dict[str, tuple[Linear, ...]] = {
    "query": ("query",),  # Swin v2, and DINOv2 in transformers before its modules were renamed, as all that follow
    "key": ("key",),
    "value": ("value",),
    "attention.output.dense": ("output",),
    "intermediate.dense": ("fc1",),
    "output.dense": ("fc2",),
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    FUSED_LEAF: ("query", "key", "value"),
    "o_proj": ("output",),
    "out_proj": ("output",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
}
assert {linear for linears in _LINEARS_OF_ENDING.values() for linear in linears} == set(LINEARS)

# Layers of the giant DINOv2. Left out of a plan, they would be quantized without anybody having said so.
_GATED_MLP = ("gate_proj", "up_proj", "down_proj")

_PLAIN = r"layers\.\d+"
_ENCODER = r"encoder\.layers?\.\d+"

# model type -> how the name of a block starts, below the base model's prefix
_BLOCK_OF_FAMILY = {
    "vit": rf"vit\.{_PLAIN}",
    "deit": rf"deit\.{_PLAIN}",
    "vit_msn": rf"vit\.{_PLAIN}",
    "ijepa": rf"ijepa\.{_PLAIN}",
    "beit": rf"beit\.{_PLAIN}",
    "dinov2": rf"dinov2\.{_ENCODER}",
    "dinov2_with_registers": rf"dinov2_with_registers\.{_ENCODER}",
    "siglip": rf"vision_model\.{_ENCODER}",
    "clip": rf"vision_model\.{_ENCODER}",
    # Stages are flattened: block.0 is the first block of the first stage.
    "swin": r"swin\.encoder\.layers\.\d+\.blocks\.\d+",
    "swinv2": r"swinv2\.encoder\.layers\.\d+\.blocks\.\d+",
}


def families() -> list[str]:
    """Model types (`config.model_type`) whose layers have logical names."""
    return sorted(_BLOCK_OF_FAMILY)


def linear_layers(model: nn.Module, model_type: str) -> list[Layer]:
    """All linear layers that have a logical name, in order of execution, the head last.

    Works on live, quantized and meta-device models alike. Linear layers outside the blocks other than the
    head (a pooling head, say) and those that only make a position bias are not listed: they stay in 16 bit.

    Raises:
        CheckpointError: the family is not supported, or its modules are not those that are expected.
    """
    if model_type not in _BLOCK_OF_FAMILY:
        raise CheckpointError(f"model type {model_type!r} is not supported; supported: {', '.join(families())}")
    pattern = re.compile(rf"({_BLOCK_OF_FAMILY[model_type]})\.(.+)")
    blocks: dict[str, int] = {}
    layers: list[Layer] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name in HEADS:
            layers.append(Layer(HEADS[name], name, _element_count(module), None))
        elif match := pattern.fullmatch(name):
            prefix, inside = match.groups()
            block = blocks.setdefault(prefix, len(blocks))
            if inside.endswith(_GATED_MLP):
                raise CheckpointError(
                    f"this {model_type} model has a gated MLP ({name}), which vitopt does not know: "
                    "use a size of the model whose MLP is fc1 and fc2"
                )
            linears = _linears_of(inside)
            for linear in linears:
                layers.append(Layer(f"block.{block}.{linear}", name, _element_count(module) // len(linears), block))
    if not blocks:
        raise CheckpointError(
            f"no block of this {model_type} model was found under the names that vitopt knows; "
            "use a transformers version from 5.9 on"
        )
    return layers


def _linears_of(inside: str) -> tuple[Linear, ...]:
    """Logical names of a module by its name inside the block, none for one that vitopt leaves alone."""
    parts = inside.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts)))
    return next((_LINEARS_OF_ENDING[ending] for ending in endings if ending in _LINEARS_OF_ENDING), ())


def block_names(model: nn.Module, model_type: str) -> tuple[str, ...]:
    """Full module names of the transformer blocks, in order."""
    pattern = re.compile(_BLOCK_OF_FAMILY[model_type])
    return tuple(name for name, _ in model.named_modules() if pattern.fullmatch(name))


def is_in_block(name: str, model_type: str) -> bool:
    """Whether a parameter of that full name belongs to a transformer block."""
    return re.match(rf"{_BLOCK_OF_FAMILY[model_type]}\.", name) is not None


def _element_count(linear: nn.Linear) -> int:
    # A packed 4-bit weight has fewer elements than the matrix it stands for; the features do not lie.
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
    if pattern in LINEARS:
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
