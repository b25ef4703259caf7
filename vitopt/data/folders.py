"""Image folders: which files are read, and how each is labelled. Links, pipes and tables reach nothing outside."""

import csv
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from vitopt.data.decoding import IMAGE_ENDINGS
from vitopt.data.labels import classes_of
from vitopt.errors import DataError

TABLE = "metadata.csv"
MAX_FILE_BYTES = 2**30
MAX_TABLE_BYTES = 2**28


class Boundary:
    """Files below `roots`, to which links may lead too; everything else is not read."""

    def __init__(self, *roots: Path):
        self._roots = tuple(root.resolve() for root in roots)
        self._folders: dict[Path, bool] = {}  # whether each lies inside, links followed

    def why_not(self, file: Path, largest: int = MAX_FILE_BYTES) -> str | None:
        """Why `file` is not read, None for one that is."""
        try:
            status = file.lstat()
            inside = (
                self._holds(file.resolve()) if stat.S_ISLNK(status.st_mode) else self._folder_is_inside(file.parent)
            )
            if inside and stat.S_ISLNK(status.st_mode):
                status = file.stat()
        except (OSError, ValueError, RuntimeError):  # gone, a name that no file can have, links in a circle
            return "does not exist"
        if not inside:
            return (
                f"lies outside {self._roots[0]}, the only folder that is read: copy it there, or name the folder that "
                "holds both with --data-root (in a recipe `root` under `data`)"
            )
        return why_not_read(status, largest)

    def _holds(self, place: Path) -> bool:
        return any(place.is_relative_to(root) for root in self._roots)

    def _folder_is_inside(self, folder: Path) -> bool:
        if folder not in self._folders:
            self._folders[folder] = self._holds(folder.resolve())
        return self._folders[folder]


def why_not_read(status: os.stat_result, largest: int = MAX_FILE_BYTES) -> str | None:
    """Why what has this status is not read, None for an ordinary file that is not too large."""
    if not stat.S_ISREG(status.st_mode):
        return "is a folder" if stat.S_ISDIR(status.st_mode) else "is a pipe or a device, not a file: remove it"
    if status.st_size > largest:
        return f"has {status.st_size:,} bytes, more than the {largest:,} of any file that is read: remove it"
    return None


@dataclass(frozen=True)
class Listing:
    """Image files of a folder; `labels` index `class_names`."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    groups: tuple[str, ...] | None = None


def list_folder(path: Path, source: str, boundary: Boundary, group_column: str | None) -> Listing:
    """The images of one split: of its `metadata.csv` or, without one, of its class folders.

    Raises:
        DataError: a file that is not read (see `Boundary`), a broken table, no labels, no groups where they are asked.
    """
    try:
        if (path / TABLE).is_file():
            return _of_table(path, boundary, group_column)
        if group_column is not None:
            raise DataError(f"{path} has no {TABLE}, whose column {group_column!r} would tell the groups of images")
        return _of_class_folders(path, source, boundary)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def subfolders(path: Path) -> list[Path]:
    """Folders right below `path` that are not hidden, by name."""
    return [child for child in sorted(path.iterdir()) if child.is_dir() and not child.name.startswith(".")]


def _of_class_folders(path: Path, source: str, boundary: Boundary) -> Listing:
    classes = [(folder, _images_below(folder, boundary)) for folder in subfolders(path)]
    classes = [(folder, files) for folder, files in classes if files]
    if not classes and any(map(_is_image_name, path.iterdir())):
        raise DataError(
            f"{source} has images but no labels: put them into one folder per class, "
            "or add a metadata.csv with the columns file_name,label"
        )
    return Listing(
        files=tuple(file for _, group in classes for file in group),
        labels=tuple(label for label, (_, group) in enumerate(classes) for _ in group),
        class_names=tuple(folder.name for folder, _ in classes),
    )


def _images_below(folder: Path, boundary: Boundary) -> list[Path]:
    named = (path for path in sorted(folder.rglob("*")) if _is_image_name(path))
    files = []
    for file in named:
        reason = boundary.why_not(file)
        if reason is None:
            files.append(file)
        elif reason != "is a folder":
            raise DataError(f"{file} {reason}")
    return files


def _is_image_name(path: Path) -> bool:
    # macOS leaves a hidden `._name.jpg` beside each image that it unpacks.
    return path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".")


def _of_table(path: Path, boundary: Boundary, group_column: str | None) -> Listing:
    table = path / TABLE
    if reason := boundary.why_not(table, MAX_TABLE_BYTES):
        raise DataError(f"{table} {reason}")
    rows = _rows(table, {"file_name", "label"}, group_column)
    groups = None if group_column is None else tuple((row[group_column] or "").strip() for row in rows)
    if groups is not None and "" in groups:
        raise DataError(f"{table} line {groups.index('') + 2}: the group in column {group_column!r} is empty")
    files, names = [], []
    for line, row in enumerate(rows, start=2):
        name, label = row["file_name"], (row["label"] or "").strip()
        if not name or not label:
            raise DataError(f"{table} line {line}: the file name or the label is empty")
        if any(row.get(None) or ()):  # type: ignore[call-overload]
            raise DataError(f"{table} line {line}: it has more cells than columns; put a text with commas in quotes")
        if reason := boundary.why_not(path / name):
            raise DataError(f"{table} line {line}: {name} {reason}")
        files.append(path / name)
        names.append(label)
    labels, class_names = classes_of(names)
    return Listing(tuple(files), tuple(labels), class_names, groups)


def _rows(table: Path, needed: set[str], group_column: str | None) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = list(reader.fieldnames or ())
            missing = needed - set(columns)
            if missing:
                raise DataError(f"{table} has no column {' and '.join(sorted(missing))}; it needs file_name,label")
            if group_column is not None and group_column not in columns:
                raise DataError(f"{table} has no column {group_column!r}; it has {', '.join(columns)}")
            twice = next((name for name in columns if name and columns.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{table} has two columns {twice!r}: give each a name of its own")
            return list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is not comma-separated text in UTF-8 ({error}): save it as such") from error
