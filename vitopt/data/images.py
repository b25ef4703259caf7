"""Labelled images from a folder, from a Hugging Face data set, or scikit-learn's digits.

A folder has one subfolder per class, or a `metadata.csv` with the columns `file_name,label`; with
subfolders named `train`, `test`, `validation`… each of them is such a folder. A folder without splits is
divided once and for all into 80 % `train` and 20 % `test` per class, so that nothing is tested on what it
was trained on.
"""

import functools
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitopt.data.decoding import IMAGE_ENDINGS, ArrayReader, FileReader, HubReader, Reader, decoded
from vitopt.data.division import held_out
from vitopt.data.folders import TABLE, Boundary, list_folder, subfolders, why_not_read
from vitopt.data.labels import as_indices, classes_of
from vitopt.data.sources import may_be_on_hub, parse_source
from vitopt.errors import BadImageError, DataError
from vitopt.paths import existing
from vitopt.recipe import HELD_OUT, DataSpec

SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation", "calibration")
EVALUATION_SPLITS = ("test", "testing", "validation", "val", "valid")
ALL = "all"


@dataclass(frozen=True)
class ImageSet:
    """Images with labels, in a fixed order.

    `labels` index `class_names`; where the user says that labels count a head's outputs, there are no names. Where
    images have any number of labels, `label_sets` holds them, and `labels` only tells which images have the same ones.
    """

    name: str
    split: str | None
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...] | None
    reader: Reader
    rows: tuple[int, ...]  # where each image stands in the reader
    groups: tuple[str, ...] | None = None  # of images that depend on each other, such as the frames of one video
    label_sets: tuple[frozenset[int], ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int, *, smallest_side: int | None = None) -> Image.Image:
        """Decode one image as RGB, turned upright; `smallest_side`: see `vitopt.data.decoding.decoded`.

        Raises:
            BadImageError: truncated, not an image, or more than MAX_PIXELS pixels; the message names it.
        """
        try:
            return decoded(lambda: self.reader.image(self.rows[index]), smallest_side=smallest_side)
        except BadImageError as error:
            raise BadImageError(
                f"image {self.ids[index]} cannot be decoded ({error}): replace it, or leave it out with "
                "--skip-bad-images"
            ) from error

    @functools.cached_property
    def image_hashes(self) -> tuple[str, ...]:
        """Hex digest of each image's content."""
        return tuple(hashlib.sha256(self.reader.content(row)).hexdigest() for row in self.rows)

    @functools.cached_property
    def sha256(self) -> str:
        """Hex digest of all contents and labels, in order."""
        digest = hashlib.sha256()
        labels = self.labels if self.label_sets is None else map(sorted, self.label_sets)
        for content, label in zip(self.image_hashes, labels, strict=True):
            digest.update(f"{content} {label}\n".encode())
        return digest.hexdigest()

    @property
    def used_labels(self) -> list[int]:
        """All labels that images have, rising."""
        return sorted(set(self.labels) if self.label_sets is None else frozenset().union(*self.label_sets))

    def targets(self, classes: int | None = None) -> NDArray[np.int64]:
        """(images,) labels; where images have sets of them, (images, classes) with 1 for those that an image has."""
        if self.label_sets is None:
            return np.array(self.labels, dtype=np.int64)
        classes = max(classes or len(self.class_names or ()), 1 + max(self.used_labels, default=0))
        targets = np.zeros((len(self), classes), dtype=np.int64)
        for row, labels in zip(targets, self.label_sets, strict=True):
            row[list(labels)] = 1
        return targets

    def subset(self, indices: Iterable[int]) -> "ImageSet":
        """The images at `indices`, in that order."""
        chosen = list(indices)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
            rows=tuple(self.rows[i] for i in chosen),
            groups=None if self.groups is None else tuple(self.groups[i] for i in chosen),
            label_sets=None if self.label_sets is None else tuple(self.label_sets[i] for i in chosen),
        )

    def without(self, ids: Sequence[str]) -> "ImageSet":
        """All images but those named."""
        left_out = set(ids)
        return self.subset(index for index, name in enumerate(self.ids) if name not in left_out) if ids else self

    def limited(self, count: int | None) -> "ImageSet":
        """At most `count` images, taken in turn from each class so that all classes stay represented."""
        if count is None or count >= len(self):
            return self
        turn: dict[int, int] = {}
        order = []
        for index, label in enumerate(self.labels):
            order.append((turn.get(label, 0), index))
            turn[label] = turn.get(label, 0) + 1
        return self.subset(sorted(index for _, index in sorted(order)[:count]))


