"""Classes of images that have no labels: any number of files, in batches, decoded while the model computes."""

import glob
import logging
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from vitopt import progress
from vitopt.adaptive.router import Router
from vitopt.adaptive.runtime import AnyPrepared, prepare
from vitopt.data.decoding import IMAGE_ENDINGS
from vitopt.data.images import ImageSet, image_files
from vitopt.data.pixels import batches, on_device
from vitopt.data.shards import ARCHIVE_ENDINGS
from vitopt.environment import devices
from vitopt.errors import BadImageError, DataError, MeasurementError
from vitopt.measure.accuracy import padded_call
from vitopt.models.checkpoint import open_checkpoint
from vitopt.paths import existing
from vitopt.recipe import RunSpec
from vitopt.records import Outputs

logger = logging.getLogger(__name__)

Pass = Literal["first", "second"]  # of an adaptive model


def image_paths(names: Iterable[str]) -> list[Path]:
    """The files that `names` stand for: files as they are, folders with all that is below, patterns as `*.jpg`.

    Those of a folder or a pattern come in order of their names; a file that is named twice is there once.

    Raises:
        BadImageError: a file is missing, a folder holds no image, a pattern matches none.
        DataError: no names, or a folder that cannot be read.
    """
    paths: dict[Path, None] = {}
    endings = (*IMAGE_ENDINGS, *ARCHIVE_ENDINGS)
    for name in names:
        path = existing(name)
        if path is not None and path.is_dir():
            below = list(map(Path, _files_below(path, endings)))
            if not below:
                raise BadImageError(f"no image in the folder {name}; known endings: {' '.join(endings)}")
        elif path is not None:
            below = [path]
        elif glob.has_magic(name):
            pattern = Path(os.path.expanduser(name))  # noqa: PTH111 (Path's raises for users who are not known)
            root = Path(pattern.anchor)
            below = sorted(match for match in root.glob(str(pattern.relative_to(root))) if match.is_file())
            if not below:
                raise BadImageError(f"no image at {name}, and no file matches it as a pattern")
        else:
            raise BadImageError(f"no image at {name}")
        paths |= dict.fromkeys(below)
    if not paths:
        raise DataError("no images: name files, folders or patterns, or `-` to read names from standard input")
    return list(paths)


def _files_below(folder: str | Path, endings: Sequence[str]) -> Iterator[str]:
    """Files with these endings in order of the names on their way. Listings tell what is a file, so that none is looked
    at on its own: a folder can hold 100,000."""
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=operator.attrgetter("name"))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror or error}") from error
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(entry.path, endings)
        elif os.path.splitext(entry.name)[1].lower() in endings and entry.is_file():  # noqa: PTH122 (of a name)
            yield entry.path


def predict(
    source: str, paths: Sequence[Path], *, top: int, run: RunSpec | None = None, device: str = "auto", **options: Any
) -> Iterator[dict[str, Any]]:
    """Classify image files with a checkpoint; `options` are those of `classify`.

    Raises:
        BadImageError: a file is missing.
    """
    checkpoint, images = open_checkpoint(source), image_files(paths)
    runnable = prepare(checkpoint, name=source, device=devices.resolve_device(device), run=run)
    return classify(runnable, images, top, **options)


def classify(
    runnable: AnyPrepared,
    images: ImageSet,
    top: int,
    *,
    batch_size: int = 32,
    workers: int = 0,
    skip_bad: bool = False,
) -> Iterator[dict[str, Any]]:
    """Classify images, in order: `image`, its id, and `classes`, the `top` of highest probability.

    A class is `label`, `index` and `percent`: the softmax over all classes or, where outputs are independent labels
    (`problem_type: multi_label_classification`), each one's own sigmoid. Of an adaptive model `path` tells which pass
    answered: `first` or `second`. An image that cannot be decoded is an error
    or, with `skip_bad`, has no `classes` but the `error`.

    Raises:
        BadImageError: an image cannot be decoded.
        MeasurementError: the model's logits are not finite.
    """
    device, names = runnable.device, distinct(runnable.label_names)
    batch_size = min(batch_size, len(images))
    stream = batches(
        images, runnable.preprocess, batch_size, workers=workers, skip_bad=skip_bad, pin=device.type == "cuda"
    )
    with progress.task("predicting", len(images)) as counted:
        for batch in on_device(stream, device):
            no_path = {"path": None} if isinstance(runnable, Router) else {}  # all have the same columns
            answers = {index: _unreadable(images, index) | no_path for index in batch.bad}
            if batch.indices:
                logits = padded_call(runnable, batch.pixel_values, batch_size).float()
                if not bool(logits.isfinite().all()):
                    raise MeasurementError(
                        f"the logits of {runnable.name} are not finite: its weights are broken or overflow"
                    )
                paths = paths_of(runnable, len(batch.indices))
                found = ranked(logits, names, runnable.outputs, top)
                for place, (index, classes) in enumerate(zip(batch.indices, found, strict=True)):
                    path = {"path": paths[place]} if paths else {}
                    answers[index] = {"image": images.ids[index], "classes": classes} | path
            for index in sorted(answers):
                yield answers[index]
            counted.advance(len(answers))


def distinct(names: Sequence[str]) -> list[str]:
    """Names of outputs; those that stand twice, as two of ImageNet's do, are told apart by their outputs."""
    counts = Counter(names)
    return [f"{name} (output {i})" if counts[name] > 1 else name for i, name in enumerate(names)]


def ranked(logits: torch.Tensor, names: Sequence[str], outputs: Outputs, top: int) -> list[list[dict[str, Any]]]:
    """For each row of `logits`, (images, outputs), the `top` classes, best first, as `classify` gives them."""
    wide = logits.double()
    best = (wide.softmax(-1) if outputs == "classes" else wide.sigmoid()).topk(min(top, len(names)))
    return [
        [{"label": names[i], "index": i, "percent": 100 * share} for share, i in zip(*row, strict=True)]
        for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def paths_of(runnable: AnyPrepared, images: int) -> list[Pass] | None:
    """Which pass answered each of the first `images` of the last call; None of what has one."""
    if not isinstance(runnable, Router):
        return None
    return ["second" if one else "first" for one in runnable.escalated[:images].tolist()]


def _unreadable(images: ImageSet, index: int) -> dict[str, Any]:
    try:
        images.image(index)
        reason = "it could be decoded only at the second attempt"
    except BadImageError as error:
        reason = str(error)
    return {"image": images.ids[index], "classes": [], "error": reason}
