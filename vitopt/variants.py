"""How the checkpoint of each variant is made: its steps, the choice of what its recipe leaves open, its format."""

import logging
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from vitopt import ownership, storage, threads
from vitopt.adaptive.make import at_size, require_low
from vitopt.adaptive.make import make as adapt
from vitopt.checks import calibration_images, step_images
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.engines.runtime import make
from vitopt.environment import devices, launch, machine
from vitopt.errors import CheckpointError, MeasurementError, RecordError, UnsupportedError, VitoptError
from vitopt.measure.predictions import PREDICTIONS_FILE
from vitopt.models.checkpoint import CONFIG_FILE, Checkpoint, open_checkpoint
from vitopt.recipe import ENGINES, CalibrationSpec, FinetuneSpec, Recipe, RecipeVariant, Step, computes_itself
from vitopt.records import RECORD_FILE
from vitopt.search.analysis import analyse_for
from vitopt.search.fastest import Choice, find_fastest, how_measured, load_choice, save_choice
from vitopt.search.results import SENSITIVITY_SCHEMA, Sensitivity, load_sensitivity
from vitopt.stages import RunFolder, Stage
from vitopt.tracking import Tracking
from vitopt.transformation import teacher_of

logger = logging.getLogger(__name__)

_MEASURED = (RECORD_FILE, PREDICTIONS_FILE, "README.md")  # beside a variant's checkpoint; it stands without them
# Where a variant fails with one of these, its row tells why and the others still tell something.
_TOLERATED = (CheckpointError, MeasurementError, UnsupportedError)


@dataclass(frozen=True)
class Settled:
    """A variant of which nothing is open: in which format it is made, and of which checkpoint.

    `images`: those on which its skip list or format was chosen, and the `purpose`, what was chosen. `scales`: those
    that give an engine its static scales. `chosen`: why it has this format, where that was left open. `failure`: why
    its steps could not be done.
    """

    variant: RecipeVariant
    base: Checkpoint
    images: ImageSet | None = None
    purpose: Literal["skip list", "format"] = "skip list"
    scales: ImageSet | None = None
    chosen: str | None = None
    failure: str | None = None
    first: Checkpoint | None = None  # what the first pass of an adaptive variant is made of


def choice_files(variant: RecipeVariant) -> list[str]:
    """Where a run keeps what was measured to choose what this variant leaves open; none where nothing is."""
    if variant.skips_automatically:
        return [f"sensitivity/{variant.name}.json"]
    return [f"formats/{variant.name}.json"] if variant.chooses_format else []


