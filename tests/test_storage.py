import contextlib
import errno
import hashlib
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitopt import ownership, storage
from vitopt.errors import StorageError


def names(folder: Path) -> set[str]:
    """What lies in a folder, beside vitopt's list of its own files."""
    return {path.name for path in folder.iterdir()} - {ownership.LIST_FILE}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The folder of an earlier result."""
    with storage.staged_folder(tmp_path / "result") as folder:
        (folder / "config.json").write_text("old")
        (folder / "extra.txt").write_text("old")
    return tmp_path / "result"


def test_a_staged_folder_appears_when_complete(tmp_path):
    target = tmp_path / "a" / "b" / "result"
    with storage.staged_folder(target) as folder:
        (folder / "config.json").write_text("new")
        assert folder.parent == target.parent
        assert not target.exists()
    assert (target / "config.json").read_text() == "new"
    assert names(target.parent) == {"result"}


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_nothing_behind(tmp_path, failure):
    with pytest.raises(type(failure)), storage.staged_folder(tmp_path / "result") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "half").write_text("half")
        raise failure
    assert names(tmp_path) == set()


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failure_leaves_the_earlier_folder_as_it_was(earlier, failure):
    with pytest.raises(type(failure)), storage.staged_folder(earlier) as folder:
        (folder / "config.json").write_text("new")
        raise failure
    assert names(earlier.parent) == {"result"}
    assert (earlier / "config.json").read_text() == "old"


def test_an_earlier_folder_is_replaced_whole(earlier):
    with storage.staged_folder(earlier) as folder:
        (folder / "config.json").write_text("new")
        assert (earlier / "config.json").read_text() == "old"
    assert names(earlier) == {"config.json"}
    assert (earlier / "config.json").read_text() == "new"
    assert names(earlier.parent) == {"result"}


def test_the_earlier_folder_comes_back_if_the_new_one_cannot_be_moved_in(earlier, monkeypatch):
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with (
        pytest.raises(StorageError, match="Permission denied; choose another --output"),
        storage.staged_folder(earlier) as folder,
    ):
        (folder / "config.json").write_text("new")
    assert (earlier / "config.json").read_text() == "old"
    assert names(earlier.parent) == {"result"}


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    with storage.staged_folder(tmp_path / "empty") as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path / "empty") == {"config.json"}


def test_what_a_folder_above_lists_is_replaced(tmp_path):
    with storage.claimed(tmp_path / "run"):
        failed = tmp_path / "run" / "variants" / "failed"
        storage.write_json(failed / "record.json", {})
        with storage.staged_folder(failed) as folder:
            (folder / "config.json").write_text("new")
    assert names(failed) == {"config.json"}


# What vitopt did not write


def project(folder: Path) -> None:
    (folder / "src").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "record.json").write_text("{}")
    (folder / "src" / "main.py").write_text("mine")


def photos(folder: Path) -> None:
    (folder / "holiday").mkdir(parents=True)


def result_with_notes(folder: Path) -> None:
    with storage.staged_folder(folder) as staged:
        (staged / "config.json").write_text("ours")
    (folder / "notes.txt").write_text("mine")


def result_with_notes_below(folder: Path) -> None:
    result_with_notes(folder)
    (folder / "deep" / "down").mkdir(parents=True)
    (folder / "notes.txt").rename(folder / "deep" / "down" / "notes.txt")


def result_with_a_link(folder: Path) -> None:
    result_with_notes(folder)
    (folder / "notes.txt").unlink()
    (folder / "data").symlink_to(folder.parent)


def result_with_another(folder: Path) -> None:
    result_with_notes(folder)
    (folder / "notes.txt").unlink()
    with storage.claimed(folder / "evaluation"):
        storage.write_json(folder / "evaluation" / "record.json", {})


def result_of_an_older_version(folder: Path) -> None:
    result_with_notes(folder)
    (folder / "notes.txt").unlink()
    (folder / ownership.LIST_FILE).unlink()


def broken_list(folder: Path) -> None:
    result_of_an_older_version(folder)
    (folder / ownership.LIST_FILE).write_text('{"files": ')


@pytest.mark.parametrize(
    ("make", "foreign"),
    [
        (project, "config.json"),
        (photos, "holiday"),
        (result_with_notes, "notes.txt"),
        (result_with_notes_below, "deep/down/notes.txt"),
        (result_with_a_link, "data"),
        (result_with_another, "evaluation"),
        (result_of_an_older_version, "config.json"),
        (broken_list, "config.json"),
    ],
)
def test_a_folder_with_anything_else_is_never_replaced(tmp_path, make, foreign):
    target = tmp_path / "target"
    make(target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    expected = f"{target} holds {foreign}, which is not part of a vitopt result"
    with pytest.raises(StorageError, match=re.escape(expected)), storage.staged_folder(target):
        pytest.fail("the work began")
    with pytest.raises(StorageError, match=re.escape(expected)):
        storage.remove(target)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == {"target"}


def test_a_file_that_is_added_during_the_work_is_never_deleted(earlier):
    with pytest.raises(StorageError, match=r"holds notes.txt"), storage.staged_folder(earlier) as folder:
        (folder / "config.json").write_text("new")
        (earlier / "notes.txt").write_text("mine")
    assert names(earlier) == {"config.json", "extra.txt", "notes.txt"}
    assert (earlier / "config.json").read_text() == "old"


@pytest.mark.parametrize("place", [".", "..", "~", "~/..", "/"])
def test_current_and_home_folder_and_those_above_are_refused(tmp_path, monkeypatch, place):
    (tmp_path / "home" / "me").mkdir(parents=True)
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    monkeypatch.chdir(tmp_path / "work" / "here")
    target = Path(place).expanduser()
    for entered in (storage.staged_folder, storage.claimed):
        with pytest.raises(StorageError, match="choose a folder of its own"), entered(target):
            pytest.fail("the work began")


@pytest.mark.parametrize("place", ["model", "model/out", "."])
def test_an_output_on_its_input_is_refused(tmp_path, place):
    model = tmp_path / "model"
    with storage.staged_folder(model) as folder:
        (folder / "config.json").write_text("ours")
    for entered in (storage.reserved, storage.claimed):
        with (
            pytest.raises(StorageError, match=f"the input {model}"),
            entered(tmp_path / place, None, "org/name", model),
        ):
            pytest.fail("the work began")
    with storage.reserved(tmp_path / "other", model, "org/name"):
        pass
    assert names(tmp_path) == {"model"}


# Folders that are filled file by file


def test_a_claimed_folder_lists_what_is_written(tmp_path):
    folder = tmp_path / "a" / "run"
    with storage.claimed(folder):
        storage.write_text(folder / "recipe.yaml", "name: x\n")
        storage.write_text(folder / "plots" / "latency.svg", "<svg/>")
    assert ownership.listed_files(folder) == {"plots/latency.svg": 6, "recipe.yaml": 8}
    assert {path.name for path in folder.iterdir()} == {"recipe.yaml", "plots", ownership.LIST_FILE}
    (folder / "notes.txt").write_text("mine")  # beside what vitopt writes a user's file is in nobody's way
    with storage.claimed(folder):
        storage.write_text(folder / "recipe.yaml", "name: longer\n")
    assert ownership.listed_files(folder)["recipe.yaml"] == 13
    assert names(folder) == {"recipe.yaml", "plots", "notes.txt"}


def test_a_claimed_folder_without_results_is_left_as_it_was(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new/deep"):
        with pytest.raises(ValueError, match="refused"), storage.claimed(tmp_path / name):
            raise ValueError("refused")
    assert names(tmp_path) == {"there"}
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize("make", [project, photos, result_of_an_older_version, broken_list])
def test_a_folder_of_others_cannot_be_claimed(tmp_path, make):
    make(tmp_path / "target")
    with (
        pytest.raises(StorageError, match="not part of a vitopt result"),
        storage.claimed(tmp_path / "target"),
    ):
        pytest.fail("the work began")


def test_a_file_of_others_is_never_overwritten(tmp_path):
    folder = tmp_path / "run"
    with storage.claimed(folder):
        storage.write_text(folder / "stages.json", "{}")
        (folder / "report.md").write_text("mine")
        with pytest.raises(StorageError, match=r"report.md exists and vitopt did not write it"):
            storage.write_text(folder / "report.md", "ours")
        with pytest.raises(StorageError, match=r"report.md .* vitopt did not write"):
            storage.remove(folder / "report.md")
    assert (folder / "report.md").read_text() == "mine"
    with (
        pytest.raises(StorageError, match=r"report.md exists and vitopt did not write it"),
        storage.claimed(folder, files=["stages.json", "./report.md"]),
    ):
        pytest.fail("the work began")


def test_an_output_that_cannot_be_made_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for entered in (storage.reserved, storage.claimed):
        for place in ("file", "file/below"):
            with pytest.raises(StorageError, match="a file is in the way"), entered(tmp_path / place):
                pytest.fail("the work began")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(storage.FileLock, "acquire", refuse)
    for entered in (storage.reserved, storage.claimed):
        with pytest.raises(StorageError, match="Read-only file system"), entered(tmp_path / "there"):
            pytest.fail("the work began")
    assert names(tmp_path) == {"file", "there"}


def test_a_new_file_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    for name, words in (("file", "exists"), ("file/below.json", "in the way"), ("a" * 300, "too long")):
        with pytest.raises(StorageError, match=words), storage.new_file(tmp_path / name):
            pytest.fail("the work began")
    with storage.new_file(tmp_path / "new" / "found.json"):
        storage.write_json(tmp_path / "new" / "found.json", 1)
    with pytest.raises(ValueError), storage.new_file(tmp_path / "other" / "found.json"):
        raise ValueError
    assert names(tmp_path) == {"file", "new"} and names(tmp_path / "new") == {"found.json"}


def test_removing_takes_it_off_the_list(tmp_path):
    folder = tmp_path / "run"
    with storage.claimed(folder):
        for name in ("plots/a.svg", "plots/b.svg", "stages.json"):
            storage.write_text(folder / name, name)
        storage.remove(folder / "plots" / "a.svg")
        assert set(ownership.listed_files(folder)) == {"plots/b.svg", "stages.json"}
        storage.remove(folder / "plots")
        storage.remove(folder / "never")
        assert set(ownership.listed_files(folder)) == {"stages.json"}
    assert names(folder) == {"stages.json"}


# Whole or not


def test_a_file_is_whole_as_long_as_it_has_its_size(earlier):
    path = earlier / "config.json"
    assert ownership.is_whole(path)
    path.write_text("ol")
    assert not ownership.is_whole(path)
    path.unlink()
    assert not ownership.is_whole(path)
    (earlier / "notes.txt").write_text("mine")
    assert not ownership.is_whole(earlier / "notes.txt")


def test_a_folder_that_is_no_longer_whole_is_not_copied(earlier, tmp_path):
    (earlier / "extra.txt").write_text("cut short"[:1])
    with pytest.raises(StorageError, match=r"extra.txt is missing or damaged"):
        storage.copy_folder(earlier, tmp_path / "copy")
    storage.copy_folder(earlier, tmp_path / "copy", leave_out=("extra.txt",))
    assert names(tmp_path / "copy") == {"config.json"}


# Cards, which people edit


def staged_card(target: Path, text: str) -> Path:
    with storage.staged_folder(target) as folder:
        (folder / "README.md").write_text(text)
        (folder / "config.json").write_text(text)
    return target / "README.md"


def test_a_card_that_was_edited_outlives_its_folder_and_one_that_was_not_goes(tmp_path):
    target = tmp_path / "result"
    card = staged_card(target, ownership.sealed("# one\n"))
    staged_card(target, ownership.sealed("# two\n"))
    assert card.read_text().startswith("# two")
    card.write_text(card.read_text().replace("two", "TWO"))
    mine = card.read_text()
    for _ in range(2):  # it stays vitopt's to replace, and the user's to read
        staged_card(target, ownership.sealed("# three\n"))
        assert card.read_text() == mine
        assert (target / "config.json").read_text().startswith("# three")
    with storage.staged_folder(target) as folder:
        (folder / "config.json").write_text("four")
    assert card.read_text() == mine and ownership.first_foreign(target) is None


def test_a_kept_card_does_not_change_the_one_that_was_copied(tmp_path):
    source = staged_card(tmp_path / "source", ownership.sealed("# source\n"))
    mine = staged_card(tmp_path / "copy", "# mine\n")
    storage.copy_folder(tmp_path / "source", tmp_path / "copy")
    assert mine.read_text() == "# mine\n"
    assert source.read_text() == ownership.sealed("# source\n")


@pytest.mark.parametrize("edit", [lambda card: card.write_text("# mine, and longer than before\n"), Path.unlink])
def test_a_folder_whose_card_was_edited_or_deleted_is_copied(tmp_path, edit):
    edit(staged_card(tmp_path / "source", ownership.sealed("# one\n")))
    storage.copy_folder(tmp_path / "source", tmp_path / "copy")
    assert names(tmp_path / "copy") == names(tmp_path / "source")


@pytest.mark.parametrize("text", ["# a\n", "", "# a", "# a\n<!-- mine -->\n", "# ä\n"])
def test_a_seal_comes_off_and_breaks_with_the_text(tmp_path, text):
    card = tmp_path / "README.md"
    assert not ownership.is_edited(card)
    card.write_bytes(ownership.sealed(text).encode())
    assert not ownership.is_edited(card) and ownership.unsealed(ownership.sealed(text)) == text
    card.write_bytes(ownership.sealed(text).encode() + b"more")
    assert ownership.is_edited(card)
    card.write_bytes(b"x" + ownership.sealed(text).encode())
    assert ownership.is_edited(card)
    card.write_bytes(b"\xff\xfe")
    assert ownership.is_edited(card)


def test_content_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """Every rename comes after the fsync of what it names, and before the fsync of the folder that holds the name."""
    seen: list[tuple[str, str]] = []
    sync, rename, replace = storage._sync, Path.rename, Path.replace
    monkeypatch.setattr(storage, "_sync", lambda path: (seen.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda s, t: (seen.append(("rename", s.name)), rename(s, t))[1])
    monkeypatch.setattr(Path, "replace", lambda s, t: (seen.append(("rename", s.name)), replace(s, t))[1])
    storage.write_text(tmp_path / "record.json", "{}")
    partial = f".record.json.partial-{os.getpid()}"
    assert seen == [("sync", partial), ("rename", partial), ("sync", tmp_path.name)]
    seen.clear()
    with storage.staged_folder(tmp_path / "result") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_text("1")
        seen.clear()
    staged = ("rename", folder.name)
    before, after = seen[: seen.index(staged)], seen[seen.index(staged) + 1 :]
    assert {("sync", name) for name in ("sub", "weights", ownership.LIST_FILE, folder.name)} <= set(before)
    assert after == [("sync", tmp_path.name)]


# One writer at a time

HOLD = """
import sys
from pathlib import Path
from vitopt import storage
with getattr(storage, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_by_another(how: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, how, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("how", ["claimed", "reserved", "staged_folder"])
def test_a_folder_in_use_is_refused_and_its_holder_named(tmp_path, how):
    target = tmp_path / "out"
    with held_by_another(how, target) as process:
        with pytest.raises(StorageError) as caught, getattr(storage, how)(target):
            pytest.fail("the work began")
        assert str(caught.value).startswith(f"{target} is in use by process {process.pid} on {socket.gethostname()}:")
    with getattr(storage, how)(target):  # a killed process holds nothing
        pass


def test_the_holder_may_enter_again_and_leaves_no_lock_behind(tmp_path):
    with storage.reserved(tmp_path / "out"):
        with storage.staged_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text("new")
        assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.lock"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_killed_runs_left_is_removed(earlier):
    # In a container the next run may well have the same process id.
    for number in (os.getpid(), os.getpid() + 1):
        for kind in ("partial", "old"):
            left = earlier.with_name(f".result.{kind}-{number}")
            left.mkdir()
            (left / "half").write_text("half")
    others = earlier.with_name(".result2.partial-1")
    others.mkdir()
    with storage.staged_folder(earlier) as folder:
        assert names(folder) == set()
        (folder / "config.json").write_text("new")
    assert names(earlier) == {"config.json"}
    assert names(earlier.parent) == {"result", others.name}


def test_a_link_stays_a_link(earlier, tmp_path):
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(earlier)
    with storage.staged_folder(link) as folder:
        (folder / "config.json").write_text("new")
    assert link.is_symlink()
    assert (earlier / "config.json").read_text() == "new"
    assert names(link.parent) == {"link"}


def test_a_file_in_the_way_is_refused_before_the_work(tmp_path):
    target = tmp_path / "result"
    target.write_text("mine")
    with pytest.raises(StorageError) as caught, storage.staged_folder(target):
        pytest.fail("the work began")
    assert str(caught.value) == f"cannot write {target}: a file is in the way; choose another --output"
    assert target.read_text() == "mine"
    with pytest.raises(StorageError, match="a file is in the way"), storage.staged_folder(target / "below"):
        pytest.fail("the work began")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full while writing {target}: free some space and run it again"),
        (errno.EDQUOT, "the disk is full while writing {target}: free some space and run it again"),
        (errno.EACCES, "cannot write {target}: Permission denied; choose another --output"),
        (errno.EROFS, "cannot write {target}: Read-only file system; choose another --output"),
        (errno.EBUSY, "cannot replace {target}: it is a mount point; choose a folder below it"),
    ],
)
def test_refusals_of_the_system_are_explained(tmp_path, number, words):
    target = tmp_path / "result"
    with pytest.raises(StorageError) as caught, storage.staged_folder(target):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == words.format(target=target)
    assert names(tmp_path) == set()


