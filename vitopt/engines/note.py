"""`engine.json`: what lies in the folder of an engine, and whether it fits the checkpoint beside it."""

import importlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitopt import storage
from vitopt.engines.seal import is_sealed
from vitopt.environment import devices
from vitopt.errors import CheckpointError
from vitopt.formats import Format
from vitopt.models.checkpoint import Checkpoint
from vitopt.recipe import ENGINES, RunSpec

ENGINE_FILE = "engine.json"
_SCHEMA = "vitopt.engine/1"


@dataclass(frozen=True)
class Package:
    """What `engine.json` says: `version` of the engine that the file was made with, `checkpoint`: the fingerprint of
    what it was made of, `calibrated`: whether images fixed its scales, `settings`: how the engine is to run it,
    `device`: the kind of device that it is for, "" for all, `options`: torch's run options that are compiled in,
    `seal`: of a file that is machine code (`vitopt.engines.seal`)."""

    engine: str
    version: str | None
    format: Format
    checkpoint: str
    calibrated: bool
    settings: Mapping[str, Any]
    device: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    seal: str | None = None


def installed_version(engine: str) -> str | None:
    """Version of the engine's package."""
    package = ENGINES[engine].package
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # TensorRT's packages are named after a version of CUDA
        return str(importlib.import_module(package).__version__)


def kind_of_device(engine: str, device: torch.device) -> str:
    """The kind of device that a file made here is for; "" for a file that runs on all."""
    return devices.kind(device) if ENGINES[engine].for_one_device else ""


def options_of(run: RunSpec) -> dict[str, Any]:
    """Torch's run options that the engine compiles in."""
    return run.model_dump(mode="json", include=set(ENGINES[run.engine].options))


def write_note(package: Package, folder: Path) -> None:
    """Write `engine.json`."""
    storage.write_json(folder / ENGINE_FILE, {"schema": _SCHEMA, **asdict(package)})


def read_package(folder: Path) -> Package:
    """What the folder of an engine holds.

    Raises:
        CheckpointError: `engine.json` cannot be read.
    """
    try:
        content = json.loads((folder / ENGINE_FILE).read_text(encoding="utf-8"))
        if content.pop("schema") != _SCHEMA:
            raise ValueError(f"its schema is not {_SCHEMA}")
        return Package(**content)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder / ENGINE_FILE} cannot be read ({error}): make it again") from error


def why_not_used(
    package: Package, file: Path, checkpoint: Checkpoint, device: torch.device, run: RunSpec | None = None
) -> str | None:
    """Why a model `file` beside a checkpoint is not that of this checkpoint, engine and device, or None when it is.

    `run`: how it is to run; None takes it as it was made.
    """
    if package.checkpoint != checkpoint.fingerprint():
        return "the checkpoint beside it has changed since"
    version = installed_version(package.engine)
    if package.version != version:
        return f"{package.engine} {package.version} made it, this is {version}"
    if package.device != (kind := kind_of_device(package.engine, device)):
        return f"it is for {package.device}, this is {kind}"
    if ENGINES[package.engine].for_one_device and not is_sealed(file, package.checkpoint, package.seal):
        return "it is machine code that this user's vitopt did not write"
    if run is not None and package.options != options_of(run):
        return "it was made with other run options"
    return None
