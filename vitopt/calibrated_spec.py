"""What is chosen on calibration images: a skip list, a format, how weights are rounded. Imports no torch."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from vitopt.spec import BatchSize, CalibrationSpec, ImageCount

# One calibration image in this many chooses a skip list, the others confirm it. Choosing ranks by KL, about which every
# image tells something, and runs a model of L blocks about L times for each; confirming counts the few images that
# change sides, and runs three models for each: many confirming images are needed, and they are cheap.
CHOOSING = 4
SKIP_GOALS = ("max_top1_drop", "max_kl_share", "max_kl")
ENGINE_MAX_KL = 0.005  # nats; on ImageNet about two of a hundred photos then change class


class AutoSkipSpec(CalibrationSpec):
    """How `skip: auto` chooses: the cheapest skip list, confirmed on calibration images that did not choose it."""

    max_top1_drop: float | None = Field(1.0, gt=0, le=100, description="largest loss of top-1 in points")
    max_kl_share: float | None = Field(None, gt=0, lt=1, description="largest KL, as a share of the quantized model's")
    max_kl: float | None = Field(
        None,
        gt=0,
        description="largest KL in nats; 0.005 for an engine that is given no goal at all",
    )
    objective: Literal["size", "latency"] | None = Field(
        None, description="what a kept layer costs; null is size, and latency for an engine"
    )
    granularity: Literal["block", "linear", "kind"] | None = Field(
        None, description="blocks, linear layers, or kinds of these in all blocks; null is block, for an engine kind"
    )
    # 512 choose and 1,536 confirm. That shows the floor of one point where up to 1.3 % of the images change sides, and
    # half a point where hardly any does: 0.5 points take 1,020 images if none changes, and 5,000 if 1 % do.
    images: ImageCount = Field(
        2048,
        ge=2,
        description="calibration images, spread over the classes; one in four is used to choose, the others to confirm",
    )
    sample: ImageCount | None = Field(
        None, description="first rank by KL on this many of the images used to choose, then score only the best"
    )
    sensitivity: Path | None = Field(
        None, description="result of `vitopt sensitivity` for the same checkpoint, images and goal, taken as it is"
    )

    @model_validator(mode="after")
    def _has_a_goal(self) -> "AutoSkipSpec":
        if self.max_top1_drop is None and self.max_kl_share is None and self.max_kl is None:
            raise ValueError("give max_top1_drop, max_kl_share or max_kl, else there is no floor to keep to")
        return self

    def for_engine(self) -> "AutoSkipSpec":
        """The same with the goal that an engine's search has by default: one of KL, which few images show.

        Its units are few and coarse, and its figures are of whole files. A hundred images tell nothing about a point of
        top-1, which would then keep all of them.
        """
        given = set(SKIP_GOALS) & self.model_fields_set
        return self if given else self.model_copy(update={"max_top1_drop": None, "max_kl": ENGINE_MAX_KL})


class FastestSpec(CalibrationSpec):
    """How `format: auto` chooses: the fastest format here that is shown to agree with fp32 on calibration images."""

    min_agreement: float = Field(98, ge=0, le=100, description="smallest agreement with fp32, in percent of images")
    compile: bool = Field(True, description="try compiled models too")


class RoundingSpec(CalibrationSpec):
    """How `rounding: gptq` rounds weights: on calibration images, without their labels.

    GPTQ: Frantar et al., arXiv 2210.17323. With `tuning_steps` what is not in codes, and the scales, then learn the
    float model's logits.
    """

    images: ImageCount = Field(256, description="calibration images, spread over the classes")
    crops: int = Field(0, ge=0, le=64, description="random crops of each image that round weights beside it")
    search_scales: bool = Field(
        True, description="search scales and codes by what they change in the logits; false: plain GPTQ"
    )
    damping: float = Field(0.01, gt=0, le=10, description="added to the Hessian's diagonal, in shares of its mean")
    tuning_steps: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="steps in which what is not in codes learns the float model's logits",
    )
    batch_size: BatchSize = Field(16, description="images per step of the tuning")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="highest learning rate of the tuning")

    @model_validator(mode="after")
    def _tuning_keys_need_steps(self) -> "RoundingSpec":
        if not self.tuning_steps and (without_effect := self.changed("batch_size", "learning_rate")):
            raise ValueError(f"without `tuning_steps` nothing is tuned, so {without_effect} would do nothing")
        return self


def rounding_from_word(value: Any) -> Any:
    """`rounding: gptq` means calibrated rounding with all defaults, `nearest` none."""
    return {"gptq": {}, "nearest": None}.get(value, value) if isinstance(value, str) else value
