"""What can be done to a checkpoint before a variant's format is made: the kinds of steps. Imports no torch.

A new kind is a spec and an entry of `STEPS` here, and a file with its function.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from vitopt.spec import BatchSize, CalibrationSpec, ImageCount, Patterns, Spec, Workers


class FinetuneSpec(Spec):
    """One fine-tuning run. LoRA: Hu et al., arXiv 2106.09685; its update is scaled by alpha / rank."""

    method: Literal["lora", "full"] = Field(
        "lora", description="LoRA updates beside the weights, or full: every weight is trained"
    )
    rank: int = Field(8, ge=1, le=1024, description="rank of the LoRA updates")
    alpha: float = Field(32, gt=0, le=1e6, description="LoRA scale; updates count alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the LoRA updates")
    targets: Patterns = Field(("block",), min_length=1, description="layers to adapt, as in query or block.11.fc1")
    epochs: float = Field(3, gt=0, le=1e6, description="passes over the images")
    batch_size: BatchSize = Field(16, description="images per device and step")
    learning_rate: float = Field(1e-3, gt=0, le=1e3, description="highest learning rate of AdamW")
    weight_decay: float = Field(0.01, ge=0, le=1e3, description="weight decay of AdamW")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of all steps in which the learning rate rises")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each target spread over all classes")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision of the training; auto is bf16 where the device computes in it"
    )
    augment: bool = Field(True, description="random crops and, with flip, mirror images")
    flip: bool = Field(True, description="mirror images; wrong where that changes the class, as with digits")
    workers: Workers = Field(0, description="processes that decode images; 0 decodes in the training process")

    @model_validator(mode="after")
    def _lora_keys_need_lora(self) -> "FinetuneSpec":
        without_effect = self.changed("rank", "alpha", "dropout", "targets") if self.method == "full" else ""
        if without_effect:
            raise ValueError(f"`method: full` trains every weight, so {without_effect} would do nothing: leave it out")
        return self

    @property
    def words(self) -> str:
        """What it does, for the line that a run prints."""
        return self.method


class CalibrateSpec(CalibrationSpec):
    """Observe what each layer takes over calibration images: `static_scales` runs with it."""

    images: ImageCount = Field(128, description="calibration images, spread over the classes")

    @property
    def words(self) -> str:
        """What it does, for the line that a run prints."""
        return "observing layers"


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
    "smooth": StepKind(SmoothSpec, "vitopt.optimize.smooth:smooth", "calibration"),
    "calibrate": StepKind(CalibrateSpec, "vitopt.optimize.calibrate:calibrate", "calibration"),
}

_fields: dict[str, Any] = {name: (kind.spec | None, None) for name, kind in STEPS.items()}
_Settings: Any = create_model("_Settings", __base__=Spec, **_fields)


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
