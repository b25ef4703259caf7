"""What a recipe asks, held against its model, its images and this device, before anything is done."""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from vitopt.adaptive.make import require_low, require_untrained
from vitopt.adaptive.passes import require_same_classes, require_same_labels
from vitopt.data.images import ALL, ImageSet, open_images
from vitopt.data.labels import fit_labels
from vitopt.data.sources import parse_source
from vitopt.environment.devices import DTYPES
from vitopt.errors import CheckpointError, DataError, PatternError, RecipeError, UnsupportedError
from vitopt.models.checkpoint import Checkpoint, empty_model, open_checkpoint
from vitopt.models.classes import best_attention, why_not_attention, why_not_kernel, why_not_trained
from vitopt.models.names import linear_layers, select
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.prune import pruned_config
from vitopt.optimize.quantize import plan_for
from vitopt.optimize.reduction import token_counts
from vitopt.optimize.resolution import why_not_resized
from vitopt.recipe import CalibrationSpec, DataSpec, FastestSpec, FinetuneSpec, Recipe, RecipeVariant, Step
from vitopt.search.analysis import require_disjoint
from vitopt.search.fastest import require_enough_images
from vitopt.steps import BASE, PruneSpec

logger = logging.getLogger(__name__)


def plans(recipe: Recipe) -> dict[str, LayerPlan]:
    """Layer plan of every variant whose format is known, from shapes alone.

    Raises:
        RecipeError: patterns match nothing, targets do not exist, or more tokens leave a block than can; all mistakes
            at once.
        CheckpointError: the model cannot be found.
    """
    checkpoint = open_checkpoint(recipe.model, config_only=True)
    resolved, mistakes = {}, []
    for variant in recipe.variants:
        if variant.chooses_format:
            continue
        try:
            known = variant.skipping(()) if variant.skips_automatically else variant
            resolved[variant.name] = plan_for(checkpoint, known)
            if variant.schedule is not None:
                token_counts(checkpoint.config, variant)
        except (PatternError, RecipeError, UnsupportedError) as error:
            mistakes.append(f"variant {variant.name}: {error}")
        if variant.adaptive is not None:
            mistakes += [
                f"variant {variant.name}: {line}"
                for line in _mistakes_of_first_pass(variant, checkpoint, recipe.trains)
            ]
    for variant in recipe.variants:
        config = checkpoint.config
        for step in variant.steps:
            try:
                config = pruned_config(config, step.settings) if isinstance(step.settings, PruneSpec) else config
            except RecipeError as error:
                mistakes.append(f"variant {variant.name}: {error}")
    for where, spec in _finetunes(recipe).items():
        if reason := why_not_trained(checkpoint.config):
            mistakes.append(f"{where}: {reason}")
        if spec.image_size and (reason := why_not_resized(checkpoint.config, spec.image_size)):
            mistakes.append(f"{where}: {reason}")
        if spec.teacher not in (None, BASE):
            try:
                open_checkpoint(str(spec.teacher), config_only=True)
            except CheckpointError as error:
                mistakes.append(f"{where}.teacher: {error}")
        if spec.method != "full":
            try:
                select(spec.targets, linear_layers(empty_model(checkpoint), checkpoint.config.model_type))
            except PatternError as error:
                mistakes.append(f"{where}.targets: {error}")
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return resolved


def _mistakes_of_first_pass(variant: RecipeVariant, checkpoint: Checkpoint, trains: bool) -> Iterator[str]:
    """What can be told of an adaptive variant before anything is made; `trains`: classes may yet change."""
    spec = variant.adaptive
    assert spec is not None
    try:
        first = open_checkpoint(spec.draft, config_only=True) if spec.draft else checkpoint
        resized = any(getattr(step.settings, "image_size", None) for step in variant.all_steps.values())
        if spec.low is not None and not resized:
            require_low(first, spec.low, checkpoint)
        if (run := spec.run_of_first(variant.run)).schedule is not None:
            sizes = [getattr(step.settings, "image_size", None) for step in reversed(spec.steps)]
            token_counts(_of_size(first.config, next(filter(None, [spec.low, *sizes]), None)), run)
        if spec.draft and not trains:
            require_same_classes(first, checkpoint)
        if spec.draft and not variant.chooses_format:
            plan_for(first, variant.skipping(()) if variant.skips_automatically else variant)
    except (CheckpointError, PatternError, RecipeError, UnsupportedError) as error:
        yield f"adaptive: {error}"


def _of_size(config: PretrainedConfig, side: int | None) -> PretrainedConfig:
    """The same for images of `side` x `side` pixels."""
    config = copy.deepcopy(config)
    if side is not None:
        getattr(config, "vision_config", config).image_size = side
    return config


