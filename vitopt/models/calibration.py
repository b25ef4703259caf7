"""Which images a checkpoint has seen: what it was trained on, and what its skip list or format was chosen on.

Kept beside the weights, so that whoever tests the checkpoint later can tell how many of the tested images it knows.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vitopt import storage
from vitopt.errors import CheckpointError

CALIBRATION_FILE = "calibration.json"
TRAINING = "training"
_SCHEMA = "vitopt.calibration/1"


@dataclass(frozen=True)
class Use:
    """Images that a checkpoint has seen, and for what: `training`, `skip list`, `format`, `rounding` and so on.

    `images` and `image_phash` go with `image_sha256` one by one, or are empty where they are not known;
    a perceptual hash is 16 hexadecimal digits, None for an image that has none.
    """

    purpose: str
    dataset: str
    split: str | None
    image_sha256: tuple[str, ...]
    images: tuple[str, ...] = ()
    image_phash: tuple[str | None, ...] = ()


def save_uses(uses: Sequence[Use], folder: Path) -> None:
    """Write `calibration.json` into a checkpoint's folder; nothing where nothing is known to have been seen."""
    if uses:
        storage.write_json(
            folder / CALIBRATION_FILE, {"schema": _SCHEMA, "calibrations": [asdict(use) for use in uses]}
        )


def load_uses(folder: Path | None) -> tuple[Use, ...]:
    """What the checkpoint in `folder` has seen; nothing for a checkpoint without a folder or without the file.

    Raises:
        CheckpointError: the file is there and cannot be read.
    """
    path = folder / CALIBRATION_FILE if folder else None
    if path is None or not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema") != _SCHEMA:
            raise ValueError(f"its schema is not {_SCHEMA}")
        # One use may stand alone, without a list around it.
        return tuple(_use(**entry) for entry in content.get("calibrations", [content]))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the images that the checkpoint has seen ({error}): make the checkpoint again"
        ) from error


def _use(
    purpose: str,
    dataset: str,
    split: str | None,
    image_sha256: list[str],
    images: Sequence[str] = (),
    image_phash: Sequence[str | None] = (),
) -> Use:
    return Use(purpose, dataset, split, tuple(image_sha256), tuple(images), tuple(image_phash))
