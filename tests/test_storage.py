import errno
import hashlib
import json
import math
import os
from pathlib import Path

import pytest

from vitopt import storage
from vitopt.errors import StorageError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The folder of an earlier result."""
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "extra.txt").write_text("old")
    return folder


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


def test_an_empty_folder_and_a_failed_variant_are_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "record.json").write_text("{}")
    for name in ("empty", "failed"):
        with storage.staged_folder(tmp_path / name) as folder:
            (folder / "config.json").write_text("new")
        assert names(tmp_path / name) == {"config.json"}


def test_a_folder_that_is_no_earlier_result_is_never_deleted(tmp_path):
    target = tmp_path / "photos"
    (target / "holiday").mkdir(parents=True)
    with pytest.raises(StorageError) as caught, storage.staged_folder(target) as folder:
        (folder / "config.json").write_text("new")
    assert str(caught.value) == (
        f"{target} holds holiday, which is no earlier result and would be deleted: choose another --output"
    )
    assert names(target) == {"holiday"}
    assert names(tmp_path) == {"photos"}


def test_what_a_killed_run_left_is_in_nobodys_way(earlier):
    # In a container the next run may well have the same process id.
    for kind in ("partial", "old"):
        left = earlier.with_name(f".result.{kind}-{os.getpid()}")
        left.mkdir()
        (left / "half").write_text("half")
    with storage.staged_folder(earlier) as folder:
        assert names(folder) == set()
        (folder / "config.json").write_text("new")
    assert names(earlier) == {"config.json"}
    assert names(earlier.parent) == {"result"}


def test_a_link_stays_a_link(earlier, tmp_path):
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(earlier)
    with storage.staged_folder(link) as folder:
        (folder / "config.json").write_text("new")
    assert link.is_symlink()
    assert (earlier / "config.json").read_text() == "new"
    assert names(link.parent) == {"link"}


def test_the_current_folder_can_be_the_target(earlier, monkeypatch):
    monkeypatch.chdir(earlier)
    with storage.staged_folder(Path()) as folder:
        (folder / "config.json").write_text("new")
    assert names(earlier) == {"config.json"}


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
