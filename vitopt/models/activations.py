"""How large the inputs of a checkpoint's layers are over calibration images. Kept beside the weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vitopt import storage
from vitopt.errors import CheckpointError

ACTIVATIONS_FILE = "activations.json"
_SCHEMA = "vitopt.activations/1"


@dataclass(frozen=True)
class LayerInputs:
    """`largest`: magnitude of a layer's inputs. `noise`: format -> share of their squares that is lost where one scale,
    made for the largest, quantizes them all."""

    largest: float
    noise: dict[str, float]


def save_activations(layers: Mapping[str, LayerInputs], folder: Path) -> None:
    """Write `activations.json` into a checkpoint's folder; `layers` by their logical names. Nothing where none is."""
    if layers:
        content = {"schema": _SCHEMA, "layers": {name: asdict(one) for name, one in layers.items()}}
        storage.write_json(folder / ACTIVATIONS_FILE, content)


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
        return {name: _inputs(**one) for name, one in content["layers"].items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as what its layers take ({error}): make the checkpoint again"
        ) from error


def _inputs(largest: float, noise: dict[str, float]) -> LayerInputs:
    numbers = [largest, *noise.values()]
    if not all(isinstance(number, float | int) and 0 <= number < float("inf") for number in numbers):
        raise ValueError("sizes of inputs must be numbers from 0 on")
    return LayerInputs(float(largest), noise)
