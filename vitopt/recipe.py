"""What a recipe can say: frozen models, which are also the arguments of the stages.

So a `vitopt` subcommand and a recipe mean the same thing by the same word. Nothing here imports torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

# All that a recipe can say is imported from here.
from vitopt.adaptive_spec import AdaptiveSpec as AdaptiveSpec
from vitopt.calibrated_spec import CHOOSING as CHOOSING
from vitopt.calibrated_spec import SKIP_GOALS as SKIP_GOALS
from vitopt.calibrated_spec import AutoSkipSpec as AutoSkipSpec
from vitopt.calibrated_spec import FastestSpec as FastestSpec
from vitopt.calibrated_spec import RoundingSpec as RoundingSpec
from vitopt.calibrated_spec import rounding_from_word
from vitopt.evaluate_spec import EvaluateSpec as EvaluateSpec
from vitopt.evaluate_spec import LatencySpec as LatencySpec
from vitopt.formats import FORMATS, QUANTIZED_FORMATS, Format, HalfFormat
from vitopt.paths import existing
from vitopt.run_spec import ENGINES as ENGINES
from vitopt.run_spec import Attention as Attention
from vitopt.run_spec import Engine as Engine
from vitopt.run_spec import RunSpec as RunSpec
from vitopt.run_spec import SdpaKernel as SdpaKernel
from vitopt.run_spec import computes_itself as computes_itself
from vitopt.spec import PATH_LENGTH, BatchSize, ImageCount, Name, Patterns, as_list
from vitopt.spec import CalibrationSpec as CalibrationSpec
from vitopt.spec import Spec as Spec
from vitopt.spec import suggest as suggest
from vitopt.steps import FinetuneSpec as FinetuneSpec
from vitopt.steps import Step as Step
from vitopt.steps import step_names

Labels = Literal["name", "index"]
Tracker = Literal["mlflow", "tensorboard", "wandb"]
Prefer = Literal["latency", "size", "throughput", "cost"]

AUTO = "auto"
HELD_OUT = "held-out"
BEST = "best"


class DataSpec(Spec):
    """Where images come from; a bare string in a recipe is its `source`."""

    source: str = Field(
        min_length=1,
        max_length=PATH_LENGTH,
        description="image folder, Hugging Face data set id, or digits; NAME:SPLIT names a split",
    )
    train: str = Field("train", description="split to fine-tune on")
    test: str | None = Field(None, description="split to evaluate on; null takes test, else validation")
    held_out: float | None = Field(
        None, gt=0, lt=1, description=f"share of the training images that nothing trains on: the split `{HELD_OUT}`"
    )
    test_share: float = Field(
        0.2, gt=0, lt=1, description="share that is held out for testing where the data has no splits of its own"
    )
    root: str | None = Field(
        None,
        max_length=PATH_LENGTH,
        description="folder that links and metadata.csv of an image folder may point into; null is the image folder",
    )
    image_column: str | None = Field(None, description="column of a hub data set; null finds it")
    label_column: str | None = Field(None, description="column of a hub data set; null finds it")
    labels: Labels = Field(
        "name", description="labels are names of classes, or with index numbers that count the head's outputs from 0"
    )
    group_column: str | None = Field(
        None, description="column whose groups of images depend on each other, as the frames of one video do"
    )
    limit: ImageCount | None = Field(None, description="use only this many images, spread over the classes")
    skip_bad_images: bool = Field(False, description="leave out images that cannot be decoded, and count them")

    @property
    def folder(self) -> Path | None:
        """The local folder that `source` names, with or without a split; None if it names none."""
        places = map(existing, (self.source, self.source.partition(":")[0]))
        return next((folder for folder in places if folder is not None and folder.is_dir()), None)


def data_from_string(value: Any) -> Any:
    """`data: digits` means `data: {source: digits}`."""
    return {"source": value} if isinstance(value, str) else value


class HeldSpec(Spec):
    """How a checkpoint is held: what is in the file."""

    name: Name
    format: Format
    half: HalfFormat = Field("bf16", description="16-bit type of skipped layers, norms and activations")
    skip: Patterns = Field((), description="logical names of the layers that stay in 16 bit, or `auto`")
    auto: AutoSkipSpec = Field(AutoSkipSpec(), description="how `skip: auto` chooses")
    layers: dict[str, Format] = Field(default_factory=dict, description="other formats for some layers")
    rounding: Annotated[RoundingSpec | None, BeforeValidator(rounding_from_word)] = Field(
        None,
        description="gptq, or its settings: on calibration images; nearest, or null: each weight alone",
    )


class VariantSpec(RunSpec, HeldSpec):
    """One row of the comparison: how the checkpoint is held and how it is run."""

    @model_validator(mode="after")
    def _skip_needs_quantization(self) -> "VariantSpec":
        may_quantize = self.format in (*QUANTIZED_FORMATS, AUTO)  # auto: see `RecipeVariant`
        if self.skip and not may_quantize:
            raise ValueError(f"format {self.format} quantizes nothing, so `skip` has nothing to keep in 16 bit")
        if AUTO in self.skip and self.skip != (AUTO,):
            raise ValueError("`skip: auto` chooses the whole list; it cannot be mixed with names")
        if self.auto != AutoSkipSpec() and not self.skips_automatically:
            raise ValueError("`auto` is for `skip: auto`, and `skip` is something else: leave one of them out")
        if self.half != "bf16" and not may_quantize and not self.layers:
            raise ValueError(f"format {self.format} quantizes nothing, so `half` would do nothing: leave it out")
        return self

    @model_validator(mode="after")
    def _rounding_is_known(self) -> "VariantSpec":
        if self.rounding is None:
            return self
        known = [name for name, facts in FORMATS.items() if facts.calibrated]
        formats = [format for format in (self.format, *self.layers.values()) if format in QUANTIZED_FORMATS]
        others = [format for format in formats or [self.format] if format not in (*known, AUTO)]
        if others:
            raise ValueError(f"`rounding: gptq` is for {', '.join(known)}, not {others[0]}")
        if self.engine != "torch":
            raise ValueError(f"`engine: {self.engine}` rounds weights itself: leave `rounding` out")
        return self

    @model_validator(mode="after")
    def _engine_has_the_format(self) -> "VariantSpec":
        if self.engine in ENGINES:
            known: tuple[str, ...] = (*ENGINES[self.engine].formats, AUTO)
            if lacking := [format for format in (self.format, *self.layers.values()) if format not in known]:
                raise ValueError(f"`engine: {self.engine}` has no {lacking[0]}; it has {', '.join(known[:-1])}")
        if computes_itself(self.engine):
            if self.half != "bf16":
                raise ValueError(f"`engine: {self.engine}` chooses the type of the other layers: leave `half` out")
            if self.static_scales and self.format not in (*QUANTIZED_FORMATS, AUTO):
                raise ValueError(f"format {self.format} rounds no inputs, so `static_scales` would do nothing")
        return self

    @property
    def run(self) -> RunSpec:
        """How it is run, without how it is held."""
        return RunSpec(**{name: getattr(self, name) for name in RunSpec.model_fields})

    @property
    def skips_automatically(self) -> bool:
        """Whether a sensitivity analysis has yet to choose the skip list."""
        return self.skip == (AUTO,)

    @property
    def search_spec(self) -> AutoSkipSpec:
        """How `skip: auto` chooses, with the goal of its engine where none is given."""
        return self.auto.for_engine() if computes_itself(self.engine) else self.auto

    def skipping(self, chosen: Sequence[str]) -> Self:
        """The same variant with this skip list."""
        return self.model_copy(update={"skip": tuple(chosen)})


class RecipeVariant(VariantSpec):
    """A variant as a recipe asks for it: what is done before its format is made, and a format that may be open."""

    format: Literal["auto", Format]  # type: ignore[assignment]  # wider, until `with_choice` says which
    fastest: FastestSpec = Field(FastestSpec(), description="how `format: auto` chooses")
    steps: tuple[Step, ...] = Field(
        (), description="what is done to the checkpoint first, in order: finetune, prune, calibrate"
    )
    adaptive: AdaptiveSpec | None = Field(None, description="a cheaper first pass that answers what it is sure of")

    @model_validator(mode="after")
    def _choice_is_whole(self) -> "RecipeVariant":
        if not self.chooses_format and self.fastest != FastestSpec():
            raise ValueError("`fastest` is for `format: auto`, and `format` is something else: leave one of them out")
        chosen = set(RunSpec.model_fields) - {"engine", *(("static_scales",) if computes_itself(self.engine) else ())}
        without_effect = self.changed("skip", "layers", "rounding", *sorted(chosen)) if self.chooses_format else ""
        if without_effect:
            raise ValueError(
                f"`format: auto` compares whole formats and chooses how they run: leave {without_effect} out, or name "
                "a format"
            )
        for step in self.steps:
            trained = step.settings.format if isinstance(step.settings, FinetuneSpec) else None
            if trained and self.format in QUANTIZED_FORMATS and self.format != trained:
                raise ValueError(f"a step trains for {trained}, and `format` is {self.format}: take the same")
            if trained and self.rounding is not None:
                raise ValueError(f"a step trains for {trained} as it rounds by itself: leave `rounding` out")
        return self

    @model_validator(mode="after")
    def _first_pass_can_run(self) -> "RecipeVariant":
        if self.adaptive is not None:
            self.adaptive.run_of_first(self.run)
        return self

    @property
    def chooses_format(self) -> bool:
        """Whether measuring has yet to choose the format and how it is run."""
        return self.format == AUTO

    @property
    def calibration(self) -> CalibrationSpec | None:
        """Which images choose what is left open; None where nothing is."""
        return self.auto if self.skips_automatically else self.fastest if self.chooses_format else None

    @property
    def scaling_step(self) -> Step | None:
        """The step whose images give an engine its static scales, None where none does."""
        wanted = self.static_scales and computes_itself(self.engine)
        return next((step for step in reversed(self.steps) if wanted and step.name == "calibrate"), None)

    @property
    def trains(self) -> bool:
        """Whether one of its steps learns from the training images."""
        return any(step.kind.images == "training" for step in self.all_steps.values())

    @property
    def wants_images(self) -> list[str]:
        """What of it needs other images than the tested ones."""
        wants = [f"step {step.name}" for step in self.all_steps.values() if step.kind.images]
        wants += ["`adaptive`"] if self.adaptive is not None else []
        wants += ["`skip: auto`"] if self.skips_automatically else []
        wants += ["`rounding`"] if self.rounding is not None else []
        return wants + (["`format: auto`"] if self.chooses_format else [])

    @property
    def step_names(self) -> list[str]:
        """A name for each step: the same in variants whose steps so far are the same."""
        return step_names(self.steps)

    @property
    def first_step_names(self) -> list[str]:
        """Of the steps of an adaptive variant's first pass, which follow its own, or begin with a draft."""
        if self.adaptive is None:
            return []
        before = [step.model_dump(mode="json") for step in self.steps]
        # A list in the list: what steps call their base is not the same as in one row of steps.
        return step_names(
            self.adaptive.steps, [self.adaptive.draft] if self.adaptive.draft else [before] if before else []
        )

    @property
    def all_steps(self) -> dict[str, Step]:
        """By name: its own, and those of its first pass."""
        first = self.adaptive.steps if self.adaptive else ()
        return dict(zip([*self.step_names, *self.first_step_names], [*self.steps, *first], strict=True))

    def with_choice(self, choice: VariantSpec) -> "RecipeVariant":
        """The same variant in the format of `choice`, and run as that is."""
        return self.model_copy(update={name: getattr(choice, name) for name in ("format", *RunSpec.model_fields)})


