"""Files and folders that are complete or absent, written by one process at a time.

What is written is listed in its folder (`vitopt.ownership`), and only what is listed is replaced or deleted. The
lock on a folder goes when its process ends, however it ends.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vitopt.errors import StorageError
from vitopt.ownership import (
    CARD_FILE,
    LIST_FILE,
    LIST_SCHEMA,
    LOCK_FILE,
    OWN_NAMES,
    entry_of,
    first_foreign,
    is_edited,
    is_listed,
    is_whole,
    listed_files,
    not_ours,
    refuse_file,
    require_apart,
    require_overwritable,
    require_replaceable,
)
from vitopt.paths import existing

_held: set[Path] = set()  # locks of this process, which may enter them again


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one line that names the target and the remedy."""
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageError(f"the disk is full while writing {target}: free some space and run it again") from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"cannot write {target}: {os.strerror(number)}; choose another --output") from error
        if number in (errno.ENOTDIR, errno.EEXIST):
            raise StorageError(f"cannot write {target}: a file is in the way; choose another --output") from error
        if number == errno.EISDIR:
            raise StorageError(f"cannot write {target}: a folder is in the way; choose another --output") from error
        if number in (errno.EBUSY, errno.EXDEV):
            raise StorageError(f"cannot replace {target}: it is a mount point; choose a folder below it") from error
        if number == errno.ENAMETOOLONG:
            raise StorageError(f"cannot write {target}: its name is too long; choose a shorter --output") from error
        raise


