"""The order of the stages and what each depends on: the only file that knows.

A run is a folder, in which each stage leaves a checkpoint or a record; `stages.py` tells which of them still stand.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from vitopt import ownership, storage
from vitopt.checks import calibration_images, plans, require_attention, tested_images, training_images
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.environment import devices, launch, machine, support
from vitopt.errors import CheckpointError, MeasurementError, RecipeError, RecordError, UnsupportedError
from vitopt.inference import Candidate, measure
from vitopt.measure.evaluator import Measured
from vitopt.measure.gate import judge, judge_floor
from vitopt.measure.predictions import PREDICTIONS_FILE, save_predictions
from vitopt.models.architectures import RANDOM_PREFIX
from vitopt.models.checkpoint import CONFIG_FILE, Checkpoint, open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.recipe import DataSpec, Recipe, VariantSpec
from vitopt.recipe_file import dump_yaml, load_recipe
from vitopt.records import RECORD_FILE, Record, Requirement, load_record, save_record
from vitopt.stages import STAGES_FILE, RunFolder, Stage
from vitopt.tracking import Tracking
from vitopt.transformation import Transformation

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
_MEASURED = (RECORD_FILE, PREDICTIONS_FILE, "README.md")  # beside a variant's checkpoint; it stands without them

S = TypeVar("S")


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: Path
    records: list[Record]
    report: Path | None  # None where its packages are not installed, and in processes other than the main one
    export: Path | None


@dataclass
class _Run:
    """A recipe that is being carried out in a folder."""

    folder: RunFolder
    recipe: Recipe
    variants: tuple[VariantSpec, ...]  # the recipe's, every automatic skip list chosen
    tracking: Tracking = field(default_factory=Tracking)
    calibrations: dict[str, ImageSet] = field(default_factory=dict)  # by variant, what its skip list was chosen on

    def variant_folder(self, name: str) -> Path:
        return self.folder.path / "variants" / name


def _checkpoint_files(folder: Path) -> list[Path]:
    """The files that a stage wrote as a checkpoint into `folder`, or might have written."""
    written = ownership.listed_files(folder) or {}
    return [folder / CONFIG_FILE, *(folder / name for name in written if name not in (CONFIG_FILE, *_MEASURED))]


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
    if images is not None and recipe.finetune is None:
        fit_labels(images, source.label_names)
    if recipe.strict:
        require_attention(recipe, source, device)
    inputs = source.folder, recipe.data.folder if recipe.data else None
    files = [RECIPE_FILE, ENVIRONMENT_FILE, STAGES_FILE, "report.html", "report.md"]
    files += [f"sensitivity/{variant.name}.json" for variant in recipe.variants]
    with launch.in_main_process(storage.claimed(folder, *inputs, files=files)):
        tracking = Tracking(recipe.log_to, recipe.name, folder / "log")
        current = _Run(RunFolder(folder, say), recipe, recipe.variants, tracking)
        launch.wait_for_all()  # before the main process changes what the others have yet to read
        if launch.is_main_process():
            _begin(current, device)
        return _run_stages(current, source, images)


def _begin(current: _Run, device: torch.device) -> None:
    folder, recipe = current.folder.path, current.recipe
    products = [*(["finetune"] if recipe.finetune else []), *(["export"] if recipe.export else [])]
    for product in (*products, *(f"variants/{variant.name}" for variant in recipe.variants)):
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


def _run_stages(current: _Run, source: Checkpoint, images: ImageSet | None) -> RunResult:
    run, data, base = current.folder, current.recipe.data, source
    if images is not None and data is not None:
        base = _finetuned(current, source, data, images)
        current.variants = tuple(_with_skip_list(current, base, variant, data, images) for variant in current.variants)
    made = {variant.name: run.carry_out(_variant_stage(current, base, variant)) for variant in current.variants}
    evaluation = _evaluate_stage(current, images, made)
    run.carry_out(evaluation)
    return _report(current, _judged(current, evaluation.read()))


def _finetuned(current: _Run, source: Checkpoint, data: DataSpec, test: ImageSet) -> Checkpoint:
    """The checkpoint that the variants are made of: the source itself, or fine-tuned as the recipe asks."""
    recipe = current.recipe
    spec = recipe.finetune
    if spec is None:
        return source
    from vitopt.finetune.training import finetune, head_labels

    output = current.folder.path / "finetune"
    train = training_images(data)
    labels = head_labels(source, train)
    fit_labels(test, labels)  # before the training, not after it
    overlap = set(train.image_hashes) & set(test.image_hashes)
    if overlap:
        logger.warning("%d test images are also training images; accuracy will look better than it is", len(overlap))
    how = functools.partial(finetune, seed=recipe.seed, tracking=current.tracking)
    stage = Stage(
        "finetune",
        inputs=[source.fingerprint(), train.sha256, labels, spec.model_dump(mode="json"), recipe.seed],
        files=_checkpoint_files(output),
        task=f"{spec.method} on {len(train)} images of {train.name}",
        work=lambda: _transform(current, how, source, spec, output, train),
        read=lambda: open_checkpoint(str(output)),
    )
    current.folder.carry_out(stage)
    tuned = stage.read()
    fit_labels(test, tuned.label_names)
    return tuned


def _transform(
    current: _Run, how: Transformation[S], checkpoint: Checkpoint, spec: S, output: Path, images: ImageSet | None
) -> str:
    return how(checkpoint, spec, output, current.recipe.device, images=images).summary()


def _with_skip_list(
    current: _Run, base: Checkpoint, variant: VariantSpec, data: DataSpec, test: ImageSet
) -> VariantSpec:
    """The variant with its skip list: as it stands, or chosen on calibration images if it is automatic."""
    if not variant.skips_automatically:
        return variant
    from vitopt.search.analysis import analyse_for, require_disjoint
    from vitopt.search.results import SENSITIVITY_SCHEMA, load_sensitivity

    device, name = current.recipe.device, f"sensitivity {variant.name}"
    output = current.folder.path / "sensitivity" / f"{variant.name}.json"
    calibration = calibration_images(data, variant)
    require_disjoint(calibration, test)
    current.calibrations[variant.name] = calibration

    def work() -> None:
        analyse_for(base, calibration, variant, output, device, skip_bad=data.skip_bad_images)

    stage = Stage(
        name,
        inputs=[
            base.fingerprint(),
            calibration.sha256,
            variant.format,
            variant.half,
            variant.auto.model_dump(mode="json"),
            data.skip_bad_images,
            SENSITIVITY_SCHEMA,
        ],
        files=[output],
        task=f"{variant.format} on {len(calibration)} calibration images",
        work=work,
        read=lambda: load_sensitivity(output),
        measured_on=devices.resolve_device(device),
        alone=True,
    )
    current.folder.carry_out(stage)
    found = stage.read().search
    if found is None:
        raise RecordError(f"{output} holds no search: delete it and run again")
    current.folder.say(f"{name}: keeps {', '.join(found.chosen) or 'nothing'} in 16 bit")
    if found.advice:
        logger.warning("%s: %s", variant.name, found.advice)
    return variant.skipping(found.chosen)


def _variant_stage(current: _Run, base: Checkpoint, variant: VariantSpec) -> Stage[Path]:
    """Make a variant's checkpoint. Where that fails, its row tells why and the others still tell something."""
    output = current.variant_folder(variant.name)
    held = variant.model_dump(mode="json", include={"format", "half", "skip", "layers"})
    calibration = current.calibrations.get(variant.name)
    tolerated = (CheckpointError, MeasurementError, UnsupportedError)

    def work() -> str:
        for other in current.variants:
            folder = current.variant_folder(other.name)
            made = current.folder.completed.get(f"variant {other.name}") == stage.fingerprint
            if folder != output and made and all(map(ownership.is_whole, _checkpoint_files(folder))):
                storage.copy_folder(folder, output, leave_out=_MEASURED)
                return f"the same weights as {other.name}"
        try:
            return _transform(current, quantize, base, variant, output, calibration)
        except tolerated:
            if any(output.glob("*.safetensors")):
                storage.remove(output)  # of an earlier recipe, which this variant no longer is
            raise

    stage = Stage(
        f"variant {variant.name}",
        inputs=[base.fingerprint(), held, calibration.sha256 if calibration else None],
        files=_checkpoint_files(output),
        work=work,
        read=lambda: output,
        alone=True,
        tolerated=tolerated,
    )
    return stage


