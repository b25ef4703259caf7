"""The order of the stages, and which of them still stand: the only file that knows.

A run is a folder. Each stage leaves a checkpoint or a record there and its fingerprint in `stages.json`; a
stage whose fingerprint stands is skipped, a changed input reruns it and all that depend on it. A product that is
not as it was written (a file is missing, cut short or unreadable) is made again.
"""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from vitopt import environment, ownership, storage
from vitopt.data.images import ALL, ImageSet, open_images
from vitopt.data.labels import fit_labels
from vitopt.data.sources import parse_source
from vitopt.environment import DTYPES
from vitopt.errors import (
    CheckpointError,
    DataError,
    MeasurementError,
    PatternError,
    RecipeError,
    RecordError,
    UnsupportedError,
)
from vitopt.inference import Candidate, measure
from vitopt.measure.evaluator import Measured
from vitopt.measure.gate import judge, judge_floor
from vitopt.measure.overlap import seen
from vitopt.measure.predictions import PREDICTIONS_FILE, save_predictions
from vitopt.models.architectures import RANDOM_PREFIX
from vitopt.models.checkpoint import CONFIG_FILE, Checkpoint, empty_model, open_checkpoint
from vitopt.models.classes import best_attention, why_not_attention, why_not_kernel, why_not_trained
from vitopt.models.names import linear_layers, select
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.quantize import plan_for, quantize
from vitopt.recipe import DataSpec, Labels, Recipe, VariantSpec, dump_yaml, load_recipe, validate
from vitopt.records import RECORD_FILE, Record, Requirement, load_record, save_record

logger = logging.getLogger(__name__)

STAGES_FILE = "stages.json"
RECIPE_FILE = "recipe.yaml"
ENVIRONMENT_FILE = "environment.json"
_MEASURED = (RECORD_FILE, PREDICTIONS_FILE, "README.md")  # beside a variant's checkpoint; it stands without them


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: Path
    records: list[Record]
    report: Path | None  # None where its packages are not installed, and in processes other than the main one
    export: Path | None


@dataclass
class _Run:
    """The folder of a run, its recipe, and which stages stand."""

    folder: Path
    recipe: Recipe
    say: Callable[[str], None]
    stages: dict[str, str] = field(default_factory=dict)
    variants: tuple[VariantSpec, ...] = ()  # the recipe's, every automatic skip list chosen
    calibrations: dict[str, ImageSet] = field(default_factory=dict)  # by variant, what its skip list was chosen on

    def stands(
        self, stage: str, fingerprint: str, files: Iterable[Path], read: Callable[[], object] = lambda: None
    ) -> bool:
        """Whether a stage was completed with the same inputs, and its files are whole and `read` can read them."""
        same = self.stages.get(stage) == fingerprint
        spoiled = self._spoiled(files, read) if same else None
        # The main process decides for all: another might look while it is already making the product anew.
        same, spoiled = environment.gather_objects((same, spoiled))[0]
        if same:
            self.say(f"{stage}: up to date, skipped" if spoiled is None else f"{stage}: again, because {spoiled}")
        return same and spoiled is None

    def _spoiled(self, files: Iterable[Path], read: Callable[[], object]) -> str | None:
        for file in files:
            if not ownership.is_whole(file):
                return f"{file.relative_to(self.folder)} is {'damaged' if file.exists() else 'missing'}"
        try:
            read()
        except RecordError as error:
            return str(error)
        return None

    def complete(self, stage: str, fingerprint: str) -> None:
        self.stages[stage] = fingerprint
        if environment.is_main_process():
            storage.write_json(self.folder / STAGES_FILE, self.stages)

    def incomplete(self, stage: str) -> None:
        """The stage stands no more, whatever becomes of the work on it."""
        if self.stages.pop(stage, None) is not None and environment.is_main_process():
            storage.write_json(self.folder / STAGES_FILE, self.stages)

    def variant_folder(self, name: str) -> Path:
        return self.folder / "variants" / name


def _checkpoint_files(folder: Path) -> list[Path]:
    """The files that a stage wrote as a checkpoint into `folder`, or might have written."""
    written = ownership.listed_files(folder) or {}
    return [folder / CONFIG_FILE, *(folder / name for name in written if name not in (CONFIG_FILE, *_MEASURED))]


