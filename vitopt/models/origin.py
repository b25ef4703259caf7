"""Where a checkpoint comes from: its base model on the hub, that one's licence, and all that was done to it.

Kept beside the weights, without local paths, so that what is made of a checkpoint can still name them.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from vitopt import __version__, storage
from vitopt.errors import CheckpointError
from vitopt.models import hub
from vitopt.models.checkpoint import Checkpoint
from vitopt.ownership import CARD_FILE

ORIGIN_FILE = "origin.json"
FINETUNE, QUANTIZE = "finetune", "quantize"
_SCHEMA = "vitopt.origin/1"


@dataclass(frozen=True)
class Origin:
    """`base_model`: hub id, None where the source named none; `base_revision`: its commit. `license`, `license_name`
    and `license_link` are what the base's model card states, None where it states nothing. `steps`: what was done, in
    order; each has its kind as `step`, the version of `vitopt`, and its settings.
    """

    base_model: str | None = None
    base_revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    steps: tuple[dict[str, Any], ...] = ()

    def last(self, step: str) -> dict[str, Any] | None:
        """The settings of the last step of this kind, None where there was none."""
        return next((noted for noted in reversed(self.steps) if noted["step"] == step), None)


def note_origin(checkpoint: Checkpoint, folder: Path, step: str, **settings: Any) -> None:
    """Note in `folder` where `checkpoint` comes from, and the `step` that made of it what is in `folder`.

    Raises:
        CheckpointError: the note beside `checkpoint` cannot be read.
    """
    before = origin_of(checkpoint)
    after = replace(before, steps=(*before.steps, {"step": step, **settings, "vitopt": __version__}))
    storage.write_json(folder / ORIGIN_FILE, {"schema": _SCHEMA, **asdict(after)})


def origin_of(checkpoint: Checkpoint) -> Origin:
    """The note beside a checkpoint; without one, what its model card says.

    Raises:
        CheckpointError: the note cannot be read.
    """
    folder = checkpoint.folder
    if folder is not None:
        if (folder / ORIGIN_FILE).is_file():
            return load_origin(folder)
        card = _metadata(folder / CARD_FILE)
        return Origin(_hub_id(card.get("base_model")), None, **_license(card))
    if checkpoint.revision is None:
        return Origin()
    try:
        file = hub.fetch(checkpoint.source, CARD_FILE, checkpoint.revision)
    except CheckpointError:
        file = None  # the model was opened; its card alone is refused
    return Origin(checkpoint.source, checkpoint.revision, **_license(_metadata(file)))


def load_origin(folder: Path) -> Origin:
    """The note in a checkpoint's folder; an empty one where there is none.

    Raises:
        CheckpointError: it is there and cannot be read.
    """
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return Origin()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema") != _SCHEMA:
            raise ValueError(f"its schema is not {_SCHEMA}")
        return Origin(**content | {"steps": tuple(content["steps"])})
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the origin of the checkpoint ({error}): make the checkpoint again"
        ) from error


def _metadata(card: Path | None) -> dict[str, Any]:
    """The metadata of a model card; nothing where there is no card, or none that can be read."""
    try:
        return (card and metadata_load(card)) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _license(card: dict[str, Any]) -> dict[str, Any]:
    stated = {key: card.get(key) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in stated.items() if isinstance(value, str)}


def _hub_id(base: Any) -> str | None:
    """The one hub id that a card names as its base; None for several, and for a path."""
    if isinstance(base, list) and len(base) == 1:
        base = base[0]
    return base if isinstance(base, str) and hub.is_repo_id(base) and not Path(base).exists() else None
