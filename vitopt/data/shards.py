"""Any number of images without labels, in parts that are read and finished one at a time.

A part is what a run that was ended begins anew: some hundred files, a tar archive (as WebDataset writes them), or a row
group of a Parquet file with image bytes. Nothing but its list of contents is held while it is worked on.
"""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from vitopt.data.decoding import IMAGE_ENDINGS, open_bytes
from vitopt.data.images import ImageSet, image_files
from vitopt.errors import DataError

FILES_PER_PART = 500
ARCHIVE_ENDINGS = (".tar", ".parquet")


@dataclass(frozen=True)
class Part:
    """`name`: of what is read; `stamp`: what changes when that changes; `images`: opens it."""

    name: str
    stamp: tuple[object, ...]
    images: Callable[[], ImageSet]


@dataclass(frozen=True)
class TarReader:
    """Images in an uncompressed tar archive, read where they lie."""

    path: Path
    places: tuple[tuple[int, int], ...]  # where each image's bytes begin, and how many they are

    def content(self, index: int) -> bytes:
        begin, length = self.places[index]
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.read(length)

    def image(self, index: int) -> Image.Image:
        return open_bytes(self.content(index))


@dataclass(frozen=True)
class ColumnReader:
    """Images whose encoded bytes are in memory."""

    contents: tuple[bytes, ...]

    def content(self, index: int) -> bytes:
        return self.contents[index]

    def image(self, index: int) -> Image.Image:
        return open_bytes(self.content(index))


def parts_of(paths: Sequence[Path], *, column: str | None = None) -> Iterator[Part]:
    """The parts of files in this order: archives each on their own, all other files together.

    `column`: of Parquet files; None finds it.

    Raises:
        DataError: an archive cannot be read, or holds no images.
    """
    files, archives = list[Path](), list[Path]()
    for path in paths:
        (archives if path.suffix.lower() in ARCHIVE_ENDINGS else files).append(path)
    for begin in range(0, len(files), FILES_PER_PART):
        some = files[begin : begin + FILES_PER_PART]
        yield Part(f"{some[0]} to {some[-1]}", tuple(map(str, some)), lambda some=some: image_files(some))  # type: ignore[misc]
    for path in archives:
        if path.suffix.lower() == ".tar":
            yield Part(str(path), _stamp(path), lambda path=path: _tar(path))  # type: ignore[misc]
        else:
            yield from _row_groups(path, column)


def _stamp(path: Path) -> tuple[object, ...]:
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def _tar(path: Path) -> ImageSet:
    try:
        with tarfile.open(path, "r:") as archive:
            members = [
                (member.name, member.offset_data, member.size)
                for member in archive
                if member.isreg() and PurePosixPath(member.name).suffix.lower() in IMAGE_ENDINGS
            ]
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} cannot be read as an uncompressed tar archive ({error}): unpack it") from error
    if not members:
        raise DataError(f"no image in {path}; known endings: {' '.join(IMAGE_ENDINGS)}")
    reader = TarReader(path, tuple((begin, length) for _, begin, length in members))
    return unlabelled(str(path), [f"{path}:{name}" for name, _, _ in members], reader)


def _row_groups(path: Path, column: str | None) -> Iterator[Part]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error})") from error
    with file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        name = column or next((name for name, kind in kinds.items() if _holds_images(kind)), None)
        if name not in kinds or not _holds_images(kinds[name]):
            wanted = f"its column {name!r}" if name in kinds else f"no column {name!r}" if name else "no column"
            raise DataError(f"{path}: {wanted} holds image bytes; its columns are {', '.join(kinds)}")
        assert name is not None
        groups = file.num_row_groups
    for group in range(groups):
        yield Part(
            f"{path}, row group {group}",
            (*_stamp(path), group, name),
            lambda group=group: _row_group(path, group, name),  # type: ignore[misc]
        )


def _holds_images(kind: object) -> bool:
    """Bytes, or Hugging Face's struct of `bytes` and `path`."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return "bytes" in {field.name for field in kind}  # type: ignore[attr-defined]
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _row_group(path: Path, group: int, column: str) -> ImageSet:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        before = sum(file.metadata.row_group(earlier).num_rows for earlier in range(group))
        values = file.read_row_group(group, columns=[column])[column].to_pylist()
    # An empty cell is an image that cannot be decoded.
    contents = tuple((value.get("bytes") if isinstance(value, dict) else value) or b"" for value in values)
    return unlabelled(str(path), [f"{path}:{before + row}" for row in range(len(contents))], ColumnReader(contents))


def unlabelled(name: str, ids: Sequence[str], reader: TarReader | ColumnReader) -> ImageSet:
    """Images that are all of class 0, as nobody asks for it."""
    return ImageSet(
        name=name,
        split=None,
        ids=tuple(ids),
        labels=(0,) * len(ids),
        class_names=None,
        reader=reader,
        rows=tuple(range(len(ids))),
    )