def _holds_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


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
    if recipe.finetune is not None and (reason := why_not_trained(checkpoint.config)):
        mistakes.append(f"finetune: {reason}")
    if recipe.finetune is not None and recipe.finetune.method == "lora":
        mistakes += _target_mistakes(recipe, checkpoint)
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return resolved


def _target_mistakes(recipe: Recipe, checkpoint: Checkpoint) -> list[str]:
    assert recipe.finetune is not None
    try:
        select(recipe.finetune.targets, linear_layers(empty_model(checkpoint), checkpoint.config.model_type))
    except PatternError as error:
        return [f"finetune.targets: {error}"]
    return []


def run(recipe: Recipe, folder: Path, say: Callable[[str], None] = lambda line: None) -> RunResult:
    """Carry out a recipe in `folder`: fine-tune, make the variants, measure them together, report, export.

    Everything that can be refused is refused before the first long stage: patterns, data, labels, formats, and a
    folder that another process works in or that holds what vitopt did not write where it would be replaced.

    Raises:
        VitoptError: any of its kinds; stages that were complete before stay.
    """
    plans(recipe)
    device = environment.resolve_device(recipe.device)
    source = open_checkpoint(recipe.model)
    images = None if recipe.data is None else tested_images(recipe, recipe.data)
    if images is not None and recipe.finetune is None:
        fit_labels(images, source.label_names)
    if recipe.strict:
        _require_attention(recipe, source, device)
    inputs = source.folder, recipe.data.folder if recipe.data else None
    files = [RECIPE_FILE, ENVIRONMENT_FILE, STAGES_FILE, "report.html", "report.md"]
    files += [f"sensitivity/{variant.name}.json" for variant in recipe.variants]
    with environment.in_main_process(storage.claimed(folder, *inputs, files=files)):
        current = _Run(folder, recipe, say, _read_stages(folder))
        environment.wait_for_all()  # before the main process changes what the others have yet to read
        if environment.is_main_process():
            _begin(current, device)
        return _run_stages(current, source, images)


def _begin(current: _Run, device: torch.device) -> None:
    folder, recipe = current.folder, current.recipe
    products = [*(["finetune"] if recipe.finetune else []), *(["export"] if recipe.export else [])]
    for product in (*products, *(f"variants/{variant.name}" for variant in recipe.variants)):
        ownership.require_replaceable(folder / product)
    if not _holds_recipe(folder, recipe):
        storage.write_text(folder / RECIPE_FILE, dump_yaml(recipe))
    storage.write_json(folder / ENVIRONMENT_FILE, environment.describe(device))


def _holds_recipe(folder: Path, recipe: Recipe) -> bool:
    """Whether the run's own recipe already says the same, maybe in the user's words and with comments."""
    try:
        return load_recipe(folder / RECIPE_FILE) == recipe
    except RecipeError:
        return False


def _run_stages(current: _Run, source: Checkpoint, images: ImageSet | None) -> RunResult:
    recipe, base = current.recipe, source
    current.variants = recipe.variants
    if images is not None and recipe.data is not None:
        base = _finetune_stage(current, source, recipe.data, images)
        current.variants = tuple(
            _sensitivity_stage(current, base, variant, recipe.data, images) for variant in recipe.variants
        )
    made = {variant.name: _variant_stage(current, base, variant) for variant in current.variants}
    records = _judged(current, _evaluate_stage(current, images, made))
    return _report_stage(current, records)


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


def _require_attention(recipe: Recipe, checkpoint: Checkpoint, device: torch.device) -> None:
    """Refuse, before the first long stage, what `strict` would refuse after it."""
    for variant in recipe.variants:
        dtype = DTYPES["bf16"] if variant.run_as else DTYPES.get(variant.format, DTYPES[variant.half])
        reason = why_not_attention(checkpoint.config, variant.attention, device, dtype)
        if reason is not None:
            raise UnsupportedError(
                f"{variant.name}: {variant.attention} cannot run: {reason}; "
                f"drop --strict to use {best_attention(checkpoint.config)}"
            )
        reason = why_not_kernel(checkpoint.config, variant.sdpa_kernel, device, dtype)
        if reason is not None:
            kernel = f"sdpa kernel {variant.sdpa_kernel}"
            raise UnsupportedError(f"{variant.name}: {kernel} cannot run: {reason}; drop --strict to let torch choose")


