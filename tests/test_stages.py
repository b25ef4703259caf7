"""A stage is done once; it is done again where its inputs changed or its product is not whole, and says so."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vitopt import storage
from vitopt.environment import devices, launch, machine
from vitopt.errors import CheckpointError, RecordError, UnsupportedError
from vitopt.stages import STAGES_FILE, RunFolder, Stage


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with storage.claimed(tmp_path / "run"):
        yield tmp_path / "run"


def stage(folder: Path, *inputs: Any, **changes: Any) -> Stage[str]:
    """Writes its inputs as JSON into a file, which it reads back."""
    file = folder / "product.json"
    fields: dict[str, Any] = {
        "name": "make",
        "inputs": inputs,
        "files": [file],
        "work": lambda: storage.write_json(file, inputs),
        "read": file.read_text,
    }
    return Stage(**fields | changes)


def carried_out(folder: Path, one: Stage[str]) -> list[str]:
    """What is said where a process opens the folder and carries out this stage."""
    said: list[str] = []
    assert RunFolder(folder, said.append).carry_out(one) is None
    return said


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_a_stage_is_done_once_and_again_for_other_inputs(folder: Path) -> None:
    telling = {"task": "2 things", "measured_on": torch.device("cpu")}
    assert carried_out(folder, stage(folder, 1, **telling)) == ["make: 2 things"]
    assert carried_out(folder, stage(folder, 1, **telling)) == ["make: up to date, skipped"]
    assert carried_out(folder, stage(folder, 2, **telling)) == ["make: 2 things"]
    assert json.loads(stage(folder).read()) == [2]
    assert list(json.loads((folder / STAGES_FILE).read_text())) == ["make"]


def test_what_the_work_returns_is_told(folder: Path) -> None:
    def work() -> str:
        storage.write_json(folder / "product.json", [])
        return "done"

    assert carried_out(folder, stage(folder, task="begun", work=work)) == ["make: begun", "make: done"]


@pytest.mark.parametrize(("change", "why"), [(Path.unlink, "missing"), (lambda path: path.write_text(""), "damaged")])
def test_a_product_that_is_not_whole_is_made_again(change: Callable[[Path], Any], why: str, folder: Path) -> None:
    carried_out(folder, stage(folder, 1))
    change(folder / "product.json")
    assert carried_out(folder, stage(folder, 1)) == [f"make: again, because product.json is {why}"]
    assert json.loads(stage(folder).read()) == [1]


def test_a_product_that_cannot_be_read_is_made_again_and_other_errors_are_told(folder: Path) -> None:
    carried_out(folder, stage(folder, 1))
    unreadable = stage(folder, 1, read=raising(RecordError("no record")))
    assert carried_out(folder, unreadable) == ["make: again, because no record"]
    with pytest.raises(CheckpointError, match="broken"):
        carried_out(folder, stage(folder, 1, read=raising(CheckpointError("broken"))))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UnsupportedError("not here")])
def test_a_failed_or_interrupted_stage_leaves_what_was_complete(error: BaseException, folder: Path) -> None:
    carried_out(folder, stage(folder, 1))
    with pytest.raises(type(error)):
        carried_out(folder, stage(folder, 2, work=raising(error), tolerated=(CheckpointError,)))
    assert carried_out(folder, stage(folder, 1)) == ["make: up to date, skipped"]
    assert carried_out(folder, stage(folder, 2)) == []


def test_a_tolerated_error_is_returned_and_the_stage_stands_no_more(folder: Path) -> None:
    carried_out(folder, stage(folder, 1))
    said: list[str] = []
    failing = stage(folder, 2, work=raising(UnsupportedError("not here")), tolerated=(UnsupportedError,))
    assert RunFolder(folder, said.append).carry_out(failing) == "not here"
    assert said == ["make: not here"]
    assert carried_out(folder, stage(folder, 1)) == []


def test_a_stage_that_is_forgotten_is_done_again(folder: Path) -> None:
    carried_out(folder, stage(folder, 1))
    RunFolder(folder, print).forget("make")
    assert carried_out(folder, stage(folder, 1)) == []


@pytest.mark.parametrize(("alone", "worked"), [(True, 0), (False, 1)])
def test_other_processes_note_nothing_and_leave_work_to_the_main_one(
    alone: bool, worked: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "is_main_process", lambda: False)
    done: list[int] = []
    RunFolder(folder, print).carry_out(stage(folder, work=lambda: done.append(1), alone=alone))
    assert len(done) == worked
    assert not (folder / STAGES_FILE).exists()


def test_the_main_process_decides_for_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds the product whole, the main one does not, and fails to make it."""
    carried_out(folder, stage(folder, 1))
    of_main = iter([(True, "it is missing"), "not here"])
    monkeypatch.setattr(launch, "is_main_process", lambda: False)
    monkeypatch.setattr(launch, "gather_objects", lambda own: [next(of_main), own])
    said: list[str] = []
    assert RunFolder(folder, said.append).carry_out(stage(folder, 1, alone=True)) == "not here"
    assert said == ["make: again, because it is missing", "make: not here"]


def test_what_was_made_on_another_device_stands_and_figures_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def prints() -> tuple[str, str]:
        return tuple(stage(Path(), "a", measured_on=on).fingerprint for on in (None, torch.device("cpu")))

    made, figures = prints()
    assert prints() == (made, figures)
    monkeypatch.setattr(devices, "processor_name", lambda: "another processor")
    assert prints()[0] == made and prints()[1] != figures
    monkeypatch.setattr(machine, "code_digest", lambda: "other code")
    assert prints()[0] != made


@pytest.mark.parametrize("broken", ["", "[1, 2]", '{"make": "x'])
def test_a_broken_list_costs_time_and_nothing_else(broken: str, folder: Path) -> None:
    carried_out(folder, stage(folder, 1))
    (folder / STAGES_FILE).write_text(broken)
    assert carried_out(folder, stage(folder, 1)) == []
    assert carried_out(folder, stage(folder, 1)) == ["make: up to date, skipped"]