class RequireSpec(Spec):
    """What a variant must be shown to be, each by its whole 95 % interval; the options of `vitopt compare`."""

    max_top1_drop: float | None = Field(
        None, gt=0, le=100, description="largest loss of top-1 against the baseline, in points"
    )
    min_agreement: float | None = Field(
        None, gt=0, lt=100, description="smallest share of images that get the baseline's class, in percent"
    )
    max_kl: float | None = Field(None, gt=0, description="largest mean KL divergence from the baseline, in nats")
    min_speedup: float | None = Field(None, gt=0, description="smallest speed-up over the baseline")
    max_p99_ms: float | None = Field(None, gt=0, description="largest 99th percentile of latency, in milliseconds")
    max_megabytes: float | None = Field(
        None, gt=0, description="largest size of the weights in memory, in megabytes (a million bytes)"
    )
    batch_size: BatchSize | None = Field(
        None, description="batch size at which speed is judged; null is the first timed one"
    )

    @model_validator(mode="after")
    def _batch_size_has_a_use(self) -> "RequireSpec":
        if self.batch_size is not None and self.min_speedup is None and self.max_p99_ms is None:
            raise ValueError("batch_size is where speed is judged: give min_speedup or max_p99_ms too")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """What is required: key -> limit, in the order of the fields."""
        return {key: value for key, value in self.model_dump(exclude={"batch_size"}).items() if value is not None}