def _read_stages(folder: Path) -> dict[str, str]:
    path = folder / STAGES_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _fingerprint(*inputs: Any, measured_on: torch.device | None = None) -> str:
    """Of a stage: all that its product depends on. What was made on one device stands on another; figures do not."""
    return storage.sha256_of_json([*inputs, environment.provenance(measured_on)])


def _finetune_stage(current: _Run, source: Checkpoint, data: DataSpec, test: ImageSet) -> Checkpoint:
    recipe = current.recipe
    if recipe.finetune is None:
        return source
    from vitopt.finetune.training import finetune, head_labels

    output = current.folder / "finetune"
    train = open_images(data.model_copy(update={"limit": None}), data.train)
    labels = head_labels(source, train)
    fit_labels(test, labels)  # before the training, not after it
    overlap = set(train.image_hashes) & set(test.image_hashes)
    if overlap:
        logger.warning("%d test images are also training images; accuracy will look better than it is", len(overlap))
    spec = recipe.finetune.model_dump(mode="json")
    fingerprint = _fingerprint(source.fingerprint(), train.sha256, labels, spec, recipe.seed)
    if not current.stands("finetune", fingerprint, _checkpoint_files(output)):
        current.say(f"finetune: {recipe.finetune.method} on {len(train)} images of {train.name}")
        report = finetune(source, train, recipe.finetune, output, device=recipe.device, seed=recipe.seed)
        resumed = f", resumed from step {report.resumed_from_step}" if report.resumed_from_step else ""
        current.say(f"finetune: {report.steps} steps in {report.seconds:.0f} s{resumed}")
        current.complete("finetune", fingerprint)
    tuned = open_checkpoint(str(output))
    fit_labels(test, tuned.label_names)
    return tuned


def _sensitivity_stage(
    current: _Run, base: Checkpoint, variant: VariantSpec, data: DataSpec, test: ImageSet
) -> VariantSpec:
    """The variant with its skip list: as it stands, or chosen on calibration images if it is automatic."""
    if not variant.skips_automatically:
        return variant
    from vitopt.search.analysis import analyse_for, require_disjoint
    from vitopt.search.results import SENSITIVITY_SCHEMA, load_sensitivity

    recipe, auto = current.recipe, variant.auto
    stage, output = f"sensitivity {variant.name}", current.folder / "sensitivity" / f"{variant.name}.json"
    calibration = open_images(data.model_copy(update={"limit": auto.images}), auto.split)
    require_disjoint(calibration, test)
    current.calibrations[variant.name] = calibration
    fingerprint = _fingerprint(
        base.fingerprint(),
        calibration.sha256,
        variant.format,
        variant.half,
        auto.model_dump(mode="json"),
        data.skip_bad_images,
        SENSITIVITY_SCHEMA,
        measured_on=environment.resolve_device(recipe.device),
    )
    if not current.stands(stage, fingerprint, [output], lambda: load_sensitivity(output)):
        if environment.is_main_process():
            current.say(f"{stage}: {variant.format} on {len(calibration)} calibration images")
            analyse_for(base, calibration, variant, output, recipe.device, skip_bad=data.skip_bad_images)
        environment.wait_for_all()
        current.complete(stage, fingerprint)
    found = load_sensitivity(output).search
    if found is None:
        raise RecordError(f"{output} holds no search: delete it and run again")
    current.say(f"{stage}: keeps {', '.join(found.chosen) or 'nothing'} in 16 bit")
    if found.advice:
        logger.warning("%s: %s", variant.name, found.advice)
    return variant.skipping(found.chosen)


def _variant_stage(current: _Run, base: Checkpoint, variant: VariantSpec) -> str | None:
    """Make a variant's checkpoint; the reason if that fails, None if it stands."""
    stage, output = f"variant {variant.name}", current.variant_folder(variant.name)
    held = variant.model_dump(mode="json", include={"format", "half", "skip", "layers"})
    calibration = current.calibrations.get(variant.name)
    fingerprint = _fingerprint(base.fingerprint(), held, calibration.sha256 if calibration else None)
    if current.stands(stage, fingerprint, _checkpoint_files(output)):
        return None
    reason = _make_variant(current, base, variant, fingerprint) if environment.is_main_process() else None
    reason = environment.gather_objects(reason)[0]
    if reason is None:
        current.complete(stage, fingerprint)
    else:
        current.stages.pop(stage, None)
        current.say(f"{stage}: {reason}")
    return reason


