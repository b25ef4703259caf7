"""Reuse of a sensitivity analysis: only where all its inputs are the same."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitopt import storage
from vitopt.data.images import ImageSet
from vitopt.environment import machine
from vitopt.errors import RecipeError, RecordError
from vitopt.models.checkpoint import Checkpoint
from vitopt.search.results import SENSITIVITY_SCHEMA, Sensitivity, load_sensitivity

logger = logging.getLogger(__name__)

SENSITIVITY_FILE = "sensitivity.json"
_FINGERPRINT_FILE = "inputs.sha256"


def inputs_of(checkpoint: Checkpoint, images: ImageSet, device: torch.device, **settings: Any) -> dict[str, Any]:
    """All that an analysis depends on, as plain data; formats round differently on other devices and in other code."""
    made_by = storage.sha256_of_json([SENSITIVITY_SCHEMA, machine.provenance(device)])
    return {"checkpoint": checkpoint.fingerprint(), "images": images.sha256, **settings, "made_by": made_by}


def standing(path: Path, inputs: Mapping[str, Any]) -> Sensitivity | None:
    """The result at `path`, if it is of these inputs; which is told."""
    try:
        result = load_sensitivity(path)
    except RecordError:
        return None
    if result.inputs != inputs:
        return None
    logger.warning("%s is of the same checkpoint, images and settings: nothing is scored again", path)
    return result


def taken_over(output: Path, identity: Any) -> Path:
    """The folder beside `output` with what an interrupted analysis of the same inputs left, and nothing of another's.

    `identity`: plain data, all that what is kept there depends on.
    """
    partial = output.with_suffix(".partial")
    fingerprint = storage.sha256_of_json(identity)
    left = partial / _FINGERPRINT_FILE
    if not left.is_file() or left.read_text() != fingerprint:
        with storage.staged_folder(partial) as folder:
            storage.write_text(folder / _FINGERPRINT_FILE, fingerprint)
    return partial


def given(path: Path, inputs: Mapping[str, Any], checkpoint: Checkpoint, images: ImageSet) -> Sensitivity:
    """The result at `path` (or in the folder `path`), which the user wants used for an analysis of these inputs.

    Raises:
        RecordError: there is none.
        RecipeError: it is of other things, and which.
    """
    path = path.expanduser()
    result = load_sensitivity(path / SENSITIVITY_FILE if path.is_dir() else path)
    other = next((key for key, value in inputs.items() if result.inputs.get(key) != value), None)
    if other is None:
        return result
    same_name = result.checkpoint == checkpoint.source
    differences = {
        "checkpoint": f"is of {result.checkpoint}, not of {checkpoint.source}{' as it is now' if same_name else ''}",
        "images": f"is over other images ({result.dataset}) than the {len(images):,} of {images.name}",
        "made_by": "was made by other code or libraries, or on another device",
    }
    asked = f"has {other} {result.inputs.get(other)}, and {inputs[other]} is asked for"
    raise RecipeError(f"{path} {differences.get(other, asked)}: analyse again, or leave it out")