def _system_error(error: Exception) -> int | None:
    """The operating system's number of an error; libraries in Rust, as safetensors, tell it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    number = re.search(r"\(os error (\d+)\)", str(error))
    return None if number is None else int(number[1])


def require_space(folder: Path, needed: int) -> None:
    """Refuse work whose result would not fit on the disk.

    Raises:
        StorageError: fewer than `needed` bytes are free where `folder` is.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"the disk is too full for {folder}: {needed:,} bytes are needed and {free:,} are free; free some space"
        )


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for what is not kept, in TMPDIR; gone afterwards.

    Raises:
        StorageError: TMPDIR is full or not writable.
    """
    place = Path(os.environ.get("TMPDIR", "/tmp"))
    try:
        place = Path(tempfile.gettempdir())
    except OSError as error:  # it tries to write a few bytes in each place that it knows
        raise StorageError(f"no temporary folder can be written, first {place}: free some space there") from error
    with _explained(place), tempfile.TemporaryDirectory(prefix="vitopt-", dir=place) as folder:
        yield Path(folder)


# One writer at a time


@contextlib.contextmanager
def _lock(file: Path, target: Path) -> Iterator[None]:
    """Hold the lock `file` of `target`; this process may enter again.

    Raises:
        StorageError: another process holds it, which is named; or the place is not writable.
    """
    if file in _held:
        yield
        return
    lock = FileLock(file, timeout=0)
    with _explained(target):
        try:
            lock.acquire()
        except Timeout:
            raise StorageError(f"{target} is in use by {_holder(file)}: wait, or choose another --output") from None
    try:
        with _explained(target):
            file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
        _held.add(file)
        yield
    finally:
        _held.discard(file)
        file.unlink(missing_ok=True)  # while it is held, so that no other process's lock file is deleted
        lock.release()


def _holder(file: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        process, host = file.read_text(encoding="utf-8").split()
        return f"process {process} on {host}"
    return "another process"


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; on leaving, remove of these what is still empty."""
    with _explained(folder):
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Write into an existing folder while no other process does.

    Raises:
        StorageError: another process does, which is named; or the folder is not writable.
    """
    with _lock(folder.resolve() / LOCK_FILE, folder):
        yield


@contextlib.contextmanager
def claimed(folder: Path, *inputs: str | Path | None, files: Iterable[str] = ()) -> Iterator[None]:
    """Fill a new, empty or earlier folder of vitopt file by file, while no other process does.

    What is there stays, and a file that vitopt did not write is never overwritten; `files` are names below the
    folder that are sure to be written, for which this is found at once. A folder in which nothing is written is
    left as it was.

    Raises:
        StorageError: as `require_replaceable`, though files of others may lie in a folder that has a list; another
            process writes there; or the place is not writable.
    """
    require_apart(folder, inputs)
    refuse_file(folder)
    foreign = first_foreign(folder) if listed_files(folder) is None else None
    if foreign is not None:
        raise StorageError(not_ours(folder, foreign))
    with _folder(folder), locked(folder):
        if listed_files(folder) is None:
            with _explained(folder):
                _write_list(folder, _sizes(folder))
        for name in files:
            require_overwritable(folder / name)
        try:
            yield
        finally:
            if not listed_files(folder):
                (folder / LIST_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def reserved(target: Path, *inputs: str | Path | None) -> Iterator[None]:
    """Work on what will replace the folder `target` whole, while no other process does; see `staged_folder`.

    Raises:
        StorageError: as `require_replaceable`; another process works on it; or the place is not writable.
    """
    require_replaceable(target, *inputs)
    place = target.resolve()
    with _folder(place.parent), _lock(place.with_name(f".{place.name}.lock"), target):
        yield


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[None]:
    """Work on what will be the file `path`, which is not there yet, while no other process does.

    Raises:
        StorageError: it is there, another process works on it, or the place is not writable.
    """
    if existing(path):
        raise StorageError(f"{path} exists already: choose another name")
    place = path.resolve()
    with _folder(place.parent), _lock(place.with_name(f".{place.name}.lock"), path):
        yield


# Writing


def _write_list(folder: Path, files: dict[str, int]) -> None:
    text = json.dumps({"schema": LIST_SCHEMA, "files": dict(sorted(files.items()))}, indent=1) + "\n"
    _replace_file(folder / LIST_FILE, text.encode())


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file() and not OWN_NAMES.fullmatch(path.name)]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `target` that replaces it on success and vanishes on any failure.

    An earlier result at `target` stays untouched until the new one is complete and on the disk; anything else that
    is there stays for good, and so does a model card that a person edited.

    Raises:
        StorageError: the disk is full, the place is not writable or in use, or it holds something else.
    """
    with reserved(target), _explained(target):
        place = target.resolve()  # a link is kept as a link
        temporary = place.with_name(f".{place.name}.partial-{os.getpid()}")
        _remove_leftovers(place, "partial")
        try:
            temporary.mkdir()
            _write_list(temporary, {})
            yield temporary
            if is_edited(place / CARD_FILE):
                (temporary / CARD_FILE).unlink(missing_ok=True)  # it may be a link to another's
                shutil.copy2(place / CARD_FILE, temporary)
            _write_list(temporary, _sizes(temporary))
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            require_replaceable(target)
            _replace_folder(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(source: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        # A folder cannot be renamed over a filled one, so the old one steps aside first.
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    try:
        source.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    _sync(target.parent)
    _remove_leftovers(target, "old")


def _remove_leftovers(place: Path, kind: str) -> None:
    """Remove the temporary folders of one kind beside `place`, those that killed processes left too."""
    for left in place.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(place.name)}\.{kind}-\d+", left.name):
            shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file's content or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` in one step, creating parents, and list it in the nearest folder that has a list.

    Raises:
        StorageError: as `staged_folder` does, or there is such a list and it does not name what is at `path`.
    """
    require_overwritable(path)
    entry = entry_of(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry is not None:
            folder, files, name = entry
            # Before the file: a file that is on no list would never be replaced.
            if files.get(name) != len(content):
                _write_list(folder, files | {name: len(content)})
        _replace_file(path, content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text to `path` in one step."""
    write_bytes(path, content.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in one step; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def remove(path: Path) -> None:
    """Delete a file or a folder that vitopt wrote; nothing happens if it is not there.

    Raises:
        StorageError: vitopt did not write it, or something in it, which is named.
    """
    if path.is_dir() and not path.is_symlink():
        foreign = first_foreign(path)
        if foreign is not None:
            raise StorageError(not_ours(path, foreign))
        shutil.rmtree(path)
    elif path.exists():
        if not is_listed(path):
            raise StorageError(f"{path} would be deleted and vitopt did not write it: move it elsewhere")
        path.unlink()
    if entry := entry_of(path):
        folder, files, name = entry
        others = {file: size for file, size in files.items() if file != name and not file.startswith(f"{name}/")}
        if others != files:
            _write_list(folder, others)


def copy_folder(source: Path, target: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Copy a folder as hard links where the file system has them: a copy of a checkpoint takes no space.

    Raises:
        StorageError: as `staged_folder`, or a listed file of `source` is no longer whole.
    """
    with staged_folder(target) as folder:
        link_files(source, folder, leave_out)


def link_files(source: Path, folder: Path, leave_out: tuple[str, ...] = ()) -> None:
    """The files of `source` in a folder that is being staged, as `copy_folder` makes them.

    Raises:
        StorageError: a listed file of `source` is no longer whole.
    """

    def link(original: str, copy: str) -> None:
        try:
            # The hub's cache is made of relative links, which mean nothing elsewhere.
            os.link(os.path.realpath(original), copy)
        except OSError:
            shutil.copy2(original, copy)

    for name in listed_files(source) or {}:
        if name not in (*leave_out, CARD_FILE) and not is_whole(source / name):
            raise StorageError(f"{source / name} is missing or damaged, so it is not copied: run it again")
    without = shutil.ignore_patterns(LIST_FILE, LOCK_FILE, *leave_out)
    shutil.copytree(source, folder, copy_function=link, ignore=without, dirs_exist_ok=True)


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex digest of a JSON value, the same for equal values whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