def open_images(spec: DataSpec, split: str | None) -> ImageSet:
    """Open one split of a data set. `split` None takes the one meant for testing.

    Raises:
        DataError: no such folder or split, no images, fewer than two classes, labels that are no indices where the
            spec says they are, a hub that cannot be reached.
    """
    source, named = parse_source(spec.source)
    split = named or split
    if split == HELD_OUT or (spec.held_out is not None and split == spec.train):
        return _of_training(spec, split).limited(spec.limit)
    if source == "digits":
        images = _digits(split)
    elif (place := existing(source)) is not None and place.is_dir():
        images = _folder(place, source, split, spec)
    elif place is not None:
        raise DataError(f"{source} is a file; data is a folder of images, a hub data set id, or digits")
    elif not may_be_on_hub(source):
        absent = "the folder does not exist" if named is None else f"neither it nor {source} is a folder"
        raise DataError(f"no data at {spec.source}: {absent}")
    else:
        images = _hub(source, spec, split)
    columns = [] if isinstance(images.reader, HubReader) else [spec.image_column, spec.label_column]
    columns += [spec.group_column] if images.groups is None else []
    if spec.root is not None and not isinstance(images.reader, FileReader):
        raise DataError(f"{spec.source} is not a folder, so `root` would do nothing: leave it out")
    if column := next(filter(None, columns), None):
        raise DataError(
            f"{spec.source} is not a data set of the hub, so it has no column {column!r}: leave it out of `data`"
        )
    if len(images) == 0:
        raise DataError(f"{spec.source} has no images; known endings: {' '.join(IMAGE_ENDINGS)}")
    if len(set(images.labels)) < 2:
        raise DataError(
            f"all {len(images)} images of {spec.source} are of one class; accuracy needs at least two: "
            "give the folder that holds the class folders"
        )
    return (as_indices(images) if spec.labels == "index" else images).limited(spec.limit)


def _of_training(spec: DataSpec, split: str) -> ImageSet:
    """The part of the training split that is held out, or the rest of it."""
    if spec.held_out is None:
        raise DataError(f"{spec.source} has no split {HELD_OUT}: set `held_out: 0.2` under `data` to keep a fifth")
    whole = open_images(spec.model_copy(update={"held_out": None, "limit": None}), spec.train)
    kept = held_out(whole.labels, whole.groups, spec.held_out)
    return replace(whole.subset(i for i, here in enumerate(kept) if here == (split == HELD_OUT)), split=split)


def image_files(paths: Sequence[Path]) -> ImageSet:
    """Image files without labels, for predictions.

    Raises:
        BadImageError: a file does not exist.
    """
    for path in paths:
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            raise BadImageError(f"no image at {path}") from error
        if reason := why_not_read(status):
            raise BadImageError(f"no image at {path}: it {reason}")
    return ImageSet(
        name="files",
        split=None,
        ids=tuple(map(str, paths)),
        labels=(0,) * len(paths),
        class_names=None,
        reader=FileReader(tuple(paths)),
        rows=tuple(range(len(paths))),
    )


