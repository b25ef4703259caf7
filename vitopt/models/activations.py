"""What the inputs of a checkpoint's layers are over calibration images. Kept beside the weights."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitopt import storage
from vitopt.errors import CheckpointError

ACTIVATIONS_FILE = "activations.json"
_SCHEMA = "vitopt.activations/2"


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The inputs of a layer, or of several that have the same.

    `smallest`, `largest`: (groups, columns). A token that stands before the patches, as the class token, is a group of
    its own; the last group is all patches. `noise`: format -> share of an output's square that scales made of this
    lose, a mean over the tokens of the group that loses most.
    """

    smallest: torch.Tensor
    largest: torch.Tensor
    noise: dict[str, float]


def save_activations(layers: Mapping[str, LayerInputs], folder: Path) -> None:
    """Write `activations.json` into a checkpoint's folder; `layers` by their logical names. Nothing where none is."""
    if not layers:
        return
    entries: dict[int, dict[str, Any]] = {}
    for name, one in layers.items():
        entry = entries.setdefault(id(one), {"layers": [], "noise": one.noise})
        entry["layers"].append(name)
        entry |= {"smallest": _rounded(one.smallest), "largest": _rounded(one.largest)}
    # Not indented: a large model has half a million of these numbers.
    text = json.dumps({"schema": _SCHEMA, "inputs": list(entries.values())}, allow_nan=False)
    storage.write_text(folder / ACTIVATIONS_FILE, text + "\n")


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]


def load_activations(folder: Path | None) -> dict[str, LayerInputs]:
    """What was observed of the checkpoint in `folder`; nothing without a folder or the file.

    Raises:
        CheckpointError: the file is there and cannot be read.
    """
    path = folder / ACTIVATIONS_FILE if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"its schema is not {_SCHEMA}")
        return {name: one for entry in content["inputs"] for one in [_inputs(entry)] for name in entry["layers"]}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as what its layers take ({error}): make the checkpoint again"
        ) from error


def _inputs(entry: Any) -> LayerInputs:
    smallest, largest = (torch.tensor(entry[key], dtype=torch.float32) for key in ("smallest", "largest"))
    noise = dict(entry["noise"])
    fits = smallest.dim() == 2 and smallest.shape == largest.shape and smallest.numel() > 0
    if not (fits and torch.isfinite(smallest).all() and torch.isfinite(largest).all() and (smallest <= largest).all()):
        raise ValueError("each column takes finite numbers from `smallest` to `largest`")
    if not all(math.isfinite(share) and share >= 0 for share in noise.values()):
        raise ValueError("noise must be numbers from 0 on")
    return LayerInputs(smallest, largest, noise)
