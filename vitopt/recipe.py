"""What a recipe can say: frozen models, which are also the arguments of the stages.

So a `vitopt` subcommand and a recipe mean the same thing by the same word. Nothing here imports torch.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vitopt.formats import QUANTIZED_FORMATS, Format, HalfFormat, RunAs
from vitopt.paths import existing

Attention = Literal["eager", "sdpa", "flash_attention_2"]
SdpaKernel = Literal["auto", "flash", "cudnn", "efficient", "math"]
Labels = Literal["name", "index"]
Linear = Literal["query", "key", "value", "output", "fc1", "fc2"]

AUTO = "auto"
# One calibration image in so many chooses a skip list, the others confirm it. Choosing ranks by KL, about which every
# image tells something, and runs a model of L blocks about L times for each; confirming counts the few images that
# change sides, and runs three models for each: many confirming images are needed, and they are cheap.
CHOOSING = 4
LINEARS: tuple[Linear, ...] = get_args(Linear)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int) else value


# Numbers and texts that no run can mean are refused before anything acts on them.
_PATH_LENGTH = 4096
_MOST_IMAGES = 1_000_000_000
_LARGEST_BATCH = 1_000_000
_MOST_WORKERS = 1_024

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=80)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class Spec(BaseModel):
    """Base of all recipe sections: immutable, unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def suggest(word: str, known: Sequence[str]) -> str:
    """The nearest word that is known, else all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _changed(spec: Spec, *keys: str) -> str:
    """Those keys whose values are not the defaults, in words; a resolved recipe states the defaults as well."""
    defaults = type(spec).model_fields
    return ", ".join(f"`{key}`" for key in keys if getattr(spec, key) != defaults[key].default)


class DataSpec(Spec):
    """Where images come from; a bare string in a recipe is its `source`."""

    source: str = Field(
        min_length=1,
        max_length=_PATH_LENGTH,
        description="image folder, Hugging Face data set id, or digits; NAME:SPLIT names a split",
    )
    train: str = Field("train", description="split to fine-tune on")
    test: str | None = Field(None, description="split to evaluate on; null takes test, else validation")
    root: str | None = Field(
        None,
        max_length=_PATH_LENGTH,
        description="where links and metadata.csv of an image folder may lead; null is that folder itself",
    )
    image_column: str | None = Field(None, description="column of a hub data set; null finds it")
    label_column: str | None = Field(None, description="column of a hub data set; null finds it")
    labels: Labels = Field(
        "name", description="labels are names of classes, or with index numbers that count the head's outputs from 0"
    )
    group_column: str | None = Field(
        None, description="column whose groups of images depend on each other, as the frames of one video do"
    )
    limit: int | None = Field(
        None, ge=1, le=_MOST_IMAGES, description="use only so many images, spread over the classes"
    )
    skip_bad_images: bool = Field(False, description="leave out images that cannot be decoded, and count them")

    @property
    def folder(self) -> Path | None:
        """The local folder that `source` names, with or without a split; None if it names none."""
        found = map(existing, (self.source, self.source.partition(":")[0]))
        return next((folder for folder in found if folder is not None and folder.is_dir()), None)


def data_from_string(value: Any) -> Any:
    """`data: digits` means `data: {source: digits}`."""
    return {"source": value} if isinstance(value, str) else value


class FinetuneSpec(Spec):
    """One fine-tuning run. LoRA: Hu et al., arXiv 2106.09685; its update is scaled by alpha / rank."""

    method: Literal["lora", "full"] = Field(
        "lora", description="LoRA updates beside the weights, or full: every weight is trained"
    )
    rank: int = Field(8, ge=1, le=1024, description="rank of the LoRA updates")
    alpha: float = Field(32, gt=0, le=1e6, description="LoRA scale; updates count alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the LoRA updates")
    targets: Patterns = Field(LINEARS, min_length=1, description="layers to adapt, as in query or block.11.fc1")
    epochs: float = Field(3, gt=0, le=1e6, description="passes over the images")
    batch_size: int = Field(16, ge=1, le=_LARGEST_BATCH, description="images per device and step")
    learning_rate: float = Field(1e-3, gt=0, le=1e3, description="highest rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, le=1e3, description="weight decay of AdamW")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="part of all steps in which the rate rises")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over all classes")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision of the training; auto is bf16 where the device computes in it"
    )
    augment: bool = Field(True, description="random crops and, with flip, mirror images")
    flip: bool = Field(True, description="mirror images; wrong where that changes the class, as with digits")
    workers: int = Field(
        0, ge=0, le=_MOST_WORKERS, description="processes that decode images; 0 decodes in the training process"
    )

    @model_validator(mode="after")
    def _lora_keys_need_lora(self) -> "FinetuneSpec":
        without_effect = _changed(self, "rank", "alpha", "dropout", "targets") if self.method == "full" else ""
        if without_effect:
            raise ValueError(f"`method: full` trains every weight, so {without_effect} would do nothing: leave it out")
        return self


class AutoSkipSpec(Spec):
    """How `skip: auto` chooses: the cheapest skip list, confirmed on calibration images that did not choose it."""

    max_top1_drop: float | None = Field(1.0, gt=0, le=100, description="largest loss of top-1 in points")
    max_kl_share: float | None = Field(None, gt=0, lt=1, description="KL at most this share of the quantized model's")
    objective: Literal["size", "latency"] = Field("size", description="what a kept layer costs")
    granularity: Literal["block", "linear"] = Field("block", description="whole blocks or single linear layers")
    split: str = Field("train", description="split of the data whose images calibrate; never the tested ones")
    # 512 choose and 1,536 confirm. That shows the floor of one point where up to 1.3 % of the images change sides, and
    # half a point where hardly any does: 0.5 points take 1,020 images if none changes, and 5,000 if 1 % do.
    images: int = Field(
        2048,
        ge=2,
        le=_MOST_IMAGES,
        description="calibration images over the classes; one in four chooses, others confirm",
    )
    sample: int | None = Field(
        None, ge=1, le=_MOST_IMAGES, description="first rank by KL on so many of those that choose, then score the best"
    )

    @model_validator(mode="after")
    def _has_a_goal(self) -> "AutoSkipSpec":
        if self.max_top1_drop is None and self.max_kl_share is None:
            raise ValueError("give max_top1_drop or max_kl_share, else there is no floor to keep to")
        return self


class RunSpec(Spec):
    """How a checkpoint is run; nothing of it is in the file."""

    attention: Attention = Field("sdpa", description="attention implementation")
    sdpa_kernel: SdpaKernel = Field("auto", description="kernel of sdpa; auto lets torch choose")
    run_as: RunAs | None = Field(
        None, description="format that packed layers expand to at load; without it they run packed"
    )
    fuse_qkv: bool = Field(False, description="query, key and value as one matrix product; exact")
    channels_last: bool = Field(False, description="pixels and patch embedding in NHWC memory order")
    compile: bool = Field(False, description="compile for each batch size; on a GPU, replay it as one CUDA graph")
    autotune: bool = Field(False, description="with compile: time its kernels first, slower to start")

    @property
    def options(self) -> dict[str, Any]:
        """What is set, by option; `run_as` is a format, and told as one."""
        return {name: getattr(self, name) for name in RunSpec.model_fields if name != "run_as"}

    @model_validator(mode="after")
    def _options_fit(self) -> "RunSpec":
        if self.autotune and not self.compile:
            raise ValueError("`autotune` is a way to compile: set `compile` too")
        if self.sdpa_kernel != "auto" and self.attention != "sdpa":
            raise ValueError(f"`sdpa_kernel` chooses a kernel of sdpa, and `attention` is {self.attention}")
        return self


class HeldSpec(Spec):
    """How a checkpoint is held: what is in the file."""

    name: Name
    format: Format
    half: HalfFormat = Field("bf16", description="16-bit type of skipped layers, norms and activations")
    skip: Patterns = Field((), description="logical names of the layers that stay in 16 bit, or `auto`")
    auto: AutoSkipSpec = Field(AutoSkipSpec(), description="how `skip: auto` chooses")
    layers: dict[str, Format] = Field(default_factory=dict, description="other formats for some layers")


class VariantSpec(RunSpec, HeldSpec):
    """One row of the comparison: how the checkpoint is held and how it is run."""

    @model_validator(mode="after")
    def _skip_needs_quantization(self) -> "VariantSpec":
        if self.skip and self.format not in QUANTIZED_FORMATS:
            raise ValueError(f"format {self.format} quantizes nothing, so `skip` has nothing to keep in 16 bit")
        if AUTO in self.skip and self.skip != (AUTO,):
            raise ValueError("`skip: auto` chooses the whole list; it cannot be mixed with names")
        if self.auto != AutoSkipSpec() and not self.skips_automatically:
            raise ValueError("`auto` says how `skip: auto` chooses, and `skip` is another: leave one of them out")
        if self.half != "bf16" and self.format not in QUANTIZED_FORMATS and not self.layers:
            raise ValueError(f"format {self.format} quantizes nothing, so `half` would do nothing: leave it out")
        return self

    @property
    def run(self) -> RunSpec:
        """How it is run, without how it is held."""
        return RunSpec(**{name: getattr(self, name) for name in RunSpec.model_fields})

    @property
    def skips_automatically(self) -> bool:
        """Whether a sensitivity analysis has yet to choose the skip list."""
        return self.skip == (AUTO,)

    def skipping(self, chosen: Sequence[str]) -> "VariantSpec":
        """The same variant with this skip list."""
        return self.model_copy(update={"skip": tuple(chosen)})


class LatencySpec(Spec):
    """How variants are timed."""

    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=_LARGEST_BATCH)], ...], BeforeValidator(_as_list)] = (
        Field((1,), min_length=1, description="batch sizes to time, as in 1,8,32")
    )
    iterations: int = Field(100, ge=1, le=1_000_000_000, description="timed calls per variant and batch size")
    rounds: int = Field(10, ge=1, le=1_000_000, description="the calls are spread over so many interleaved rounds")
    warmup_seconds: float = Field(20, ge=0, le=1e6, description="longest warm-up per variant and batch size")
    inputs: Literal["random", "data"] = Field(
        "random", description="data: real images in turn, for what takes longer on some of them"
    )

    @model_validator(mode="before")
    @classmethod
    def _few_iterations_take_as_many_rounds(cls, content: Any) -> Any:
        if isinstance(content, dict) and "rounds" not in content and isinstance(content.get("iterations"), int):
            return content | {"rounds": max(1, min(content["iterations"], cls.model_fields["rounds"].default))}
        return content

    @model_validator(mode="after")
    def _rounds_fit(self) -> "LatencySpec":
        if self.rounds > self.iterations:
            raise ValueError(f"{self.rounds} rounds need at least as many iterations, not {self.iterations}")
        return self


class EvaluateSpec(Spec):
    """How variants are measured."""

    batch_size: int = Field(32, ge=1, le=_LARGEST_BATCH, description="images per call while accuracy is measured")
    workers: int = Field(
        0, ge=0, le=_MOST_WORKERS, description="processes that decode images; 0 uses one background thread"
    )
    look_alikes: bool = Field(
        True, description="also count tested images that look like others or like training images"
    )
    latency: LatencySpec = LatencySpec()
    end_to_end: bool = Field(True, description="also time decode, preprocess, copy, model, postprocess")
    throughput: bool = Field(False, description="also find the highest rate by doubling the batch")
    roofline: bool = Field(False, description="also measure the device's GEMM and copy rates and what they allow")


class RequireSpec(Spec):
    """What a variant must be shown to be, each by its whole 95 % interval; the options of `vitopt compare`."""

    max_top1_drop: float | None = Field(
        None, gt=0, le=100, description="top-1 at most so many points below the baseline's"
    )
    min_agreement: float | None = Field(
        None, gt=0, lt=100, description="the baseline's class on at least so many percent of images"
    )
    max_kl: float | None = Field(None, gt=0, description="mean KL divergence from the baseline in nats, at most")
    min_speedup: float | None = Field(None, gt=0, description="so many times as fast as the baseline, at least")
    max_p99_ms: float | None = Field(None, gt=0, description="99 % of calls take at most so many milliseconds")
    max_megabytes: float | None = Field(
        None, gt=0, description="weights in memory, in megabytes of a million bytes, at most"
    )
    batch_size: int | None = Field(
        None, ge=1, le=_LARGEST_BATCH, description="where speed is judged; without it, at the first timed"
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
        min_length=1, max_length=_PATH_LENGTH, description="folder, hub id, `vit-quickstart`, or `random:ARCHITECTURE`"
    )
    data: Annotated[DataSpec | None, BeforeValidator(data_from_string)] = Field(
        None, description="null measures speed, size and memory alone"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="numpy takes 32 bits")
    strict: bool = Field(False, description="an attention kernel that cannot run is an error, not a fallback")
    finetune: FinetuneSpec | None = None
    variants: Annotated[tuple[VariantSpec, ...], Field(min_length=1)]
    baseline: str | None = Field(None, description="name of the variant to compare with; null is the first")
    evaluate: EvaluateSpec = EvaluateSpec()
    require: RequireSpec = Field(RequireSpec(), description="what every variant must be shown to be")
    export: str | None = Field(None, description="name of the variant to copy to `export/`")
    waterfall: tuple[Name, ...] = Field(
        (), description="variants each of which adds one technique to the one before, for a figure in the report"
    )

    @model_validator(mode="after")
    def _names_agree(self) -> "Recipe":
        names = [variant.name for variant in self.variants]
        mistakes = [f"two variants are named {name!r}" for name in sorted(set(names)) if names.count(name) > 1]
        if self.data is None:
            needy = ["finetune"] if self.finetune is not None else []
            needy += [f"`skip: auto` of {variant.name}" for variant in self.variants if variant.skips_automatically]
            needs_images = ("max_top1_drop", "min_agreement", "max_kl")
            needy += [f"require.{key}" for key in self.require.limits if key in needs_images]
            if without_effect := _changed(self.evaluate, "batch_size", "workers"):
                needy.append(f"evaluate: {without_effect}")
            mistakes += [f"{what} needs `data`" for what in needy]
        elif self.finetune is None and self.data.train != "train":
            mistakes.append("data: `train` is the split to fine-tune on, and there is no `finetune`")
        if self.require.batch_size not in (None, *self.evaluate.latency.batch_sizes):
            mistakes.append(f"require.batch_size {self.require.batch_size} is not in evaluate.latency.batch_sizes")
        for key, wanted in [("baseline", self.baseline), ("export", self.export)] + [
            ("waterfall", name) for name in self.waterfall
        ]:
            if wanted is not None and wanted not in names:
                mistakes.append(f"{key} names {wanted!r}, which is no variant; {suggest(wanted, names)}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @property
    def baseline_name(self) -> str:
        """The variant that all others are compared with."""
        return self.baseline or self.variants[0].name
