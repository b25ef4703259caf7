"""A stage of a run: skipped while what it depends on and what it left stand, done anew otherwise.

A run's folder notes in `stages.json` the fingerprint of every stage that was completed there. A changed input changes
the fingerprint of its stage and of all that depend on it.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from vitopt import ownership, storage
from vitopt.environment import launch, machine
from vitopt.errors import RecordError, VitoptError

STAGES_FILE = "stages.json"

T = TypeVar("T")


@dataclass(frozen=True)
class Stage(Generic[T]):
    """One step of a run.

    `inputs`: plain data, all that the product depends on. What was made on one device stands on another; figures do
    not, and name the device that they are `measured_on`. `files`: what the stage leaves, when it is complete.
    `work` makes the product, in every process of a distributed launch or in the main one `alone`, and returns what
    there is to tell of it; `task` is told before. `read` opens the product; a RecordError means that it has to be made
    again. An error of a `tolerated` type leaves the run without this product, and the run goes on.
    """

    name: str
    inputs: Sequence[Any]
    files: Sequence[Path]
    work: Callable[[], str | None]
    read: Callable[[], T]
    task: str | None = None
    measured_on: torch.device | None = None
    alone: bool = False
    tolerated: tuple[type[VitoptError], ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for the same inputs, made by the same code and libraries."""
        return storage.sha256_of_json([*self.inputs, machine.provenance(self.measured_on)])


@dataclass
class RunFolder:
    """The folder of a run and the stages that were completed there; `say` tells what becomes of each."""

    path: Path
    say: Callable[[str], None]
    completed: dict[str, str] = field(init=False)  # name of a stage -> its fingerprint

    def __post_init__(self) -> None:
        self.completed = _read_completed(self.path / STAGES_FILE)

    def variant(self, name: str) -> Path:
        """The folder of a variant's checkpoint and record."""
        return self.path / "variants" / name

    def carry_out(self, stage: Stage[Any]) -> str | None:
        """Do a stage unless it stands; the reason where it could not be done, None where its product is there.

        Raises:
            VitoptError: of the stage's work, unless it tolerates this type.
        """
        if self._stands(stage):
            return None
        self._tell(stage, stage.task)
        reason = None
        if launch.is_main_process() or not stage.alone:
            try:
                self._tell(stage, stage.work())
            except stage.tolerated as error:
                reason = str(error)
        reason = launch.gather_objects(reason)[0]  # nobody reads before the main process has written
        if reason is None:
            self.completed[stage.name] = stage.fingerprint
            self._save()
        else:
            self.forget(stage.name)
            self._tell(stage, reason)
        return reason

    def forget(self, name: str) -> None:
        """The stage stands no more, whatever becomes of the work on it."""
        if self.completed.pop(name, None) is not None:
            self._save()

    def _tell(self, stage: Stage[Any], text: str | None) -> None:
        if text is not None:
            self.say(f"{stage.name}: {text}")

    def _stands(self, stage: Stage[Any]) -> bool:
        """Whether a stage was completed with the same inputs, and its files are whole and can be read."""
        same = self.completed.get(stage.name) == stage.fingerprint
        spoiled = self._spoiled(stage) if same else None
        # The main process decides for all: another might look while it is already making the product anew.
        same, spoiled = launch.gather_objects((same, spoiled))[0]
        if same:
            self._tell(stage, "up to date, skipped" if spoiled is None else f"again, because {spoiled}")
        return same and spoiled is None

    def _spoiled(self, stage: Stage[Any]) -> str | None:
        for file in stage.files:
            if not ownership.is_whole(file):
                return f"{file.relative_to(self.path)} is {'damaged' if file.exists() else 'missing'}"
        try:
            stage.read()
        except RecordError as error:
            return str(error)
        return None

    def _save(self) -> None:
        if launch.is_main_process():
            storage.write_json(self.path / STAGES_FILE, self.completed)


def _read_completed(file: Path) -> dict[str, str]:
    """What is noted in `stages.json`; nothing where it is missing or broken, which costs time and nothing else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
