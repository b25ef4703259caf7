"""Which images a checkpoint was calibrated on: kept beside its weights, so that nobody tests it on them unaware."""

import json
from pathlib import Path
from typing import Any, Protocol

from vitopt import storage
from vitopt.errors import CheckpointError

CALIBRATION_FILE = "calibration.json"
_SCHEMA = "vitopt.calibration/1"


class CalibrationImages(Protocol):
    """What is kept of an image set: where it is from, and each image's content as a hex digest."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str | None: ...
    @property
    def image_hashes(self) -> tuple[str, ...]: ...


def save_calibration(folder: Path, images: CalibrationImages, purpose: str) -> None:
    """Note in a checkpoint's folder that `images` served for `purpose`, beside what is noted there already."""
    before = _read(folder)
    content = {
        "schema": _SCHEMA,
        "purpose": _joined(before.get("purpose"), purpose),
        "dataset": _joined(before.get("dataset"), images.name),
        "split": _joined(before.get("split"), images.split),
        "image_sha256": sorted({*before.get("image_sha256", ()), *images.image_hashes}),
    }
    storage.write_json(folder / CALIBRATION_FILE, content)


def calibration_hashes(folder: Path) -> set[str]:
    """Digests of the images that the checkpoint in `folder` was calibrated on; empty where none are noted.

    Raises:
        CheckpointError: the note cannot be read.
    """
    return set(_read(folder).get("image_sha256", ()))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["schema"] == _SCHEMA and all(isinstance(one, str) for one in content["image_sha256"])
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise CheckpointError(f"{path} is not a {_SCHEMA} file of this vitopt: make the checkpoint again")
    return dict(content)


def _joined(before: str | None, more: str | None) -> str | None:
    """Both, separated by a comma, each once."""
    parts = [*(before.split(", ") if before else []), *([more] if more else [])]
    return ", ".join(dict.fromkeys(parts)) or None
