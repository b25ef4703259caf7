"""What a sensitivity analysis and a skip-list search leave on disk."""

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from vitopt import storage
from vitopt.errors import RecordError
from vitopt.measure.claims import Decision
from vitopt.run_spec import computes_itself
from vitopt.section import Section

SENSITIVITY_SCHEMA = "vitopt.sensitivity/2"


class Loss(Section):
    """How far one mixture of formats is from the 16-bit model on the calibration images."""

    top1_delta_points: float = Field(description="against the 16-bit model, for damage; see the table otherwise")
    top1_delta_ci95_points: tuple[float, float]
    agreement_percent: float = Field(description="with the 16-bit model")
    kl: float = Field(description="mean KL(16 bit || mixture), nats")
    logit_error: float = Field(description="norm of the difference to the 16-bit logits over their norm")
    kl_share: float | None = Field(None, description="KL over that of the fully quantized model on the same images")
    kl_share_ci95: tuple[float, float] | None = Field(None, description="bootstrap over images")
    kl_ci95: tuple[float, float] | None = Field(None, description="bootstrap over images; null under 30 images")


class UnitScores(Section):
    """One block or linear layer."""

    unit: str
    damage: Loss | None = Field(None, description="only this unit quantized; top-1 against the 16-bit model")
    recovery: Loss | None = Field(None, description="only this unit in 16 bit; top-1 against the quantized model")
    extra_bytes: int = Field(description="weight bytes that keeping it in 16 bit costs")
    extra_ms: float | None = Field(description="milliseconds per image that keeping it costs, batch 1; may be negative")


class Point(Section):
    """One skip list that was evaluated in a search."""

    skip: tuple[str, ...]
    loss: Loss
    extra_bytes: int
    extra_ms: float | None
    within_target: bool = Field(description="whether its KL is what the search aimed at; shows nothing by itself")


class SearchResult(Section):
    """Outcome of a skip-list search: the choice, how it stood on images of its own, and everything that was tried."""

    goal: str
    objective: str
    chosen: tuple[str, ...]
    decision: Decision = Field(description="whether the confirming images show (95 %) that the choice meets the goal")
    choosing_images: int
    confirming_images: int
    confirmed: Loss = Field(description="the choice against the 16-bit model on the confirming images")
    advice: str | None = Field(None, description="what to do where the goal was not shown")
    points: tuple[Point, ...] = Field(
        description="in the order in which they were tried on the choosing images; the first skips nothing"
    )


class Sensitivity(Section):
    """Both tables for one format, with what is needed to repeat them."""

    schema_: str = Field(SENSITIVITY_SCHEMA, alias="schema")
    checkpoint: str
    checkpoint_sha256: str
    format: str
    half: str
    granularity: str
    images: int = Field(description="that the scores are from; with a goal, those that choose")
    dataset: str
    dataset_sha256: str
    sample_images: int | None = Field(
        None, description="images of the label-free first pass, spread over the classes; null without one"
    )
    sample_kl: dict[str, float] = Field(default_factory=dict, description="recovery KL on that sample, by unit")
    quantized: Loss = Field(description="every unit quantized")
    units: tuple[UnitScores, ...]
    seconds: float
    search: SearchResult | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, Any] = Field(
        default_factory=dict, description="all that it depends on; it is used again only where all is the same"
    )

    model_config = Section.model_config | {"populate_by_name": True}

    @property
    def timed_whole(self) -> bool:
        """Whether milliseconds are those of whole lists, as an engine's file of each was timed."""
        return computes_itself(self.inputs.get("engine", "torch"))

    def to_json(self) -> dict[str, Any]:
        """Plain data as stored."""
        return self.model_dump(mode="json", by_alias=True)


def save_sensitivity(result: Sensitivity, path: Path) -> None:
    """Write a result as JSON."""
    storage.write_json(path, result.to_json())


def load_sensitivity(path: Path) -> Sensitivity:
    """Read a result.

    Raises:
        RecordError: missing, not JSON, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Sensitivity.model_validate(content)
    except OSError as error:
        raise RecordError(f"no sensitivity result at {path}: run `vitopt sensitivity` first") from error
    except (ValueError, ValidationError) as error:
        raise RecordError(
            f"{path} is not a sensitivity result of this version: run `vitopt sensitivity` again"
        ) from error
