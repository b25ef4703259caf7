"""An image set made of any sequence of (image, label) pairs."""

import operator
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitopt.data.decoding import MAX_PIXELS, FileReader, as_rgb
from vitopt.data.images import ImageSet
from vitopt.data.labels import classes_of
from vitopt.errors import DataError

_ARRAYS = "an array must hold uint8 and be (height, width) or (height, width, 3)"


@dataclass(frozen=True)
class PairReader:
    """The images of `pairs`, each fetched when it is needed; one is a path, a Pillow image or an array."""

    pairs: Any

    def content(self, index: int) -> bytes:
        image = self.pairs[index][0]
        if isinstance(image, str | Path):
            return Path(image).read_bytes()
        try:
            decoded = as_rgb(_decoded(image))
        except (OSError, ValueError):
            return b""  # a broken image, which cannot be decoded either
        return f"{decoded.size}".encode() + decoded.tobytes()

    def image(self, index: int) -> Image.Image:
        image = self.pairs[index][0]
        if isinstance(image, str | Path):
            return FileReader((Path(image),)).image(0)
        opened = _decoded(image)
        if opened.width * opened.height <= MAX_PIXELS:
            opened.load()  # else a choice of a smaller size to decode at would stay with the user's image
        return opened


def images_of(pairs: Iterable[Any], *, name: str = "images", groups: Sequence[Any] | None = None) -> ImageSet:
    """An image set of (image, label) pairs.

    An image is a path, a Pillow image, or an array of uint8, (height, width) or (height, width, 3). A label is the name
    of a class, or a number that counts the outputs of a head from 0; or, where an image has any number of labels, a
    set or a list of either. A sequence with `len()` and `[index]` is read anew each time an image is needed, so a lazy
    one stays lazy; anything else is taken into memory. `groups`: of each image, what tells those that depend on each
    other.

    Raises:
        DataError: no pairs, an item that is not one, an image of another kind, a file that does not exist, labels of
            several kinds, groups of another number; the message has the index of the first.
    """
    if not (isinstance(pairs, Sized) and hasattr(pairs, "__getitem__")):
        try:
            pairs = list(pairs)
        except TypeError as error:
            raise DataError(f"data is {_kind(pairs)}: give (image, label) pairs, a folder, or a data set id") from error
    count = len(pairs)
    if count == 0:
        raise DataError(f"{name} has no images: the sequence of (image, label) pairs is empty")
    if groups is not None and len(groups) != count:
        raise DataError(f"{name} has {count} images and {len(groups)} groups: give one group for each image")
    ids, labels = [], []
    for index in range(count):
        image, label = _pair(pairs[index], index)
        ids.append(_id(image, index))
        labels.append(label)
    if len(set(ids)) < count:
        ids = [f"{index:06d} {name}" for index, name in enumerate(ids)]
    several = [isinstance(label, set | frozenset | list | tuple | np.ndarray) for label in labels]
    _require_alike(several, "a set of labels", "a single label")
    members = [_members(label, index) if several[0] else [label] for index, label in enumerate(labels)]
    flat, names = _numbered(members)
    numbers = iter(flat)
    sets = [frozenset(next(numbers) for _ in some) for some in members]
    same: dict[frozenset[int], int] = {}
    return ImageSet(
        name=name,
        split=None,
        ids=tuple(ids),
        labels=tuple(same.setdefault(labels, len(same)) for labels in sets) if several[0] else tuple(flat),
        class_names=names,
        reader=PairReader(pairs),
        rows=tuple(range(count)),
        groups=None if groups is None else tuple(map(str, groups)),
        label_sets=tuple(sets) if several[0] else None,
    )


def _pair(item: Any, index: int) -> tuple[Any, Any]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"{_kind(item)} of {len(item)}" if isinstance(item, tuple | list) else _kind(item)
        raise DataError(f"item {index} of the data is not an (image, label) pair but {what}")
    return item[0], item[1]


def _id(image: Any, index: int) -> str:
    """The name of an image; what is not an image is refused."""
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise DataError(f"pair {index}: no image at {image}")
        return str(image)
    if not isinstance(image, Image.Image):
        array = _array(image)
        if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
            what = f"{array.dtype} {array.shape}" if array.ndim else _kind(image)
            raise DataError(f"pair {index}: {_ARRAYS}, or give a path or a Pillow image; this is {what}")
    return f"image-{index:06d}"


def _array(image: Any) -> Any:
    try:
        return np.asarray(image)
    except Exception:  # what cannot be an array says so in its own ways
        return np.asarray(None)


def _decoded(image: Any) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(_array(image))


def _members(label: Any, index: int) -> list[Any]:
    members = list(label)
    if len(set(map(str, members))) < len(members):
        raise DataError(f"pair {index}: {members} names a label twice; list the labels that the image has, not 0 and 1")
    return members


def _numbered(members: list[list[Any]]) -> tuple[list[int], tuple[str, ...] | None]:
    """All labels in order as numbers, and what they index: None for the outputs of a head."""
    where = [index for index, some in enumerate(members) for _ in some]
    flat = [label for some in members for label in some]
    _require_alike([isinstance(label, str) for label in flat], "a name", "a number", where)
    if flat and isinstance(flat[0], str):
        return classes_of(flat)
    numbers = []
    for index, label in zip(where, flat, strict=True):
        try:
            number = operator.index(label)
        except TypeError as error:
            raise DataError(f"pair {index}: a label is a name or a whole number, not {_kind(label)}") from error
        if number < 0:
            raise DataError(f"pair {index}: the label {number} is negative; labels count a head's outputs from 0")
        numbers.append(number)
    return numbers, None


def _require_alike(kinds: list[bool], one: str, other: str, where: Sequence[int] | None = None) -> None:
    """Refuse the first pair whose kind differs from that of pair 0."""
    odd = next((place for place, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        this, before = (one, other) if kinds[odd] else (other, one)
        raise DataError(f"pair {where[odd] if where else odd} has {this}, and those before it have {before}")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