def _evaluate_stage(current: _Run, images: ImageSet | None, made: dict[str, str | None]) -> Stage[list[Record]]:
    """Measure all variants together; `made` tells of each why it could not be made, None where it was."""
    recipe, run = current.recipe, current.folder
    folders = {variant.name: current.variant_folder(variant.name) for variant in current.variants}
    predictions = [folder / PREDICTIONS_FILE for folder in folders.values()]

    def save(one: Measured) -> None:
        folder = folders[one.record.variant.name]
        save_record(one.record, folder)
        if one.predictions is not None and support.installed("pyarrow"):
            save_predictions(one.predictions, folder)

    def work() -> None:
        run.forget("evaluate")  # the records on disk are replaced one by one from now on
        measured = measure(
            [
                Candidate(variant.name, str(folders[variant.name]), variant.run, variant, made[variant.name])
                for variant in current.variants
            ],
            recipe.evaluate,
            images=images,
            skip_bad=recipe.data is not None and recipe.data.skip_bad_images,
            baseline=recipe.baseline_name,
            device=recipe.device,
            strict=recipe.strict,
            untrained=recipe.finetune is None and recipe.model.startswith(RANDOM_PREFIX),
            ready=save,
        )
        if launch.is_main_process():
            for one in measured:
                save(one)
                if one.record.failure:
                    run.say(f"evaluate: {one.record.variant.name} failed: {one.record.failure}")
            current.tracking.log(one.record for one in measured)

    on = f"{len(images)} images of {images.name}" if images else "random pixels"
    return Stage(
        "evaluate",
        inputs=[
            [variant.model_dump(mode="json") for variant in current.variants],
            {name: run.completed.get(f"variant {name}") for name in folders},
            recipe.baseline_name,
            recipe.evaluate.model_dump(mode="json"),
            recipe.data.model_dump(mode="json") if recipe.data else None,
            [images.sha256, images.groups] if images else None,
            [torch.get_num_threads(), machine.threads_bound()],
        ],
        files=[*(folder / RECORD_FILE for folder in folders.values()), *filter(ownership.is_listed, predictions)],
        task=f"{len(folders)} variants on {on}",
        work=work,
        read=lambda: [load_record(folder) for folder in folders.values()],
        measured_on=devices.resolve_device(recipe.device),
    )


