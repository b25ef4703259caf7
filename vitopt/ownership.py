"""Which files vitopt wrote: nothing else is ever replaced or deleted.

Every folder that vitopt writes holds `.vitopt.json`, a list of its files there and below with their sizes in bytes.
The nearest list above a file counts. A file whose size is not the listed one is not whole. A model card, which people
edit, ends with the digest of its text instead: a card without it, or with another one, is the person's own.
"""

import functools
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from vitopt.errors import StorageError
from vitopt.paths import existing

logger = logging.getLogger(__name__)

LIST_FILE = ".vitopt.json"
CARD_FILE = "README.md"
LOCK_FILE = ".vitopt.lock"
LIST_SCHEMA = "vitopt.files/1"
# Of every folder, on no list; the last is what a write leaves that was killed.
OWN_NAMES = re.compile(r"\.vitopt\.(json|lock)|\..+\.partial-\d+")

_SEAL = "<!-- vitopt {} -->\n"  # not shown where Markdown is


def listed_files(folder: Path) -> dict[str, int] | None:
    """Names and sizes in bytes of the files that `folder` lists as vitopt's; None if it has no such list."""
    try:
        content = json.loads((folder / LIST_FILE).read_text(encoding="utf-8"))
        return dict(content["files"]) if content["schema"] == LIST_SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Entry(NamedTuple):
    """Where a path belongs in the nearest list above it, whether it is listed or not."""

    folder: Path  # that holds the list
    files: dict[str, int]  # the list: names and sizes in bytes
    name: str  # of the path in the list


def entry_of(path: Path) -> Entry | None:
    """The entry of `path`; None where no folder above it has a list."""
    path = Path(os.path.abspath(path))  # noqa: PTH100 (a link stays a link)
    for folder in path.parents:
        files = listed_files(folder)
        if files is not None:
            return Entry(folder, files, path.relative_to(folder).as_posix())
    return None


def is_listed(path: Path) -> bool:
    """Whether vitopt wrote the file at `path`."""
    entry = entry_of(path)
    return entry is not None and entry.name in entry.files


def is_whole(path: Path) -> bool:
    """Whether the file at `path` is there and as long as vitopt wrote it."""
    entry = entry_of(path)
    return entry is not None and path.is_file() and entry.files.get(entry.name) == path.stat().st_size


def sealed(card: str) -> str:
    """The text of a card and its digest, by which an edit is noticed."""
    return card + _SEAL.format(hashlib.sha256(card.encode()).hexdigest())


def unsealed(card: str) -> str:
    """The text of a card without the digest."""
    return re.sub(_SEAL.format("[0-9a-f]{64}") + r"\Z", "", card)


def is_edited(card: Path) -> bool:
    """Whether there is a card at `card` that a person wrote or changed; then it stays, which is said once."""
    try:
        text = card.read_bytes().decode(errors="replace")
    except OSError:
        return False
    edited = text != sealed(unsealed(text))
    if edited:
        _note_edited(card.resolve())
    return edited


@functools.cache
def _note_edited(card: Path) -> None:
    logger.warning("%s was edited by hand and stays as it is; delete it to have it written anew", card)


def first_foreign(folder: Path) -> Path | None:
    """The first file, link, empty folder or separate result below `folder` that is no part of vitopt's result there."""
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        folders.sort()
        names = sorted(files + [name for name in folders if (here / name).is_symlink()])
        if LIST_FILE in names and here != folder:
            return here
        for name in names:
            if not OWN_NAMES.fullmatch(name) and not is_listed(here / name):
                return here / name
        if not names and not folders and here != folder:
            return here
    return None


def require_overwritable(file: Path) -> None:
    """Refuse a file that is there and not on the nearest list above it; where no list is, nothing is known.

    Raises:
        StorageError: such a file, by name.
    """
    entry = entry_of(file)
    if entry is not None and file.exists() and entry.name not in entry.files:
        raise StorageError(f"{file} exists and vitopt did not write it: move it elsewhere")


def require_replaceable(target: Path, *inputs: str | Path | None) -> None:
    """Refuse a target whose replacement would delete what vitopt did not write; long work asks before it begins.

    Raises:
        StorageError: the target is a file; holds something that no list of vitopt's names; is the current folder,
            the home folder or above one of them; or is, holds or lies in one of `inputs` (those that exist).
    """
    require_apart(target, inputs)
    refuse_file(target)
    foreign = first_foreign(target)
    if foreign is not None:
        raise StorageError(not_ours(target, foreign))


def not_ours(target: Path, foreign: Path) -> str:
    holds = f"{target} holds {foreign.relative_to(target)}, which is not part of a vitopt result"
    if listed_files(target) is None:
        return f"{holds}: choose another --output (or remove the folder, if it is a result of an older vitopt)"
    return f"{holds}: move it elsewhere, or choose another --output"


def require_apart(target: Path, inputs: tuple[str | Path | None, ...]) -> None:
    place = target.resolve()
    for folder, name in ((Path.cwd(), "the current folder"), (Path("~").expanduser(), "the home folder")):
        if folder.resolve().is_relative_to(place):
            raise StorageError(f"{target} is {name} or holds it: choose a folder of its own as --output")
    for given in inputs:
        source = None if given is None else existing(given)
        if source is None:
            continue  # a name on the hub, say
        source = source.resolve()
        if source.is_relative_to(place) or place.is_relative_to(source):
            raise StorageError(f"{target} is, holds or lies in the input {given}: choose another --output")


def refuse_file(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise StorageError(f"cannot write {target}: a file is in the way; choose another --output")
