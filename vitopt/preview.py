"""What a recipe will need, before any of it is done: images for its claims, and time."""

import itertools
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vitopt.checks import calibration_images, require_images, tested_images, training_images
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor
from vitopt.environment import devices
from vitopt.environment.devices import DTYPES
from vitopt.errors import CheckpointError, VitoptError
from vitopt.measure import forecast
from vitopt.measure.forecast import StageTime
from vitopt.measure.planning import Need, needs
from vitopt.models.checkpoint import load_processor, open_checkpoint
from vitopt.recipe import DataSpec, Recipe, RequireSpec
from vitopt.rows import rows_of, rows_to_measure
from vitopt.search.fastest import candidates
from vitopt.search.goal import Goal
from vitopt.stages import STAGES_FILE, RunFolder, Stage
from vitopt.variants import VariantMaker


@dataclass(frozen=True)
class Claim:
    """A claim that the recipe wants shown, what it needs, and what there is."""

    about: str
    need: Need
    there: int | None  # images or calls; None where they cannot be counted


@dataclass(frozen=True)
class Preview:
    """What a run will need."""

    claims: list[Claim]
    stages: list[StageTime]
    notes: list[str]  # what could not be counted or timed, and why

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def preview(recipe: Recipe, folder: Path | None = None) -> Preview:
    """Count images without decoding them and time a few calls of a model of the same shape.

    `folder`: that of the run, whose stages may stand already.

    Raises:
        DataError, RecipeError: the images are there, and a run would refuse them, see `checks.require_images`.
    """
    counted: dict[str, int] = {}
    notes: list[str] = []
    test: ImageSet | None = None
    if recipe.data is not None:
        try:
            test = tested_images(recipe, recipe.data)
            counted["test"] = len(test)
            if recipe.trains:
                counted["train"] = len(training_images(recipe.data))
            for variant in recipe.variants:
                if variant.calibration is not None:
                    counted[variant.name] = len(calibration_images(recipe.data, variant.calibration))
        except VitoptError as error:
            notes.append(f"not all images can be counted: {error}")
        else:
            _refuse(recipe, recipe.data, test, notes)
    standing: set[str] = set()
    try:
        standing = _standing(recipe, folder, test)
    except VitoptError as error:
        notes.append(f"cannot tell which stages are up to date: {error}")
    return Preview(_claims(recipe, counted), _stages(recipe, counted, test, standing, notes), notes)


def _refuse(recipe: Recipe, data: DataSpec, test: ImageSet, notes: list[str]) -> None:
    try:
        source = open_checkpoint(recipe.model)
    except CheckpointError as error:  # a shape that is known without its labels
        notes.append(f"whether classes and calibration images fit is not checked: {error}")
    else:
        require_images(recipe, source, data, test)


class _NotDone(Exception):
    """A stage does not stand, and nothing is done in a preview."""


@dataclass
class _Look(RunFolder):
    """The folder of a run in which nothing is done; `standing`: names of stages that need not be done again."""

    standing: set[str] = field(init=False, default_factory=set)

    def carry_out(self, stage: Stage[Any]) -> None:
        if not self.stands(stage):
            raise _NotDone
        self.standing.add(stage.name)


def _standing(recipe: Recipe, folder: Path | None, images: ImageSet | None) -> set[str]:
    """Names of the stages and rows in the folder of a run that would be skipped."""
    if folder is None or not (folder / STAGES_FILE).is_file():
        return set()
    look = _Look(folder, lambda line: None)
    maker, settled = VariantMaker(look, recipe, images), []
    with suppress(_NotDone):
        base = maker.finetuned(open_checkpoint(recipe.model))
        for variant in recipe.variants:
            with suppress(_NotDone):
                settled_variant = maker.settle(variant, base)
                maker.make(settled_variant)
                settled.append(settled_variant)
    made = {row.variant.name: None for row in settled}
    if recipe.baseline_name in made:
        rows = rows_of(look, recipe, images, settled, made)
        look.standing |= {row.name for row in rows.values() if look.stands(row)}
    return look.standing


def _claims(recipe: Recipe, counted: dict[str, int]) -> list[Claim]:
    there = {"images": counted.get("test"), "calls": recipe.evaluate.latency.iterations}
    wanted = [need for need in needs(recipe.require) if need.requirement != "max_megabytes"]
    claims = [Claim("every variant", need, there[need.unit]) for need in wanted]
    for variant in recipe.variants:
        if variant.skips_automatically:
            floor = needs(
                RequireSpec(max_top1_drop=variant.search_spec.max_top1_drop, max_kl=variant.search_spec.max_kl)
            )
            claims += [Claim(f"floor of {variant.name}", need, there["images"]) for need in floor]
    return claims


def _stages(
    recipe: Recipe, counted: dict[str, int], test: ImageSet | None, standing: set[str], notes: list[str]
) -> list[StageTime]:
    try:
        checkpoint = open_checkpoint(recipe.model, config_only=True)
        device = devices.resolve_device(recipe.device)
        compared = {
            variant.name: candidates(
                device, variant.half, variant.fastest.compile, variant.engine, variant.static_scales
            )
            for variant in recipe.variants
            if variant.chooses_format
        }
        variants = [*recipe.variants, *itertools.chain.from_iterable(compared.values())]
        types = {forecast.number_type(variant) for variant in variants}
        types |= {"fp32"} if recipe.trains else set()
        seconds = {name: forecast.seconds_per_image(checkpoint, device, DTYPES[name]) for name in sorted(types)}
        decode = forecast.seconds_to_decode(test, Preprocessor(load_processor(checkpoint))) if test else 0.0
    except Exception as error:  # an estimate that fails, for memory or anything else, must not fail the dry run
        notes.append(f"no estimate of the time: {' '.join(str(error).split())}")
        return []
    names = [variant.name for variant in recipe.variants]
    kept = [name for name in names if f"evaluate {name}" in standing]
    measured = rows_to_measure(recipe, kept, dict.fromkeys(names))
    stages = forecast.stages(recipe, checkpoint, seconds, decode, counted, compared, measured)
    goals = {f"sensitivity {v.name}": Goal.of(v.search_spec).words() for v in recipe.variants}
    for index, stage in enumerate(stages):
        if stage.name in standing:
            stages[index] = StageTime(stage.name, 0.0, stands=True)
        elif stage.name in goals:
            stages[index] = replace(stage, what=f"{stage.what}, that {goals[stage.name]}")
    if stood := [name for name in names if name not in measured]:
        stages.append(StageTime(f"evaluate {', '.join(stood)}", 0.0, stands=True))
    notes.append(forecast.left_out(recipe))
    return stages