def _judged(current: _Run, records: list[Record]) -> list[Record]:
    """The records with what the recipe requires of each variant; what was measured stands when that changes."""
    asked = {variant.name: variant for variant in current.recipe.variants}
    baseline = next((one for one in records if one.variant.name == current.recipe.baseline_name), None)
    judged = []
    for record in records:
        found: tuple[Requirement, ...] = ()
        if baseline is not None and record is not baseline:
            variant = asked[record.variant.name]
            floor = judge_floor(variant.auto, record, baseline) if variant.skips_automatically else ()
            found = floor + judge(current.recipe.require, record, baseline)
        if found != record.requirements:
            record = record.model_copy(update={"requirements": found})
            if launch.is_main_process():
                save_record(record, current.variant_folder(record.variant.name))
        judged.append(record)
    return judged


def _report(current: _Run, records: list[Record]) -> RunResult:
    recipe, folder = current.recipe, current.folder.path
    export = folder / "export" if recipe.export else None
    if not launch.is_main_process():
        return RunResult(folder, records, None, export)
    report = _write_report(current, records)
    if export is not None:
        chosen = next(record for record in records if record.variant.name == recipe.export)
        if chosen.failure is not None:
            raise CheckpointError(f"cannot export {recipe.export}: {chosen.failure}")
        storage.copy_folder(current.variant_folder(chosen.variant.name), export)
    return RunResult(folder, records, report, export)


def _write_report(current: _Run, records: list[Record]) -> Path | None:
    """The report's path; None where a package that it needs is not installed, which is said."""
    missing = [package for package in ("jinja2", "matplotlib", "pyarrow") if not support.installed(package)]
    if missing:
        # Measuring alone needs none of them; the records are complete, so the report can be written elsewhere.
        without_predictions = "pyarrow" in missing and current.recipe.data is not None
        what = "report and predictions" if without_predictions else "report"
        later = "" if without_predictions else f"; `vitopt report {current.folder.path}` writes it"
        current.folder.say(f"{what}: left out, {' and '.join(missing)} not installed{later}")
        return None
    from vitopt.report.card import write_card
    from vitopt.report.page import write_report

    for record in records:
        if record.failure is None:
            write_card(record, current.variant_folder(record.variant.name), records)
    return write_report(current.folder.path)
