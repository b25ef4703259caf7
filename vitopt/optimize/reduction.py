"""Blocks of a model that make fewer tokens: ToMe's merging, or pruning by the attention of the class token.

Each block is told how many tokens leave, so all shapes are known before a call: blocks compile, and a CUDA graph holds
them. What is computed stands in `tokens.py`, how many leave where in `token_schedule.py`.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from vitopt.errors import RecipeError, UnsupportedError
from vitopt.models.checkpoint import image_size
from vitopt.models.classes import model_class
from vitopt.optimize import tokens
from vitopt.optimize.attention import noting
from vitopt.optimize.blocks import as_block, is_plain
from vitopt.recipe import RunSpec
from vitopt.token_schedule import removed_in

# Classes whose blocks are plain and whose head looks at the first tokens alone -> how many tokens are no patches.
_PROTECTED = {
    "ViTForImageClassification": 1,
    "ViTMSNForImageClassification": 1,
    "DeiTForImageClassification": 2,
    "DeiTForImageClassificationWithTeacher": 2,
}


class Reduction(nn.Module):
    """What one block does with its tokens: `removed` of them leave, by merging or, with `prunes`, by pruning."""

    def __init__(self, run: RunSpec, protected: int, scaling: float):
        super().__init__()
        self.removed, self.protected, self.scaling = 0, protected, scaling
        self.prunes, self.fuses, self.biases = run.prune_tokens is not None, run.fuse_pruned, run.size_bias

    def note(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """What attention tells: (batch, tokens) where the class token looks, or (batch, tokens, width) the keys."""
        if not self.removed:
            return None
        return tokens.class_attention(query, key, self.scaling) if self.prunes else key.mean(1)

    def bias(self, sizes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """As `Reduces`."""
        return tokens.size_bias(sizes, dtype) if self.biases else None

    def forward(
        self, hidden: torch.Tensor, sizes: torch.Tensor | None, noted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden`: (batch, tokens, width). Returns (batch, fewer tokens, width), and their sizes."""
        if noted is None:
            return hidden, sizes
        if not self.prunes:
            return tokens.merge(hidden, sizes, noted, self.removed, self.protected)
        if self.fuses:  # one more leaves, and what leaves comes back as one
            return tokens.prune_into_one(hidden, noted, self.removed + 1, self.protected), None
        return tokens.prune(hidden, noted, self.removed, self.protected), None


def token_counts(config: PretrainedConfig, run: RunSpec) -> tuple[int, ...]:
    """Tokens that each block is given, and at the end those that the last one leaves.

    Raises:
        UnsupportedError: this family's blocks or head need all tokens.
        RecipeError: a block would have to remove more tokens than it can.
    """
    name, option = model_class(config).__name__, "merge_tokens" if run.merge_tokens else "prune_tokens"
    if name not in _PROTECTED:
        raise UnsupportedError(
            f"{option}: the blocks or the head of {name} need all tokens; ViT, ViT-MSN and DeiT can do with fewer"
        )
    protected, (height, width) = _PROTECTED[name], image_size(config)
    count = (height // config.patch_size) * (width // config.patch_size) + protected
    counts = [count]
    for block, removed in enumerate(removed_in(run.schedule or "0", config.num_hidden_layers)):
        patches = count - protected
        most = max(patches // 2 if run.merge_tokens else patches - 1 - run.fuse_pruned, 0)
        if removed > most:
            raise RecipeError(
                f"{option} {run.schedule}: {removed} tokens cannot leave block {block}, which has {patches} patches: "
                f"at most {most}"
            )
        count -= removed
        counts.append(count)
    return tuple(counts)


def reduce_tokens(model: nn.Module, names: Sequence[str], run: RunSpec) -> int:
    """Let blocks reduce their tokens, in place, as `run` says; how many blocks there are. What is not told keeps all.

    Raises:
        UnsupportedError: the family or its attention (eager) cannot.
        RecipeError: a block would have to remove more tokens than it can.
    """
    counts = token_counts(model.config, run)
    attention = str(model.config._attn_implementation)
    if attention == "eager" or not all(is_plain(model.get_submodule(name)) for name in names):
        raise UnsupportedError("fewer tokens need sdpa or flash_attention_2, and blocks as ViT and DeiT have them")
    model.config._attn_implementation = noting(attention)
    for name in names:
        block = as_block(model, name)
        block.reduce = Reduction(run, protected_tokens(model.config), float(block.attention.scaling))
        block.attention.note = block.reduce.note
    block.last = True
    set_removed(model, names, [given - left for given, left in itertools.pairwise(counts)])
    return len(names)


def set_removed(model: nn.Module, names: Sequence[str], removed: Sequence[int]) -> None:
    """Let so many tokens leave each block, which `reduce_tokens` has made able to."""
    for name, gone in zip(names, removed, strict=True):
        model.get_submodule(name).reduce.removed = gone


def protected_tokens(config: PretrainedConfig) -> int:
    """How many of a model's tokens are no patches and stay: the class token, and that of DeiT's teacher."""
    return _PROTECTED[model_class(config).__name__]
