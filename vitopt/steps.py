"""What can be done to a checkpoint before a variant's format is made: the kinds of steps. Imports no torch.

A new kind is a spec and an entry of `STEPS` here, and a file with its function.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from vitopt import storage
from vitopt.formats import Format
from vitopt.spec import PATH_LENGTH, BatchSize, CalibrationSpec, ImageCount, Patterns, Spec, Workers

TRAINABLE: tuple[Format, ...] = ("w8a8", "int4", "nf4")  # formats whose rounding a training can know
_OF_LORA = ("rank", "alpha", "dropout")
BASE = "base"  # the checkpoint that steps start from


class FinetuneSpec(Spec):
    """One fine-tuning run. LoRA: Hu et al., arXiv 2106.09685; its update is scaled by alpha / rank."""

    method: Literal["lora", "full", "qat"] = Field(
        "lora",
        description="LoRA updates beside the weights, or full: every weight is trained; qat: as full, with layers that "
        "compute with what `format` will hold",
    )
    format: Format | None = Field(
        None,
        description=f"what is trained for: {', '.join(TRAINABLE)} with qat; nf4 with lora, which packs the weights "
        "beside its updates (QLoRA) to save memory",
    )
    rank: int = Field(8, ge=1, le=1024, description="rank of the LoRA updates")
    alpha: float = Field(32, gt=0, le=1e6, description="LoRA scale; updates count alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the LoRA updates")
    targets: Patterns = Field(("block",), min_length=1, description="layers to adapt, as in query or block.11.fc1")
    image_size: int | None = Field(
        None, ge=1, le=4096, description="make the result for square images of this many pixels; null keeps its size"
    )
    epochs: float = Field(3, gt=0, le=1e6, description="passes over the images")
    batch_size: BatchSize = Field(16, description="images per device and step")
    learning_rate: float = Field(1e-3, gt=0, le=1e3, description="highest learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, le=1e3, description="weight decay of AdamW")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of all steps in which the learning rate rises")
    teacher: str | None = Field(
        None,
        min_length=1,
        max_length=PATH_LENGTH,
        description="checkpoint whose logits are learned; base is the one that the steps start from",
    )
    temperature: float = Field(2, gt=0, le=1e3, description="what the logits of teacher and model are divided by")
    teacher_weight: float = Field(
        0.5, gt=0, le=1, description="share of the loss that is the teacher's; 1 learns without labels"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over all classes")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision of the training; auto is bf16 where the device computes in it"
    )
    augment: bool = Field(True, description="random crops and, with flip, mirror images")
    flip: bool = Field(True, description="mirror images; wrong where that changes the class, as with digits")
    workers: Workers = Field(0, description="processes that decode images; 0 decodes in the training process")

    @model_validator(mode="after")
    def _keys_fit_the_method(self) -> "FinetuneSpec":
        useless = {"lora": (), "full": (*_OF_LORA, "targets", "format"), "qat": _OF_LORA}
        if without_effect := self.changed(*useless[self.method]):
            raise ValueError(f"with `method: {self.method}`, {without_effect} would do nothing: leave it out")
        if self.method == "qat" and self.format not in TRAINABLE:
            missing = "needs a `format`" if self.format is None else f"cannot train for {self.format}"
            raise ValueError(f"`method: qat` {missing}: take one of {', '.join(TRAINABLE)}")
        if self.method == "lora" and self.format is not None:
            if self.format != "nf4":
                raise ValueError(f"`method: lora` packs weights in nf4 alone, not in {self.format}: take `method: qat`")
            if without_effect := self.changed("dropout"):
                raise ValueError(f"with `format: nf4`, {without_effect} would do nothing: leave it out")
        return self

    @model_validator(mode="after")
    def _teaching_keys_need_a_teacher(self) -> "FinetuneSpec":
        without_effect = self.changed("temperature", "teacher_weight") if self.teacher is None else ""
        if without_effect:
            raise ValueError(f"{without_effect} would do nothing without a `teacher`: name one, or leave it out")
        if self.label_smoothing and not self.uses_labels:
            raise ValueError("`teacher_weight: 1` learns without labels: leave `label_smoothing` out")
        return self

    @property
    def uses_labels(self) -> bool:
        """Whether the labels of the images have any effect."""
        return self.teacher is None or self.teacher_weight < 1

    @property
    def words(self) -> str:
        """What it does, for the line that a run prints."""
        words = self.method if self.format is None else f"{self.method} for {self.format}"
        return words if self.teacher is None else f"{words}, distilled"


class CalibrateSpec(CalibrationSpec):
    """Observe what each layer takes over calibration images: `static_scales` runs with it."""

    images: ImageCount = Field(128, description="calibration images, spread over the classes")

    @property
    def words(self) -> str:
        """What it does, for the line that a run prints."""
        return "observing layers"


class PruneSpec(CalibrationSpec):
    """Remove whole blocks, units of the feed-forward layers, or both: an ordinary, smaller model; then fine-tune it."""

    images: ImageCount = Field(128, description="calibration images, spread over the classes")
    depth: int = Field(0, ge=0, le=256, description="how many blocks are removed")
    mlp: float = Field(0.0, ge=0, lt=1, description="share of the units of each feed-forward layer that is removed")

    @model_validator(mode="after")
    def _removes_something(self) -> "PruneSpec":
        if not self.depth and not self.mlp:
            raise ValueError("nothing is removed: give `depth`, a number of blocks, or `mlp`, a share of the units")
        return self

    @property
    def words(self) -> str:
        """What it does, for the line that a run prints."""
        return "pruning"


class RotateSpec(Spec):
    """Rotate the channels of all tokens, answers unchanged: no weights stand out (QuaRot). Measure what it brings."""

    @property
    def words(self) -> str:
        """What it does, for the line that a run prints."""
        return "rotating channels"


class SmoothSpec(CalibrationSpec):
    """Make the columns of what layers take alike, answers unchanged: 8 bits then lose less (SmoothQuant)."""

    images: ImageCount = Field(128, description="calibration images, spread over the classes")

    @property
    def words(self) -> str:
        """What it does, for the line that a run prints."""
        return "smoothing layers"


@dataclass(frozen=True)
class StepKind:
    """A kind of step.

    `spec`: its settings, which tell in `words` what is done. `function`: MODULE:NAME of the
    `transformation.Transformation` that carries it out, which also takes a `seed`; imported when it is needed.
    `images`: those that it learns from, which are the whole training split, the calibration images that its settings
    name (a `CalibrationSpec`), or none.
    """

    spec: type[Spec]
    function: str
    images: Literal["training", "calibration"] | None


STEPS: dict[str, StepKind] = {
    "finetune": StepKind(FinetuneSpec, "vitopt.training.finetune:finetune", "training"),
    "prune": StepKind(PruneSpec, "vitopt.optimize.prune:prune", "calibration"),
    "rotate": StepKind(RotateSpec, "vitopt.optimize.rotate:rotate", None),
    "smooth": StepKind(SmoothSpec, "vitopt.optimize.smooth:smooth", "calibration"),
    "calibrate": StepKind(CalibrateSpec, "vitopt.optimize.calibrate:calibrate", "calibration"),
}

_fields: dict[str, Any] = {name: (kind.spec | None, None) for name, kind in STEPS.items()}
_Settings: Any = create_model("_Settings", __base__=Spec, **_fields)


def step_names(steps: Sequence["Step"], before: Sequence[Any] = ()) -> list[str]:
    """A name for each step, as `finetune-1c0de2f4`: the same where all steps so far are, and what was `before` them."""
    dumped = [*before, *(step.model_dump(mode="json") for step in steps)]
    digests = [storage.sha256_of_json(dumped[: len(before) + index + 1]) for index in range(len(steps))]
    return [f"{step.name}-{digest[:8]}" for step, digest in zip(steps, digests, strict=True)]


class Step(_Settings):
    """A step of a variant: the name of its kind, and its settings. A name alone stands for the defaults."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_need_no_settings(cls, content: Any) -> Any:
        if isinstance(content, str):
            return {content: {}}
        alone = isinstance(content, dict) and len(content) == 1
        return {name: {} if settings is None else settings for name, settings in content.items()} if alone else content

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> "Step":
        if sum(getattr(self, name) is not None for name in STEPS) != 1:
            raise ValueError(f"a step is one of {', '.join(STEPS)} with its settings, as in `finetune: {{epochs: 1}}`")
        return self

    @model_serializer(mode="wrap")
    def _without_other_kinds(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: settings for name, settings in dump(self).items() if settings is not None}

    @property
    def name(self) -> str:
        """Of its kind."""
        return next(name for name in STEPS if getattr(self, name) is not None)

    @property
    def kind(self) -> StepKind:
        """What is known of its kind."""
        return STEPS[self.name]

    @property
    def settings(self) -> Any:
        """The spec of its kind."""
        return getattr(self, self.name)
