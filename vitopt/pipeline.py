"""The order of the stages of a run, and what each depends on.

A run is a folder, in which each stage leaves a checkpoint or a record; `stages.py` tells which of them still stand.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vitopt import ownership, storage
from vitopt.checks import plans, require_attention, require_images, tested_images
from vitopt.data.images import ImageSet
from vitopt.environment import devices, launch, machine, support
from vitopt.errors import CheckpointError, RecipeError
from vitopt.measure.comparison import adjusted_for_all
from vitopt.measure.gate import judge, judge_floor
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.recipe import Recipe
from vitopt.recipe_file import dump_yaml, load_recipe
from vitopt.records import Record, Requirement, save_record
from vitopt.report.recommendation import RECOMMENDATION_FILE, Recommendation, recommend
from vitopt.rows import measured_rows
from vitopt.stages import STAGES_FILE, RunFolder
from vitopt.tracking import Tracking
from vitopt.variants import VariantMaker, choice_files

logger = logging.getLogger(__name__)

EXPORT_FOLDER = "export"
RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: Path
    records: list[Record]
    recommendation: Recommendation | None  # None where nothing is required
    report: Path | None  # None where its packages are not installed, and in processes other than the main one
    exported: Record | None  # of the variant whose checkpoint was copied to `export`

    @property
    def export(self) -> Path | None:
        """Folder of the exported checkpoint."""
        return self.folder / EXPORT_FOLDER if self.exported else None


def run(recipe: Recipe, folder: Path, say: Callable[[str], None] = lambda line: None) -> RunResult:
    """Carry out a recipe in `folder`: fine-tune, make the variants, measure them together, report, export.

    Everything that can be refused is refused before the first long stage: patterns, data, labels, formats, and a
    folder that another process works in or that holds what vitopt did not write where it would be replaced.

    Raises:
        VitoptError: any of its kinds; stages that were complete before stay.
    """
    plans(recipe)
    device = devices.resolve_device(recipe.device)
    source = open_checkpoint(recipe.model)
    images = None if recipe.data is None else tested_images(recipe, recipe.data)
    if images is not None and recipe.data is not None:
        require_images(recipe, source, recipe.data, images)
    if recipe.strict:
        require_attention(recipe, source, device)
    inputs = source.folder, recipe.data.folder if recipe.data else None
    files = [RECIPE_FILE, ENVIRONMENT_FILE, STAGES_FILE, "report.html", "report.md", RECOMMENDATION_FILE]
    files += [file for variant in recipe.variants for file in choice_files(variant)]
    with launch.in_main_process(storage.claimed(folder, *inputs, files=files)):
        Tracking(recipe.log_to)  # refused now, not after the training
        run_folder = RunFolder(folder, say)
        launch.wait_for_all()  # before the main process changes what the others have yet to read
        if launch.is_main_process():
            _begin(recipe, folder, device)
        return _run_stages(run_folder, recipe, source, images)


def _begin(recipe: Recipe, folder: Path, device: torch.device) -> None:
    products = [*(["finetune"] if recipe.finetune else []), *([EXPORT_FOLDER] if recipe.export else [])]
    for variant in recipe.variants:
        products += [f"variants/{variant.name}", *(f"steps/{name}" for name in variant.all_steps)]
    for product in products:
        ownership.require_replaceable(folder / product)
    if not _holds_recipe(folder, recipe):
        storage.write_text(folder / RECIPE_FILE, dump_yaml(recipe))
    storage.write_json(folder / ENVIRONMENT_FILE, machine.describe(device))


def _holds_recipe(folder: Path, recipe: Recipe) -> bool:
    """Whether the run's own recipe already says the same, maybe in the user's words and with comments."""
    try:
        return load_recipe(folder / RECIPE_FILE) == recipe
    except RecipeError:
        return False


def _run_stages(run: RunFolder, recipe: Recipe, source: Checkpoint, images: ImageSet | None) -> RunResult:
    maker = VariantMaker(run, recipe, images)
    base = maker.finetuned(source)
    variants = [maker.settle(variant, base) for variant in recipe.variants]
    failures = {settled.variant.name: maker.make(settled) for settled in variants}
    records = measured_rows(run, recipe, images, variants, failures)
    return _report(run, recipe, _judged(run, recipe, records))


def _judged(run: RunFolder, recipe: Recipe, records: list[Record]) -> list[Record]:
    """The records with what depends on the recipe beyond what was measured: how many variants are compared, and what is
    required of each."""
    asked = {variant.name: variant for variant in recipe.variants}
    adjusted = adjusted_for_all(records)
    baseline = next((record for record in adjusted if record.variant.name == recipe.baseline_name), None)
    judged = []
    for stored, record in zip(records, adjusted, strict=True):
        requirements: tuple[Requirement, ...] = ()
        if baseline is not None and record is not baseline:
            variant = asked[record.variant.name]
            floor = judge_floor(variant.search_spec, record, baseline) if variant.skips_automatically else ()
            requirements = floor + judge(recipe.require, record, baseline)
        record = record.model_copy(update={"requirements": requirements})
        if record != stored and launch.is_main_process():
            save_record(record, run.variant(record.variant.name))
        judged.append(record)
    return judged


def _report(run: RunFolder, recipe: Recipe, records: list[Record]) -> RunResult:
    recommendation = recommend(records, recipe.prefer, recipe.price_per_hour)
    if not launch.is_main_process():
        return RunResult(run.path, records, recommendation, None, None)
    if recommendation is not None:
        recommendation.save(run.path)
    report = _write_report(run, recipe, records)
    return RunResult(run.path, records, recommendation, report, _export(run, recipe, records, recommendation))


def _export(
    run: RunFolder, recipe: Recipe, records: list[Record], recommendation: Recommendation | None
) -> Record | None:
    """Copy the variant that the recipe names, or the recommended one, to `export/`; its record."""
    folder = run.path / EXPORT_FOLDER
    name = recipe.export
    if recipe.exports_best:
        name = recommendation.ship if recommendation else None
    if name is None:
        if recipe.export is not None:
            storage.remove(folder)  # of an earlier recommendation
            run.say("export: left out, no variant is shown to meet all that is required")
        return None
    record = next(record for record in records if record.variant.name == name)
    if record.failure is not None:
        raise CheckpointError(f"cannot export {name}: {record.failure}")
    if recommendation is not None and (lacking := (recommendation.missed | recommendation.undecided).get(name)):
        logger.warning("%s is exported and is not shown to meet what is required: %s", name, "; ".join(lacking))
    storage.copy_folder(run.variant(name), folder)
    return record


def _write_report(run: RunFolder, recipe: Recipe, records: list[Record]) -> Path | None:
    """The report's path; None where a package that it needs is not installed, which is said."""
    missing = [package for package in ("jinja2", "matplotlib", "pyarrow") if not support.installed(package)]
    if missing:
        # Measuring alone needs none of them; the records are complete, so the report can be written elsewhere.
        without_predictions = "pyarrow" in missing and recipe.data is not None
        what = "report and predictions" if without_predictions else "report"
        later = "" if without_predictions else f"; `vitopt report {run.path}` writes it"
        run.say(f"{what}: left out, {' and '.join(missing)} not installed{later}")
        return None
    from vitopt.report.card import write_card
    from vitopt.report.page import write_report

    for record in records:
        if record.failure is None:
            write_card(record, run.variant(record.variant.name), records)
    return write_report(run.path)