def test_other_system_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), storage.staged_folder(tmp_path / "result"):
        (tmp_path / "absent").read_text()


def test_writing_replaces_in_one_step_and_makes_parents(tmp_path):
    path = tmp_path / "a" / "b.bin"
    storage.write_bytes(path, b"one")
    storage.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    storage.write_text(path, "größe\n")
    assert path.read_bytes() == "größe\n".encode()
    assert names(path.parent) == {"b.bin"}


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_text("old")
    write = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        write(self, content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(StorageError) as caught:
        storage.write_text(path, "new")
    assert str(caught.value) == f"the disk is full while writing {path}: free some space and run it again"
    assert path.read_text() == "old"
    assert names(tmp_path) == {"record.json"}


def test_files_and_folders_in_the_way_of_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError) as caught:
        storage.write_text(tmp_path / "file" / "record.json", "x")
    assert str(caught.value) == (
        f"cannot write {tmp_path}/file/record.json: a file is in the way; choose another --output"
    )
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError) as caught:
        storage.write_text(tmp_path / "folder", "x")
    assert str(caught.value) == f"cannot write {tmp_path}/folder: a folder is in the way; choose another --output"
    assert names(tmp_path) == {"file", "folder"}


def test_write_json_is_readable_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    storage.write_json(path, {"b": [1, None], "a": 0.5})
    assert path.read_text() == '{\n  "b": [\n    1,\n    null\n  ],\n  "a": 0.5\n}\n'
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            storage.write_json(path, {"a": number})
    assert json.loads(path.read_text())["a"] == 0.5