def _finetunes(recipe: Recipe) -> dict[str, FinetuneSpec]:
    """All fine-tunings of a recipe, by where they stand in it."""
    steps = {
        f"variants.{row}.steps.{place}.{step.name}": step.settings
        for row, variant in enumerate(recipe.variants)
        for place, step in enumerate(variant.steps)
    } | {
        f"variants.{row}.adaptive.steps.{place}.{step.name}": step.settings
        for row, variant in enumerate(recipe.variants)
        for place, step in enumerate(variant.adaptive.steps if variant.adaptive else ())
    }
    whole = {} if recipe.finetune is None else {"finetune": recipe.finetune}
    return whole | {where: spec for where, spec in steps.items() if isinstance(spec, FinetuneSpec)}


def tested_images(recipe: Recipe, data: DataSpec) -> ImageSet:
    """The images that the variants of a recipe are measured on; none is decoded.

    Raises:
        DataError: there are none.
    """
    uses_train = recipe.finetune is not None or any(variant.wants_images for variant in recipe.variants)
    source, named = parse_source(data.source)
    if named is not None and (uses_train or data.test not in (None, named)):
        # What a source names wins over all other splits, so it would be trained on and tested on.
        raise DataError(
            f"{data.source} is one split, and the recipe needs more than one: set source: {source}, test: {named}"
        )
    images = open_images(data, data.test)
    if images.split == ALL and uses_train:
        # One part of data without splits is trained or calibrated on, so only the other part may test.
        return open_images(data, "test")
    return images


def training_images(data: DataSpec) -> ImageSet:
    """The images that a recipe fine-tunes on, all of them; none is decoded."""
    return open_images(data.model_copy(update={"limit": None}), data.train)


def calibration_images(data: DataSpec, spec: CalibrationSpec) -> ImageSet:
    """The images on which something is chosen; none is decoded."""
    return open_images(data.model_copy(update={"limit": spec.images}), spec.split)


def step_images(data: DataSpec, step: Step) -> ImageSet | None:
    """The images that a step learns from; none is decoded."""
    if step.kind.images is None:
        return None
    return training_images(data) if step.kind.images == "training" else calibration_images(data, step.settings)


def require_images(recipe: Recipe, source: Checkpoint, data: DataSpec, test: ImageSet) -> None:
    """Refuse, before the first long stage, images that would fail a later one; warn of tested ones that train.

    Raises:
        DataError: a variant will not know the tested classes, or other classes than another or than its first pass; or
            calibration images are tested too.
        RecipeError: there are too few images to choose a format on.
    """
    if recipe.trains:
        train = training_images(data)
        if overlap := set(train.image_hashes) & set(test.image_hashes):
            logger.warning(
                "%d test images are also training images; accuracy will look better than it is", len(overlap)
            )
    first, names = recipe.variants[0], [variant.name for variant in recipe.variants]
    classes = _classes(recipe, source, train) if recipe.trains else dict.fromkeys(names, source.label_names)
    for variant in recipe.variants:
        fit_labels(test, classes[variant.name])
        if classes[variant.name] != classes[first.name]:
            raise DataError(
                f"variants {first.name} and {variant.name} would have different classes, as only one is fine-tuned on "
                f"{data.source}: fine-tune the model for all of them (`finetune`), or each in its `steps`"
            )
        calibrations = [step.settings for step in variant.all_steps.values() if step.kind.images == "calibration"]
        for spec in filter(None, [*calibrations, variant.calibration, variant.rounding, variant.adaptive]):
            calibration = calibration_images(data, spec)
            require_disjoint(calibration, test)
            if spec is variant.adaptive and (recipe.finetune is not None or variant.trains):
                require_untrained(set(training_images(data).image_hashes), calibration, variant.adaptive)
            if isinstance(spec, FastestSpec):
                require_enough_images(len(calibration), spec.min_agreement)


def _classes(recipe: Recipe, source: Checkpoint, train: ImageSet) -> dict[str, list[str]]:
    """Names of the head's outputs of each variant.

    Raises:
        DataError: the first pass of one has others.
    """
    trained = _labels_after([recipe.finetune], source.label_names, train)
    classes = {}
    for variant in recipe.variants:
        classes[variant.name] = _labels_after([step.settings for step in variant.steps], trained, train)
        if (spec := variant.adaptive) is not None:
            before = open_checkpoint(spec.draft, config_only=True).label_names if spec.draft else classes[variant.name]
            first = _labels_after([step.settings for step in spec.steps], before, train)
            try:
                require_same_labels(spec.draft or "the first pass", first, variant.name, classes[variant.name])
            except CheckpointError as error:
                raise DataError(f"variant {variant.name}: adaptive: {error}") from error
    return classes


def _labels_after(steps: Sequence[Any], labels: list[str], train: ImageSet) -> list[str]:
    """Names of the outputs of a head that had the names `labels`, after these steps."""
    from vitopt.training.finetune import head_labels

    start = labels
    for spec in (step for step in steps if isinstance(step, FinetuneSpec)):
        other = None if spec.teacher in (None, BASE) else open_checkpoint(str(spec.teacher), config_only=True)
        labels = head_labels(labels, train, spec, start if other is None else other.label_names)
    return labels


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
