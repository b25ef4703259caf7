"""Files that are either complete or absent: atomic writes, staged folders, content hashes."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitopt.errors import StorageError


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one line that names the target and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"the disk is full while writing {target}: free some space and run it again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"cannot write {target}: {error.strerror}; choose another --output") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise StorageError(f"cannot write {target}: a file is in the way; choose another --output") from error
        if error.errno == errno.EISDIR:
            raise StorageError(f"cannot write {target}: a folder is in the way; choose another --output") from error
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise StorageError(f"cannot replace {target}: it is a mount point; choose a folder below it") from error
        raise


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target` that replaces it on success and vanishes on any failure.

    An earlier result at `target` stays untouched until the new one is complete; anything else that is there
    stays for good.

    Raises:
        StorageError: the disk is full, the place is not writable, or it holds something else.
    """
    place = target.resolve()  # a link stays a link, and `.` gets a name
    temporary = place.with_name(f".{place.name}.partial-{os.getpid()}")
    _refuse_file(target)
    with _explained(target):
        # In a container each run may have the same process id: what a killed one left is not ours to keep.
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            yield temporary
            require_replaceable(target, {entry.name for entry in temporary.iterdir()})
            _replace_folder(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def require_replaceable(target: Path, names: set[str]) -> None:
    """Refuse a target that a result with files `names` must not replace; long work asks before it begins.

    Replacing a folder deletes what it holds, so it must look like an earlier result: share a file name.

    Raises:
        StorageError: the target is a file, or a folder that holds something else.
    """
    _refuse_file(target)
    held = {entry.name for entry in target.iterdir()} if target.exists() else set()
    # All that a variant which could not be made leaves behind is its record.
    if held and not held & (names | {"record.json"}):
        raise StorageError(
            f"{target} holds {min(held)}, which is no earlier result and would be deleted: choose another --output"
        )


def _refuse_file(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise StorageError(f"cannot write {target}: a file is in the way; choose another --output")


def _replace_folder(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    # A folder cannot be renamed over a filled one, so the old one steps aside first.
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step, creating parents. Raises StorageError as `staged_folder` does."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with _explained(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text to `path` in one step."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in one step; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder as hard links where the file system has them: a copy of a checkpoint takes no space."""

    def link(original: str, copy: str) -> None:
        try:
            # The hub's cache is made of relative links, which mean nothing elsewhere.
            os.link(os.path.realpath(original), copy)
        except OSError:
            shutil.copy2(original, copy)

    with staged_folder(target) as folder:
        shutil.copytree(source, folder, copy_function=link, dirs_exist_ok=True)


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex digest of a JSON value, the same for equal values whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