def _digits(split: str | None) -> ImageSet:
    """Scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, 10 classes (UCI, CC BY 4.0)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 16 grey levels, light on dark, become 8-bit pixels.
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    whole = ImageSet(
        name="digits",
        split=None,
        ids=tuple(f"digit-{index:04d}" for index in range(len(pixels))),
        labels=tuple(int(label) for label in digits.target),
        class_names=tuple(str(digit) for digit in range(10)),
        reader=ArrayReader(pixels),
        rows=tuple(range(len(pixels))),
    )
    return _divided(whole, split, test_share=0.45)


def _folder(path: Path, source: str, split: str | None, spec: DataSpec) -> ImageSet:
    root = path if spec.root is None else existing(spec.root)
    if root is None or not root.is_dir():
        raise DataError(f"no folder at {spec.root}, which --data-root (`root` under `data`) names")
    boundary = Boundary(root, path)
    splits = _splits(path)
    if not splits:
        whole = _one_folder(path, source, None, boundary, spec.group_column)
        return _divided(whole, split, spec.test_share, by_class=spec.labels == "name")
    wanted = _pick_split(split and split.lower(), list(splits), source)
    return _one_folder(splits[wanted], source, wanted, boundary, spec.group_column)


def _splits(path: Path) -> dict[str, Path]:
    """The subfolders that are splits, by name."""
    children = subfolders(path)
    splits = {child.name.lower(): child for child in children if child.name.lower() in SPLIT_NAMES}
    if len(splits) == len(children):
        return splits
    # Beside other folders, `train` may as well be a class of vehicles: a split has classes or a table itself.
    return {name: child for name, child in splits.items() if subfolders(child) or (child / TABLE).is_file()}


def _pick_split(split: str | None, existing: Sequence[str], source: str) -> str:
    if split is None:
        for name in EVALUATION_SPLITS:
            if name in existing:
                return name
        raise DataError(f"{source} has no test split, only {', '.join(existing)}; name one as {source}:{existing[0]}")
    if split not in existing:
        raise DataError(f"{source} has no split {split!r}; it has {', '.join(existing)}")
    return split


def _divided(whole: ImageSet, split: str | None, test_share: float, *, by_class: bool = True) -> ImageSet:
    """A fixed division of a set that has no splits: every class gives its share to `test`.

    Without `by_class`, classes that are too small for that are divided as one: where labels count a head's outputs,
    nothing has to be learned of a class before it is tested.
    """
    if split in (None, ALL):
        return replace(whole, split=ALL)
    if split not in ("train", "test"):
        raise DataError(f"{whole.name} has no split {split!r}; it divides into train and test, or take all")
    labels = whole.labels if by_class else _small_as_one(whole.labels, test_share)
    testing = held_out(labels, whole.groups, test_share)
    tested = {label for label, here in zip(whole.labels, testing, strict=True) if here}
    if split == "test" and len(tested) < 2 <= len(set(whole.labels)):
        what = "images" if whole.groups is None else "groups of images"
        raise DataError(
            f"{whole.name} has too few {what} to divide: at least two classes must have {math.ceil(1 / test_share)} "
            f"each; add images, or take them all as {whole.name}:{ALL}"
        )
    part = whole.subset(index for index, here in enumerate(testing) if here == (split == "test"))
    return replace(part, split=split)


def _small_as_one(labels: Sequence[int], share: float) -> list[int]:
    """-1 for each label with so few images that none would be held out."""
    counts = Counter(labels)
    return [label if int(counts[label] * share) else -1 for label in labels]


def _one_folder(path: Path, source: str, split: str | None, boundary: Boundary, group_column: str | None) -> ImageSet:
    listing = list_folder(path, source, boundary, group_column)
    return ImageSet(
        name=source,
        split=split,
        ids=tuple(Path(os.path.relpath(file, path)).as_posix() for file in listing.files),
        labels=listing.labels,
        class_names=listing.class_names,
        reader=FileReader(listing.files),
        rows=tuple(range(len(listing.files))),
        groups=listing.groups,
    )


def _hub(source: str, spec: DataSpec, split: str | None) -> ImageSet:
    import datasets

    datasets.disable_progress_bars()
    try:
        with_splits = datasets.load_dataset(source)
    except Exception as error:  # the library raises what its many back ends raise
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"no folder named {source!r}, and the Hugging Face hub gave no data set of that name ({text}); "
            "check the spelling and the network, or download it and give its folder"
        ) from error
    chosen = _pick_split(split, list(with_splits), source)
    rows = with_splits[chosen]
    image_column = spec.image_column or _column(rows.features, datasets.Image, "image_column", source)
    label_column = spec.label_column or _column(rows.features, datasets.ClassLabel, "label_column", source)
    for column in (image_column, label_column, spec.group_column):
        if column is not None and column not in rows.features:
            raise DataError(f"{source} has no column {column!r}; it has {', '.join(rows.features)}")
    if not isinstance(rows.features[image_column], datasets.Image):
        raise DataError(f"column {image_column!r} of {source} holds no images; set data.image_column in the recipe")
    labels, names = _hub_labels(rows, label_column, f"{source}:{chosen}")
    if spec.labels == "index" and hasattr(rows.features[label_column], "names"):
        names = None  # its names are given up for its numbers
    groups = None if spec.group_column is None else tuple(map(str, rows[spec.group_column]))
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return ImageSet(
        name=source,
        split=chosen,
        ids=tuple(f"{chosen}-{index:06d}" for index in range(len(rows))),
        labels=tuple(labels),
        class_names=names,
        reader=HubReader(rows, image_column),
        rows=tuple(range(len(rows))),
        groups=groups,
    )


def _hub_labels(rows: Any, column: str, source: str) -> tuple[Sequence[int], tuple[str, ...] | None]:
    values = list(rows[column])
    # The hub marks the images of a split without labels with -1.
    if any(value in (None, -1) for value in values):
        raise DataError(
            f"{source} has images without a label in column {column!r}; take a split whose labels are known"
        )
    names = getattr(rows.features[column], "names", None)
    if names is not None:
        return values, tuple(names)
    if not all(isinstance(value, str) or (isinstance(value, int) and value >= 0) for value in values):
        raise DataError(f"column {column!r} of {source} holds no classes; set data.label_column in the recipe")
    return classes_of(list(map(str, values)))


def _column(features: Any, kind: type, key: str, source: str) -> str:
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(names) != 1:
        raise DataError(
            f"{source}: cannot tell which column is meant ({', '.join(features)}); set data.{key} in the recipe"
        )
    return names[0]