@dataclass
class VariantMaker:
    """Makes the checkpoints of a recipe's variants in the folder of a run; `test`: the images that are tested."""

    run: RunFolder
    recipe: Recipe
    test: ImageSet | None
    _steps: dict[str, Checkpoint | str] = field(init=False, default_factory=dict)  # what came of each, or why nothing

    def finetuned(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint that all variants start from: the source itself, or fine-tuned as the recipe asks.

        Raises:
            VitoptError: of the fine-tuning, or its result does not know the tested classes.
        """
        if self.recipe.finetune is None:
            return source
        stage = self._step_stage("finetune", source, source, Step.model_validate({"finetune": self.recipe.finetune}))
        self.run.carry_out(stage)
        return self._opened(stage)

    def settle(self, variant: RecipeVariant, base: Checkpoint) -> Settled:
        """Do the variant's steps, from `base` on, and choose what its recipe leaves open.

        Raises:
            VitoptError: of the choice, or of a step, unless that is a reason for one variant alone to fail.
        """
        after = self._after(base, variant.step_names, variant.steps)
        if isinstance(after, str):
            return Settled(variant, base, failure=after)
        if variant.adaptive is None:
            return self._chosen(variant, after)
        source = open_checkpoint(variant.adaptive.draft) if variant.adaptive.draft else after
        first = self._after(source, variant.first_step_names, variant.adaptive.steps)
        if isinstance(first, str):
            return Settled(variant, after, failure=first)
        return replace(self._chosen(variant, after), first=first)

    def _after(self, base: Checkpoint, names: Sequence[str], steps: Sequence[Step]) -> Checkpoint | str:
        """What comes of a checkpoint, or why nothing does."""
        start = base
        for name, step in zip(names, steps, strict=True):
            if name not in self._steps:
                stage = self._step_stage(f"steps/{name}", start, base, step, tolerated=_TOLERATED)
                failure = self.run.carry_out(stage)
                self._steps[name] = self._opened(stage) if failure is None else f"{stage.name}: {failure}"
            outcome = self._steps[name]
            if isinstance(outcome, str):
                return outcome
            base = outcome
        return base

    def _chosen(self, variant: RecipeVariant, base: Checkpoint) -> Settled:
        """With what its recipe leaves open chosen on `base`."""
        scales = None
        if (scaling := variant.scaling_step) is not None and self.recipe.data is not None:
            scales = step_images(self.recipe.data, scaling)
        if variant.skips_automatically:
            return self._with_skip_list(variant, base, scales)
        if variant.chooses_format:
            return self._with_format(variant, base, scales)
        return Settled(variant, base, scales=scales)

    def make(self, settled: Settled) -> str | None:
        """Make the variant's checkpoint; the reason where that fails, None where it is there."""
        stage = self._variant_stage(settled)
        if settled.failure is None:
            return self.run.carry_out(stage)
        self.run.forget(stage.name)
        self._remove_earlier(settled.variant.name)
        return settled.failure

    def _step_stage(
        self,
        name: str,
        start: Checkpoint,
        checkpoint: Checkpoint,
        step: Step,
        tolerated: tuple[type[VitoptError], ...] = (),
    ) -> Stage[Checkpoint]:
        """One step of those that begin at `start`: `name` is also the folder that it fills."""
        recipe, output, settings = self.recipe, self.run.path / name, step.settings
        teacher = teacher_of(settings, start) if isinstance(settings, FinetuneSpec) else None
        if teacher is not None:
            settings = settings.model_copy(update={"teacher": teacher.source})
        images = None if recipe.data is None else step_images(recipe.data, step)

        def work() -> str:
            transform = pkgutil.resolve_name(step.kind.function)
            options: dict[str, Any] = {"images": images, "seed": recipe.seed}
            if step.kind.images == "training":
                options["tracking"] = Tracking(recipe.log_to, recipe.name, self.run.path / "log" / name)
            made = transform(checkpoint, settings, output, recipe.device, **options)
            return str(made.summary())

        on = "" if images is None else f" on {len(images)} images of {images.name}"
        return Stage(
            name,
            inputs=[
                checkpoint.fingerprint(),
                None if images is None else [images.sha256, images.class_names],
                step.model_dump(mode="json"),
                recipe.seed,
                *([] if teacher is None else [teacher.fingerprint()]),
            ],
            files=_checkpoint_files(output),
            task=f"{step.settings.words}{on}",
            work=work,
            read=lambda: open_checkpoint(str(output)),
            alone=step.kind.images != "training",  # all processes of a launch train together
            tolerated=tolerated,
        )

    def _opened(self, stage: Stage[Checkpoint]) -> Checkpoint:
        """What a step made; it must know the tested classes."""
        checkpoint = stage.read()
        if self.test is not None:
            fit_labels(self.test, checkpoint.label_names)
        return checkpoint

    def _with_skip_list(self, variant: RecipeVariant, base: Checkpoint, scales: ImageSet | None) -> Settled:
        device, output = self.recipe.device, self.run.path / choice_files(variant)[0]
        images, skip_bad = self._calibration(variant.auto)

        def work() -> str | None:
            for other in self.recipe.variants:
                known = self.run.path / f"sensitivity/{other.name}.json"
                same = self.run.completed.get(f"sensitivity {other.name}") == stage.fingerprint
                if known != output and same and ownership.is_whole(known):
                    analyse_for(base, images, variant, output, device, scales=scales, skip_bad=skip_bad, known=known)
                    return f"the same as of {other.name}"
            analyse_for(base, images, variant, output, device, scales=scales, skip_bad=skip_bad)
            return None

        stage: Stage[Sensitivity] = Stage(
            f"sensitivity {variant.name}",
            inputs=[
                base.fingerprint(),
                images.sha256,
                variant.format,
                variant.half,
                variant.search_spec.model_dump(mode="json"),
                _of_engine(variant, scales) if computes_itself(variant.engine) else None,
                skip_bad,
                SENSITIVITY_SCHEMA,
            ],
            files=[output],
            task=f"{variant.format} on {len(images)} calibration images",
            work=work,
            read=lambda: load_sensitivity(output),
            measured_on=devices.resolve_device(device),
            alone=True,
        )
        self.run.carry_out(stage)
        search = stage.read().search
        if search is None:
            raise RecordError(f"{output} holds no search: delete it and run again")
        self.run.say(f"{stage.name}: keeps {', '.join(search.chosen) or 'nothing'} in 16 bit")
        if search.advice:
            logger.warning("%s: %s", variant.name, search.advice)
        return Settled(variant.skipping(search.chosen), base, images, scales=scales)

    def _with_format(self, variant: RecipeVariant, base: Checkpoint, scales: ImageSet | None) -> Settled:
        device, output = self.recipe.device, self.run.path / choice_files(variant)[0]
        images, skip_bad = self._calibration(variant.fastest)
        evaluate = how_measured(self.recipe.evaluate)

        def work() -> None:
            choice = find_fastest(
                base,
                images,
                variant.fastest,
                evaluate,
                half=variant.half,
                engine=variant.engine,
                scales=scales,
                device=device,
                skip_bad=skip_bad,
            )
            if choice is not None:
                save_choice(choice, output)

        stage: Stage[Choice] = Stage(
            f"format {variant.name}",
            inputs=[
                base.fingerprint(),
                images.sha256,
                variant.half,
                variant.fastest.model_dump(mode="json"),
                _of_engine(variant, scales),
                evaluate.model_dump(mode="json"),
                skip_bad,
                [torch.get_num_threads(), machine.threads_bound(), threads.waiting()],
            ],
            files=[output],
            task=f"the fastest on {len(images)} calibration images",
            work=work,
            read=lambda: load_choice(output),
            measured_on=devices.resolve_device(device),
        )
        self.run.carry_out(stage)
        choice = stage.read()
        self.run.say(f"{stage.name}: {choice.sentence()}")
        for line in choice.undecided():
            logger.warning("%s: %s", variant.name, line)
        return Settled(variant.with_choice(choice.variant), base, images, "format", scales, choice.sentence())

    def _calibration(self, spec: CalibrationSpec) -> tuple[ImageSet, bool]:
        """The images on which something is chosen, and whether broken ones are left out."""
        data = self.recipe.data
        assert data is not None  # a recipe that leaves something open has data
        return calibration_images(data, spec), data.skip_bad_images

    def _variant_stage(self, settled: Settled) -> Stage[Path]:
        variant, base, images = settled.variant, settled.base, settled.images
        output = self.run.variant(variant.name)
        compiled_in = ENGINES[variant.engine].options if variant.engine in ENGINES else ()
        rounding = None if variant.rounding is None else self._calibration(variant.rounding)[0]

        def work() -> str:
            for other in self.recipe.variants:
                folder = self.run.variant(other.name)
                same = self.run.completed.get(f"variant {other.name}") == stage.fingerprint
                if folder != output and same and all(map(ownership.is_whole, _checkpoint_files(folder))):
                    storage.copy_folder(folder, output, leave_out=_MEASURED)
                    return f"the same weights as {other.name}"
            noted: dict[str, Any] = {"images": images, "purpose": settled.purpose, "scales": settled.scales}
            try:
                return self._made(settled, output, noted | {"calibration": rounding})
            except _TOLERATED:
                self._remove_earlier(variant.name)
                raise

        stage = Stage(
            f"variant {variant.name}",
            inputs=[
                base.fingerprint(),
                variant.model_dump(mode="json", include={"format", "half", "skip", "layers", "rounding", *compiled_in}),
                None if images is None else [images.sha256, settled.purpose],
                None if rounding is None else rounding.sha256,
                _of_engine(variant, settled.scales),
                *self._inputs_of_rule(settled),
            ],
            files=_checkpoint_files(output),
            work=work,
            read=lambda: output,
            alone=True,
            tolerated=_TOLERATED,
        )
        return stage

    def _made(self, settled: Settled, output: Path, noted: dict[str, Any]) -> str:
        """Make the variant's checkpoint, both of an adaptive one; in a few words what was made."""
        variant, device, spec = settled.variant, self.recipe.device, settled.variant.adaptive
        if spec is None or settled.first is None:
            return make(settled.base, variant, output, device, **noted).summary()
        images, skip_bad = self._calibration(spec)
        with storage.temporary_folder() as folder:
            make(settled.base, variant, folder / "second", device, **noted)
            first = second = open_checkpoint(str(folder / "second"))
            if spec.low is not None or settled.first is not settled.base:
                small = settled.first
                if spec.low is not None:
                    require_low(small, spec.low, settled.base)
                    small = at_size(small, spec.low, folder / "small")
                make(small, variant, folder / "first", device, **noted)
                first = open_checkpoint(str(folder / "first"))
            how: dict[str, Any] = {"run": variant.run, "asked": variant, "skip_bad": skip_bad}
            return adapt(first, second, spec, output, device, images=images, **how).promise

    def _inputs_of_rule(self, settled: Settled) -> list[Any]:
        """What an adaptive variant depends on beside its checkpoint; nothing of another."""
        spec = settled.variant.adaptive
        if spec is None or settled.first is None:
            return []
        run = settled.variant.run.model_dump(mode="json")
        return [spec.model_dump(mode="json"), settled.first.fingerprint(), self._calibration(spec)[0].sha256, run]

    def _remove_earlier(self, name: str) -> None:
        """Remove the checkpoint of an earlier recipe, which this variant no longer is."""
        folder = self.run.variant(name)
        if launch.is_main_process() and any(folder.glob("*.safetensors")):
            storage.remove(folder)


def _of_engine(variant: RecipeVariant, scales: ImageSet | None) -> list[Any] | None:
    """What the file of an engine depends on beside the format; None for torch."""
    return [variant.engine, variant.static_scales, scales and scales.sha256] if variant.engine in ENGINES else None


def _checkpoint_files(folder: Path) -> list[Path]:
    """The files that a stage wrote as a checkpoint into `folder`, or might have written."""
    written = ownership.listed_files(folder) or {}
    return [folder / CONFIG_FILE, *(folder / name for name in written if name not in (CONFIG_FILE, *_MEASURED))]
