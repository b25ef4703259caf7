"""Another resolution for a model: position embeddings resized, configuration and preprocessor changed to fit."""

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from vitopt.data.pixels import Preprocessor
from vitopt.models.checkpoint import image_size
from vitopt.models.families import FAMILIES


def why_not_resized(config: PretrainedConfig, side: int) -> str | None:
    """Why a model cannot be made for images of `side` x `side` pixels, or None when it can."""
    if reason := FAMILIES[config.model_type].fixed_size:
        return f"`image_size` cannot change: {reason}"
    height, width = image_size(config)
    patch = getattr(config, "vision_config", config).patch_size
    if height != width or not isinstance(patch, int):
        return "`image_size` cannot change: the model's images or patches are not square"
    if side % patch:
        below, above = side // patch * patch, (side // patch + 1) * patch
        remedy = f"{below} or {above}" if below else str(above)
        return f"`image_size` {side} is not a multiple of the model's patches of {patch} pixels: take {remedy}"
    return None


@torch.no_grad()
def at_resolution(model: PreTrainedModel, side: int) -> PreTrainedModel:
    """The same model for images of `side` x `side` pixels, which `why_not_resized` allows.

    Its position embeddings are those that transformers interpolates in each call with `interpolate_pos_encoding`, so
    that the logits are the same; the model then needs no such argument.
    """
    config = copy.deepcopy(model.config)
    vision = getattr(config, "vision_config", config)
    before, after = ((pixels // vision.patch_size) ** 2 for pixels in (image_size(config)[0], side))
    vision.image_size = side
    name, embeddings = next(item for item in model.named_modules() if hasattr(item[1], "interpolate_pos_encoding"))
    weights = model.state_dict()
    tables = (f"{name}.position_embeddings", f"{name}.position_embedding.weight")  # the latter in SigLIP and CLIP
    table = next(key for key in tables if key in weights)
    *_, tokens, width = weights[table].shape
    resized = embeddings.interpolate_pos_encoding(torch.empty(1, tokens - before + after, width), side, side)
    weights[table] = resized.reshape(*weights[table].shape[:-2], -1, width)
    result = type(model)(config)
    result.load_state_dict(weights)
    return result.eval()


def for_resolution(processor: Any, side: int) -> Any:
    """A copy of an image processor that makes `side` x `side` pixels; what it crops of an image stays the same."""
    height, width = Preprocessor(processor).size
    scales = {"height": side / height, "width": side / width}
    result = copy.deepcopy(processor)
    for key in ("size", "crop_size"):
        if sizes := dict(getattr(processor, key, None) or {}):
            scaled = {name: round(size * scales.get(name, side / min(height, width))) for name, size in sizes.items()}
            setattr(result, key, type(getattr(processor, key))(**scaled))
    return result