class Recipe(Spec):
    """A whole run: model, data, fine-tuning, variants, measurement, export."""

    name: Name
    model: str = Field(
        min_length=1, max_length=PATH_LENGTH, description="folder, hub id, `vit-quickstart`, or `random:ARCHITECTURE`"
    )
    data: Annotated[DataSpec | None, BeforeValidator(data_from_string)] = Field(
        None, description="null measures speed, size and memory alone"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="numpy takes 32 bits")
    strict: bool = Field(False, description="an attention kernel that cannot run is an error, not a fallback")
    finetune: FinetuneSpec | None = None
    variants: Annotated[tuple[RecipeVariant, ...], Field(min_length=1)]
    baseline: str | None = Field(None, description="name of the variant to compare with; null is the first")
    evaluate: EvaluateSpec = EvaluateSpec()
    require: RequireSpec = Field(RequireSpec(), description="limits that every variant must be shown to keep")
    prefer: Prefer = Field("latency", description="which of the variants that meet `require` is recommended")
    price_per_hour: float | None = Field(None, gt=0, description="what an hour of this device costs, in any currency")
    export: str | None = Field(None, description="name of the variant to copy to `export/`; best: the recommended one")
    log_to: Annotated[tuple[Tracker, ...], BeforeValidator(as_list)] = Field(
        (), description="experiment trackers that get the training and the records"
    )
    waterfall: tuple[Name, ...] = Field(
        (), description="variants each of which adds one technique to the one before, for a figure in the report"
    )

    @model_validator(mode="after")
    def _names_agree(self) -> "Recipe":
        names = [variant.name for variant in self.variants]
        mistakes = [f"two variants are named {name!r}" for name in sorted(set(names)) if names.count(name) > 1]
        if self.data is None:
            needy = ["finetune"] if self.finetune is not None else []
            needy += [f"{what} of {variant.name}" for variant in self.variants for what in variant.wants_images]
            needs_images = ("max_top1_drop", "min_agreement", "max_kl")
            needy += [f"require.{key}" for key in self.require.limits if key in needs_images]
            if without_effect := self.evaluate.changed("batch_size", "workers"):
                needy.append(f"evaluate: {without_effect}")
            mistakes += [f"{what} needs `data`" for what in needy]
        elif not self.trains and self.data.train != "train":
            mistakes.append("data: `train` is the split to fine-tune on, and there is no `finetune`")
        if not self.model.startswith("random:"):  # such a model is calibrated on random pixels
            mistakes += [
                f"`static_scales` of {variant.name} needs images: give it `steps: [calibrate]`"
                for variant in self.variants
                if computes_itself(variant.engine) and variant.static_scales and variant.scaling_step is None
            ]
        if self.require.batch_size not in (None, *self.evaluate.latency.batch_sizes):
            mistakes.append(f"require.batch_size {self.require.batch_size} is not in evaluate.latency.batch_sizes")
        named = [("baseline", self.baseline), *(("waterfall", name) for name in self.waterfall)]
        named += [("evaluate.latency.only", name) for name in self.evaluate.latency.only]
        if not self.exports_best:
            named.append(("export", self.export))
        elif not self.require.limits:
            mistakes.append("export: best needs `require`: it is the best variant that meets it")
        if self.prefer == "cost" and self.price_per_hour is None:
            mistakes.append("prefer: cost needs `price_per_hour`")
        for key, wanted in named:
            if wanted is not None and wanted not in names:
                mistakes.append(f"{key} names {wanted!r}, which is not a variant; {suggest(wanted, names)}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @property
    def trains(self) -> bool:
        """Whether anything learns from the training images."""
        return self.finetune is not None or any(variant.trains for variant in self.variants)

    @property
    def exports_best(self) -> bool:
        """Whether the recommended variant is exported, and not one by its name."""
        return self.export == BEST and all(variant.name != BEST for variant in self.variants)

    @property
    def baseline_name(self) -> str:
        """The variant that all others are compared with."""
        return self.baseline or self.variants[0].name
