"""Images that turned from right to wrong, or from wrong to right: what a loss of accuracy looks like."""

import base64
import functools
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitopt.data.images import ImageSet, open_images
from vitopt.data.sources import parse_source
from vitopt.errors import VitoptError
from vitopt.measure.predictions import Predictions
from vitopt.recipe import DataSpec
from vitopt.records import Dataset

MOST_SHOWN = 12
THUMBNAIL_PIXELS = 96
_BUILT_IN = "digits"


@dataclass(frozen=True)
class Answer:
    """A class and the probability given to it."""

    name: str
    percent: float


@dataclass(frozen=True)
class Flip:
    """One image on which baseline and variant disagree, and one of them is right."""

    image: str
    label: str
    baseline: Answer
    variant: Answer
    became_right: bool
    thumbnail: str | None  # a data URI


@dataclass(frozen=True)
class Flips:
    """Flips of one variant: how many in each direction, and examples, clearest first."""

    variant: str
    right_to_wrong: int
    wrong_to_right: int
    shown: tuple[Flip, ...]

    @property
    def flipped(self) -> int:
        """Images that turned either way."""
        return self.right_to_wrong + self.wrong_to_right


class Thumbnails:
    """Small pictures of the images of a data set, where its files are still here and unchanged.

    Data from a hub is not fetched for a report.
    """

    def __init__(self, dataset: Dataset | None):
        self._images = _open(dataset)
        self._index = {name: index for index, name in enumerate(self._images.ids)} if self._images else {}
        self.available = self._images is not None  # whether the images were found at all
        self.of = functools.cache(self._of)

    def _of(self, name: str, sha256: str) -> str | None:
        """JPEG of one image as a data URI; None where it is absent or no longer has this content."""
        if self._images is None or (index := self._index.get(name)) is None:
            return None
        try:
            content = self._images.reader.content(self._images.rows[index])
            same = hashlib.sha256(content).hexdigest() == sha256
            return data_uri(self._images.image(index)) if same else None
        except (VitoptError, OSError):
            return None


def _open(dataset: Dataset | None) -> ImageSet | None:
    if dataset is None:
        return None
    place, _ = parse_source(dataset.name)
    if place != _BUILT_IN and not any(Path(path).expanduser().is_dir() for path in (dataset.name, place)):
        return None
    try:
        return open_images(DataSpec(source=dataset.name), dataset.split)
    except (VitoptError, OSError, ValueError):
        return None


def data_uri(image: Image.Image) -> str:
    """JPEG of at most THUMBNAIL_PIXELS each way; smaller images are enlarged, as the page would blur them."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    factor = THUMBNAIL_PIXELS // max(small.size)
    if factor > 1:
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=78, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def flips(
    variant: str, before: Predictions, after: Predictions, class_names: Mapping[int, str], thumbnails: Thumbnails
) -> Flips | None:
    """Flips of a variant, from the baseline's predictions and its own.

    None where no image flipped, and where the two are not over the same images.
    """
    if before.image_sha256 != after.image_sha256 or before.logits.shape != after.logits.shape:
        return None

    def named(label: int) -> str:
        return class_names.get(label, f"class {label}")

    def answer(logits: NDArray[np.float32]) -> Answer:
        label = int(logits.argmax())
        return Answer(named(label), 100 * float(softmax(logits[np.newaxis])[0, label]))

    shown = tuple(
        Flip(
            image=after.ids[index],
            label=named(int(after.labels[index])),
            baseline=answer(before.logits[index]),
            variant=answer(after.logits[index]),
            became_right=bool(after.correct[index]),
            thumbnail=thumbnails.of(after.ids[index], after.image_sha256[index]),
        )
        for index in choose(before, after)
    )
    lost, won = int((before.correct & ~after.correct).sum()), int((~before.correct & after.correct).sum())
    return Flips(variant, lost, won, shown) if shown else None


def choose(before: Predictions, after: Predictions, most: int = MOST_SHOWN) -> list[int]:
    """Indices of at most `most` flipped images: those whose label's probability changed most, the lost ones first."""
    indices = np.flatnonzero(before.correct != after.correct)
    # Only of the flipped images: probabilities of all would take gigabytes on a large set.
    rows, labels = np.arange(len(indices)), before.labels[indices]
    change = softmax(after.logits[indices])[rows, labels] - softmax(before.logits[indices])[rows, labels]
    clearest = np.argsort(-np.abs(change), kind="stable")[:most]
    return indices[sorted(clearest, key=lambda row: change[row] > 0)].tolist()


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities (images, classes) of logits of the same shape."""
    exponents = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)
