"""What calibrating an adaptive model found out, as it is kept beside its checkpoints: `adaptive.json`."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from vitopt import storage
from vitopt.adaptive_spec import AdaptiveSpec, Proxy, TargetSpec
from vitopt.errors import CheckpointError
from vitopt.models.checkpoint import Checkpoint
from vitopt.run_spec import RunSpec
from vitopt.section import Section

ADAPTIVE_FILE = "adaptive.json"
FIRST_FOLDER = "first"  # of the first pass's checkpoint, in the folder of the second's


class Rule(Section):
    """When an image gets the second pass: when the first scores below `threshold`; always where that is null."""

    proxy: Proxy
    threshold: float | None
    temperature: float = Field(gt=0)


class ProxyRanking(Section):
    """How well a proxy finds, on the calibration images, those for which the second pass would answer otherwise."""

    proxy: Proxy
    auroc_changed: float | None = Field(description="of images whose class differs between the passes; null: none does")
    auroc_far: float | None = Field(description="of the tenth whose class token differs most between the passes")
    spearman: float | None = Field(description="with the distance of the class tokens; null where it is not known")


class CurvePoint(Section):
    """What escalating a share of the calibration images would give."""

    escalated_percent: float
    threshold: float
    top1_percent: float
    lost_percent: float = Field(description="images that the second pass has right and this path wrong")
    gained_percent: float = Field(description="images that the second pass has wrong and this path right")


class Calibrated(Section):
    """Content of `adaptive.json`."""

    schema_: Literal["vitopt.adaptive/1"] = Field("vitopt.adaptive/1", alias="schema")
    rule: Rule
    promise: str = Field(description="what the threshold was chosen for, and on how many images, in words")
    target: TargetSpec
    first_run: dict[str, Any] = Field(description="how the first pass is run, where that differs from the second")
    own_first: bool = Field(description=f"whether `{FIRST_FOLDER}/` holds a checkpoint; else both passes have one")
    first_fingerprint: str
    second_fingerprint: str
    images: int = Field(description="calibration images, of which one in four chose the proxy and the temperature")
    escalated: float = Field(description="share of them that is escalated")
    first_top1_percent: float
    second_top1_percent: float
    proxies: tuple[ProxyRanking, ...]
    curve: tuple[CurvePoint, ...]
    distances: dict[str, float] | None = Field(
        description="quantiles of the L2 distance between the class tokens of both passes; null where it is not known"
    )

    def run_of_first(self, run: RunSpec) -> RunSpec:
        """How the first pass is run, where the second is run so."""
        return AdaptiveSpec.model_construct(first=self.first_run).run_of_first(run)


def save_calibrated(calibrated: Calibrated, folder: Path) -> None:
    """Write `adaptive.json` into the folder of the second pass's checkpoint."""
    storage.write_json(folder / ADAPTIVE_FILE, calibrated.model_dump(mode="json", by_alias=True))


def load_calibrated(checkpoint: Checkpoint) -> Calibrated | None:
    """What lies beside a checkpoint; None where it is no adaptive one.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = checkpoint.folder / ADAPTIVE_FILE if checkpoint.folder else None
    if path is None or not path.is_file():
        return None
    try:
        return Calibrated.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be read ({reason}): calibrate again, or delete it") from error


def require_same(found: Checkpoint, fingerprint: str, which: str) -> None:
    """Refuse a threshold that was chosen for another checkpoint.

    Raises:
        CheckpointError: it was.
    """
    if found.fingerprint() != fingerprint:
        raise CheckpointError(
            f"the threshold beside {found.source} was made for another checkpoint of the {which} pass: calibrate again"
        )
