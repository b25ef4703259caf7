"""A stage of a run: skipped while its inputs and its product are unchanged, done again otherwise.

A run's folder notes in `stages.json` the fingerprint of every product that was completed there. A changed input changes
the fingerprint of its product and of all that depend on it.
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
class Product(Generic[T]):
    """Something that a run leaves.

    `inputs`: plain data, all that it depends on. What was made on one device stands on another; figures do not, and
    name the device that they are `measured_on`. `files`: what is there when it is complete. `read` opens it; a
    RecordError means that it has to be made again.
    """

    name: str
    inputs: Sequence[Any]
    files: Sequence[Path]
    read: Callable[[], T]
    measured_on: torch.device | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for the same inputs, made by the same code and libraries."""
        return storage.sha256_of_json([*self.inputs, machine.provenance(self.measured_on)])


@dataclass(frozen=True, kw_only=True)
class Stage(Product[T]):
    """One step of a run.

    `work` makes the product, in every process of a distributed launch or in the main one `alone`, and returns what
    there is to tell of it; `task` is told before. An error of a `tolerated` type leaves the run without this product,
    and the run goes on.
    """

    work: Callable[[], str | None]
    task: str | None = None
    alone: bool = False
    tolerated: tuple[type[VitoptError], ...] = ()


@dataclass
class RunFolder:
    """The folder of a run and the products that were completed there; `say` tells what becomes of each."""

    path: Path
    say: Callable[[str], None]
    completed: dict[str, str] = field(init=False)  # name of a product -> its fingerprint

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
        if self.stands(stage):
            self._tell(stage, "up to date, skipped")
            return None
        self._tell(stage, stage.task)
        reason = None
        if launch.is_main_process() or not stage.alone:
            try:
                self._tell(stage, stage.work())
            except stage.tolerated as error:
                reason = str(error)
        reason = launch.gather_objects(reason)[0]  # no process reads before the main one has written
        if reason is None:
            self.note(stage)
        else:
            self.forget(stage.name)
            self._tell(stage, reason)
        return reason

    def note(self, product: Product[Any]) -> None:
        """Note that the product is complete."""
        self.completed[product.name] = product.fingerprint
        self._save()

    def forget(self, name: str) -> None:
        """Note that the product is not complete, so that it is made again."""
        if self.completed.pop(name, None) is not None:
            self._save()

    def stands(self, product: Product[Any]) -> bool:
        """Whether it was completed with the same inputs, and its files are whole and can be read; else why is told."""
        same = self.completed.get(product.name) == product.fingerprint
        spoiled = self._spoiled(product) if same else None
        # The main process decides for all: another might look while it is already making the product anew.
        same, spoiled = launch.gather_objects((same, spoiled))[0]
        self._tell(product, None if spoiled is None else f"again, because {spoiled}")
        return same and spoiled is None

    def _tell(self, product: Product[Any], text: str | None) -> None:
        if text is not None:
            self.say(f"{product.name}: {text}")

    def _spoiled(self, product: Product[Any]) -> str | None:
        for file in product.files:
            if not ownership.is_whole(file):
                return f"{file.relative_to(self.path)} is {'damaged' if file.exists() else 'missing'}"
        try:
            product.read()
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