def _make_variant(current: _Run, base: Checkpoint, variant: VariantSpec, fingerprint: str) -> str | None:
    output = current.variant_folder(variant.name)
    twin = next((o for o in current.variants if _holds_same(current, o, variant, fingerprint)), None)
    if twin is not None:
        storage.copy_folder(current.variant_folder(twin.name), output, leave_out=_MEASURED)
        current.say(f"variant {variant.name}: the same weights as {twin.name}")
        return None
    images = current.calibrations.get(variant.name)
    calibration = None if images is None else seen(images, "skip list")
    try:
        plan = quantize(base, variant, output, device=current.recipe.device, calibration=calibration)
    except (CheckpointError, MeasurementError, UnsupportedError) as error:
        # This row fails with its reason; the others still tell something.
        if _holds_weights(output):
            storage.remove(output)  # of an earlier recipe, which this variant no longer is
        return str(error)
    counts = ", ".join(f"{count} {format}" for format, count in plan.counts().items())
    current.say(f"variant {variant.name}: {counts}")
    return None


def _holds_same(current: _Run, other: VariantSpec, variant: VariantSpec, fingerprint: str) -> bool:
    """Whether another variant's folder already holds the same weights, run in another way."""
    made = current.stages.get(f"variant {other.name}") == fingerprint
    whole = all(map(ownership.is_whole, _checkpoint_files(current.variant_folder(other.name))))
    return other.name != variant.name and made and whole


def _evaluate_stage(current: _Run, images: ImageSet | None, made: dict[str, str | None]) -> list[Record]:
    folders = {name: current.variant_folder(name) for name in made}
    fingerprint = _evaluate_fingerprint(current, images)
    files = [folder / RECORD_FILE for folder in folders.values()]
    files += [path for path in (folder / PREDICTIONS_FILE for folder in folders.values()) if ownership.is_listed(path)]

    def read() -> list[Record]:
        return [load_record(folder) for folder in folders.values()]

    if current.stands("evaluate", fingerprint, files, read):
        return read()
    on = f"{len(images)} images of {images.name}" if images else "random pixels"
    current.say(f"evaluate: {len(made)} variants on {on}")
    current.incomplete("evaluate")  # the records on disk are replaced one by one from now on

    def save(one: Measured) -> None:
        folder = folders[one.record.variant.name]
        save_record(one.record, folder)
        if one.predictions is not None and environment.installed("pyarrow"):
            save_predictions(one.predictions, folder)

    measured = _measure(current, images, made, save)
    for one in measured:
        save(one)
        if one.record.failure:
            current.say(f"evaluate: {one.record.variant.name} failed: {one.record.failure}")
    current.complete("evaluate", fingerprint)
    return [one.record for one in measured]


def _evaluate_fingerprint(current: _Run, images: ImageSet | None) -> str:
    recipe = current.recipe
    return _fingerprint(
        [variant.model_dump(mode="json") for variant in current.variants],
        {variant.name: current.stages.get(f"variant {variant.name}") for variant in current.variants},
        recipe.baseline_name,
        recipe.evaluate.model_dump(mode="json"),
        recipe.data.model_dump(mode="json") if recipe.data else None,
        [images.sha256, images.groups] if images else None,
        [torch.get_num_threads(), environment.threads_bound()],
        measured_on=environment.resolve_device(recipe.device),
    )


