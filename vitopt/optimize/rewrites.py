"""The options of a run that change a loaded model in place, and what they need."""

import logging
from collections.abc import Callable, Container

import torch
from torch import nn

from vitopt.environment import support
from vitopt.errors import UnsupportedError
from vitopt.models.activations import load_activations
from vitopt.models.checkpoint import Checkpoint
from vitopt.models.names import block_names
from vitopt.optimize.blocks import carry_residuals, join_gelu, narrow_last_block
from vitopt.optimize.formats import live_formats
from vitopt.optimize.fuse import fuse_projections
from vitopt.optimize.patches import multiply_patches
from vitopt.optimize.reduction import reduce_tokens
from vitopt.optimize.static import use_static_scales
from vitopt.recipe import RunSpec

logger = logging.getLogger(__name__)

# option -> what changes the model in place and tells how much, given the names of its blocks, its checkpoint and all
# options; why it changes nothing. The last block's own attention is made before queries, keys and values are stacked,
# what is stacked is quantized by one scale, and tokens are reduced by the attention that is there in the end.
REWRITES: dict[str, tuple[Callable[[nn.Module, tuple[str, ...], Checkpoint, RunSpec], int], str]] = {
    "patch_product": (lambda model, *_: multiply_patches(model), "no patch embedding here is a plain convolution"),
    "class_token_last": (
        lambda model, blocks, *_: narrow_last_block(model, blocks),
        "this model's head or last block (eager, or of another kind) needs all",
    ),
    "carry_residual": (
        lambda model, blocks, *_: carry_residuals(model, blocks),
        "the blocks of this family are of another kind",
    ),
    "gelu_epilogue": (lambda model, *_: join_gelu(model), "no GELU here follows an unquantized product"),
    "fuse_qkv": (
        lambda model, *_: fuse_projections(model),
        "no query, key and value here can be fused (packed, eager, or another attention)",
    ),
    "fused_kernels": (
        lambda model, blocks, *_: _with_fused_products(model, blocks),
        "no block here has an unquantized MLP with GELU, or query, key and value as one unquantized product",
    ),
    "static_scales": (
        lambda model, _, checkpoint, __: _with_static_scales(model, checkpoint),
        "no layer here is w8a8 or fp8 and loses little by one scale",
    ),
    "merge_tokens": (lambda model, blocks, _, run: reduce_tokens(model, blocks, run), "the schedule removes none"),
    "prune_tokens": (lambda model, blocks, _, run: reduce_tokens(model, blocks, run), "the schedule removes none"),
}
# Those that change how much arithmetic an image takes.
_SAVING = ("class_token_last", "merge_tokens", "prune_tokens")

# option -> why a device cannot
_NEEDS: dict[str, Callable[[torch.device], str | None]] = {
    "fused_kernels": support.why_not_fused_kernels,
    "dependent_launch": support.why_not_dependent_launch,
}


def rewrite(model: nn.Module, checkpoint: Checkpoint, run: RunSpec, device: torch.device, name: str) -> dict[str, str]:
    """Change `model`, which was loaded of `checkpoint`, as the options of `run` ask; `name` is what warnings call it.

    Returns why an option changes nothing, by option.

    Raises:
        UnsupportedError: `static_scales` is asked for, and no scales were observed; or the family needs all tokens.
        RecipeError: `merge_tokens` or `prune_tokens` would remove more tokens than a block has.
    """
    reasons = {}
    for option, why_not in _NEEDS.items():
        if getattr(run, option) and (missing := why_not(device)):
            reasons[option] = missing
            logger.warning("%s: %s is left out: %s", name, option, missing)
    blocks = block_names(model, checkpoint.config.model_type)
    for option, (change, reason) in REWRITES.items():
        if getattr(run, option) and option not in reasons and change(model, blocks, checkpoint, run) == 0:
            reasons[option] = reason
            logger.warning("%s: %s", name, reason)
    return reasons


def save_arithmetic(model: nn.Module, checkpoint: Checkpoint, run: RunSpec, left_out: Container[str]) -> None:
    """Change `model` only by those options that change how much arithmetic an image takes, without those `left_out`."""
    blocks = block_names(model, checkpoint.config.model_type)
    for option in _SAVING:
        if getattr(run, option) and option not in left_out:
            REWRITES[option][0](model, blocks, checkpoint, run)


def _with_fused_products(model: nn.Module, blocks: tuple[str, ...]) -> int:
    from vitopt.optimize.kernels.blocks import fuse_products  # needs triton

    return fuse_products(model, blocks)


def _with_static_scales(model: nn.Module, checkpoint: Checkpoint) -> int:
    observed = load_activations(checkpoint.folder)
    # A baseline in floating point beside the checkpoint that is asked for has nothing to be observed.
    if not observed and not {"w8a8", "fp8"}.isdisjoint(live_formats(model, checkpoint.config.model_type).values()):
        raise UnsupportedError(
            f"`static_scales` needs what layers take over calibration images, and nobody observed {checkpoint.source}: "
            "give the variant the step `calibrate`"
        )
    return use_static_scales(model, checkpoint.config.model_type, observed)
