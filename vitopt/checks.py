"""What a recipe asks, held against its model, its images and this device, before anything is done."""

import torch

from vitopt.data.images import ALL, ImageSet, open_images
from vitopt.data.sources import parse_source
from vitopt.environment.devices import DTYPES
from vitopt.errors import DataError, PatternError, RecipeError, UnsupportedError
from vitopt.models.checkpoint import Checkpoint, empty_model, open_checkpoint
from vitopt.models.classes import best_attention, why_not_attention, why_not_kernel, why_not_trained
from vitopt.models.names import linear_layers, select
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.quantize import plan_for
from vitopt.recipe import DataSpec, Recipe, VariantSpec


def plans(recipe: Recipe) -> dict[str, LayerPlan]:
    """Layer plan of every variant, from shapes alone.

    Raises:
        RecipeError: patterns match nothing or targets do not exist; all mistakes at once.
        CheckpointError: the model cannot be found.
    """
    checkpoint = open_checkpoint(recipe.model, config_only=True)
    resolved, mistakes = {}, []
    for variant in recipe.variants:
        try:
            known = variant.skipping(()) if variant.skips_automatically else variant
            resolved[variant.name] = plan_for(checkpoint, known)
        except (PatternError, RecipeError, UnsupportedError) as error:
            mistakes.append(f"variant {variant.name}: {error}")
    if recipe.finetune is not None:
        if reason := why_not_trained(checkpoint.config):
            mistakes.append(f"finetune: {reason}")
        if recipe.finetune.method == "lora":
            try:
                select(recipe.finetune.targets, linear_layers(empty_model(checkpoint), checkpoint.config.model_type))
            except PatternError as error:
                mistakes.append(f"finetune.targets: {error}")
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return resolved


def tested_images(recipe: Recipe, data: DataSpec) -> ImageSet:
    """The images that the variants of a recipe are measured on; none is decoded.

    Raises:
        DataError: there are none.
    """
    uses_train = recipe.finetune is not None or any(variant.skips_automatically for variant in recipe.variants)
    source, named = parse_source(data.source)
    if named is not None and (uses_train or data.test not in (None, named)):
        # What a source names wins over all other splits, so it would be trained on and tested on.
        raise DataError(f"{data.source} is one split, and the recipe needs others: set source: {source}, test: {named}")
    images = open_images(data, data.test)
    if images.split == ALL and uses_train:
        # One part of data without splits is trained or calibrated on, so only the other part may test.
        return open_images(data, "test")
    return images


def training_images(data: DataSpec) -> ImageSet:
    """The images that a recipe fine-tunes on, all of them; none is decoded."""
    return open_images(data.model_copy(update={"limit": None}), data.train)


def calibration_images(data: DataSpec, variant: VariantSpec) -> ImageSet:
    """The images on which the skip list of a variant with `skip: auto` is chosen; none is decoded."""
    return open_images(data.model_copy(update={"limit": variant.auto.images}), variant.auto.split)


def require_attention(recipe: Recipe, checkpoint: Checkpoint, device: torch.device) -> None:
    """Refuse, before the first long stage, what `strict` would refuse after it.

    Raises:
        UnsupportedError: a variant's attention or its kernel cannot run on this device.
    """
    for variant in recipe.variants:
        dtype = DTYPES["bf16"] if variant.run_as else DTYPES.get(variant.format, DTYPES[variant.half])
        attention = why_not_attention(checkpoint.config, variant.attention, device, dtype)
        kernel = why_not_kernel(checkpoint.config, variant.sdpa_kernel, device, dtype)
        for what, reason, remedy in (
            (variant.attention, attention, f"use {best_attention(checkpoint.config)}"),
            (f"sdpa kernel {variant.sdpa_kernel}", kernel, "let torch choose"),
        ):
            if reason is not None:
                raise UnsupportedError(f"{variant.name}: {what} cannot run: {reason}; drop --strict to {remedy}")