def _measure(
    current: _Run, images: ImageSet | None, made: dict[str, str | None], ready: Callable[[Measured], None]
) -> list[Measured]:
    recipe = current.recipe
    candidates = [
        Candidate(
            name=variant.name,
            source=str(current.variant_folder(variant.name)),
            run=variant.run,
            asked=variant,
            failure=made[variant.name],
        )
        for variant in current.variants
    ]
    return measure(
        candidates,
        recipe.evaluate,
        images=images,
        skip_bad=recipe.data is not None and recipe.data.skip_bad_images,
        baseline=recipe.baseline_name,
        device=recipe.device,
        strict=recipe.strict,
        untrained=recipe.finetune is None and recipe.model.startswith(RANDOM_PREFIX),
        ready=ready,
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
            if environment.is_main_process():
                save_record(record, current.variant_folder(record.variant.name))
        judged.append(record)
    return judged


def _report_stage(current: _Run, records: list[Record]) -> RunResult:
    recipe = current.recipe
    export = current.folder / "export" if recipe.export else None
    if not environment.is_main_process():
        return RunResult(current.folder, records, None, export)
    report = _write_report(current, records)
    if export is not None:
        chosen = next(record for record in records if record.variant.name == recipe.export)
        if chosen.failure is not None:
            raise CheckpointError(f"cannot export {recipe.export}: {chosen.failure}")
        storage.copy_folder(current.variant_folder(chosen.variant.name), export)
    return RunResult(current.folder, records, report, export)


def _write_report(current: _Run, records: list[Record]) -> Path | None:
    """The report's path; None where a package that it needs is not installed, which is said."""
    missing = [package for package in ("jinja2", "matplotlib", "pyarrow") if not environment.installed(package)]
    if missing:
        # Measuring alone needs none of them; the records are complete, so the report can be written elsewhere.
        packages = " and ".join(missing)
        kept = "" if "pyarrow" in missing and current.recipe.data else f"; `vitopt report {current.folder}` writes it"
        current.say(f"report{' and predictions' if not kept else ''}: left out, {packages} not installed{kept}")
        return None
    from vitopt.report.card import write_card
    from vitopt.report.page import write_report

    for record in records:
        if record.failure is None:
            write_card(record, current.variant_folder(record.variant.name), records)
    return write_report(current.folder)


def starting_recipe(model: str, data: str, name: str, labels: Labels = "name") -> str:
    """A recipe in YAML for a model and a data set: fine-tuning where the head does not fit, and the variants
    that this machine can run.

    Raises:
        CheckpointError, DataError: the model or the data cannot be opened.
    """
    device = environment.resolve_device()
    checkpoint = open_checkpoint(model)
    source = {"source": data} | ({"labels": labels} if labels != "name" else {})
    images = open_images(validate(DataSpec, source, where="data"), None)
    content: dict[str, Any] = {"name": name, "model": model, "data": source}
    try:
        fit_labels(images, checkpoint.label_names)
        why = f"The model's head fits the {len(images)} test images, so nothing is fine-tuned."
    except DataError as error:
        content["finetune"] = {"method": "lora", "rank": 8, "alpha": 32, "dropout": 0.1, "epochs": 3}
        reason = " ".join(str(error).split())  # it quotes names, and a name with a line break would end the comment
        why = f"LoRA fine-tunes the layers and a new head, because the model's does not fit: {reason}."
    if images.split == ALL and "finetune" in content:
        why += " The folder has no splits: 80 % of each class trains, 20 % tests."
    wanted: list[dict[str, Any]] = [
        {"name": "fp32", "format": "fp32"},
        {"name": "bf16", "format": "bf16"},
        {"name": "nf4", "format": "nf4"},
        {"name": "nf4-fa2", "format": "nf4", "attention": "flash_attention_2"},
        {"name": "nf4-as-bf16", "format": "nf4", "run_as": "bf16"},
        {"name": "nf4-skip-0", "format": "nf4", "skip": ["block.0"]},
        {"name": "int8", "format": "int8"},
        {"name": "w8a8", "format": "w8a8"},
        {"name": "fp8", "format": "fp8"},
    ]
    if device.type == "cuda":
        fast = {"compile": True, "fuse_qkv": True}
        wanted[2:2] = [{"name": "bf16-compiled", "format": "bf16"} | fast]
        wanted += [{"name": f"{format}-compiled", "format": format} | fast for format in ("w8a8", "fp8")]
    reasons = {
        variant["name"]: environment.why_not_format(variant["format"], device)
        or environment.why_not_attention(variant.get("attention", "sdpa"), device, torch.bfloat16)
        for variant in wanted
    }
    content["variants"] = [variant for variant in wanted if reasons[variant["name"]] is None]
    content |= {"baseline": "fp32", "export": "nf4", "evaluate": {"latency": {"batch_sizes": [1, 8]}}}
    recipe = validate(Recipe, content, where="recipe")
    plans(recipe)
    lines = [f"# {why}", f"# Run it: vitopt run {name}.yaml     Look first: vitopt run {name}.yaml --dry-run"]
    lines += [f"# Left out: {name} ({reason})" for name, reason in reasons.items() if reason]
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return "\n".join(lines) + "\n" + body
