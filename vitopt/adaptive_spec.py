"""What an adaptive model is asked to be: its first pass, and when that is sure enough. Imports no torch."""

from typing import Any, Literal

from pydantic import Field, model_validator

from vitopt.run_spec import RunSpec
from vitopt.spec import PATH_LENGTH, CalibrationSpec, ImageCount
from vitopt.steps import Step

Proxy = Literal["margin", "entropy", "probability", "class_token"]


class TargetSpec(CalibrationSpec):
    """How the threshold is chosen, and on which images."""

    images: ImageCount = Field(1024, description="calibration images, spread over the classes")
    escalation_rate: float | None = Field(
        None, gt=0, lt=1, description="share of images that get the second pass, about: no promise on accuracy"
    )
    max_top1_loss: float | None = Field(
        None, gt=0, lt=100, description="largest loss of top-1 in points against the second pass for all images"
    )
    confidence: float = Field(0.95, ge=0.5, lt=1, description="probability with which `max_top1_loss` is kept")
    proxy: Literal["auto", Proxy] = Field(
        "auto", description="what tells how sure the first pass is; auto takes the best on calibration images"
    )

    @model_validator(mode="after")
    def _has_one_target(self) -> "TargetSpec":
        if (self.escalation_rate is None) == (self.max_top1_loss is None):
            raise ValueError("give one of `escalation_rate` and `max_top1_loss`: it decides the threshold")
        if self.max_top1_loss is None and (useless := self.changed("confidence")):
            raise ValueError(f"{useless} is that of `max_top1_loss`: leave it out")
        return self


class AdaptiveSpec(TargetSpec):
    """A first pass for all images, and the variant itself as the second for those of which the first is not sure."""

    low: int | None = Field(None, ge=1, le=16384, description="side in pixels of the first pass's images")
    draft: str | None = Field(
        None,
        min_length=1,
        max_length=PATH_LENGTH,
        description="checkpoint of the first pass; null: the variant's own",
    )
    first: dict[str, Any] = Field(
        default_factory=dict, description="how the first pass is run, where that differs from the variant"
    )
    steps: tuple[Step, ...] = Field((), description="what is done to the first pass's checkpoint: finetune")

    @model_validator(mode="after")
    def _first_pass_differs(self) -> "AdaptiveSpec":
        if self.low is None and self.draft is None and not self.first and not self.steps:
            raise ValueError(
                "the first pass would be the second: give `low`, a `draft`, `steps`, or how the `first` is run"
            )
        if unknown := set(self.first) - set(RunSpec.model_fields):
            raise ValueError(f"`first` has {min(unknown)!r}, which is no way to run a checkpoint")
        return self

    def run_of_first(self, run: RunSpec) -> RunSpec:
        """How the first pass is run, where the second is run so.

        Raises:
            ValueError: the options do not go together.
        """
        return RunSpec.model_validate(run.model_dump() | self.first)