def test_copy_folder_takes_no_space_and_is_independent(earlier, tmp_path):
    (earlier / "sub").mkdir()
    (earlier / "sub" / "weights").write_bytes(b"123")
    copy = tmp_path / "copy"
    storage.copy_folder(earlier, copy)
    assert names(copy) == names(earlier)
    assert (copy / "sub" / "weights").samefile(earlier / "sub" / "weights")
    storage.write_text(copy / "config.json", "changed")
    (copy / "extra.txt").unlink()
    assert (earlier / "config.json").read_text() == "old"
    assert (earlier / "extra.txt").read_text() == "old"


def test_copy_folder_copies_where_there_are_no_hard_links(earlier, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    storage.copy_folder(earlier, tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_text() == "old"
    assert not (tmp_path / "copy" / "config.json").samefile(earlier / "config.json")


def test_copy_folder_follows_the_links_of_a_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    copy = tmp_path / "elsewhere" / "deep" / "down" / "copy"
    storage.copy_folder(snapshot, copy)
    assert (copy / "model.safetensors").read_text() == "weights"
    assert not (copy / "model.safetensors").is_symlink()


def test_hashes(tmp_path):
    content = b"vit" * 1_000_000
    (tmp_path / "f").write_bytes(content)
    assert storage.sha256_of_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()
    assert storage.sha256_of_json({"a": 1, "b": [2]}) == hashlib.sha256(b'{"a": 1, "b": [2]}').hexdigest()
    assert storage.sha256_of_json({"b": [2], "a": 1}) == storage.sha256_of_json({"a": 1, "b": [2]})
    assert storage.sha256_of_json([1, 2]) != storage.sha256_of_json([2, 1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.sha256_of_json(math.nan)


def test_a_temporary_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(storage.tempfile, "gettempdir", refuse)
    with pytest.raises(StorageError, match="temporary folder"), storage.temporary_folder():
        pass


def test_a_temporary_folder_that_fills_is_named_and_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    full = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(StorageError, match=f"the disk is full while writing {tmp_path}"), storage.temporary_folder():
        raise full
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_finished_is_not_begun(tmp_path):
    storage.require_space(tmp_path, 1)
    with pytest.raises(StorageError, match=r"1,000,000,000,000,000,000 bytes are needed") as caught:
        storage.require_space(tmp_path, 10**18)
    assert str(tmp_path) in str(caught.value)
