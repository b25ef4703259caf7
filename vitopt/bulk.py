"""Classes of any number of images, part by part: a run that was ended goes on where it stopped."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitopt import progress, storage
from vitopt.adaptive.runtime import prepare
from vitopt.data.shards import Part, parts_of
from vitopt.environment import devices, launch
from vitopt.environment.cluster import answers_of_cluster
from vitopt.errors import StorageError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.prediction import classify
from vitopt.recipe import RunSpec

logger = logging.getLogger(__name__)

Write = Callable[[Sequence[dict[str, Any]]], bytes]


@dataclass(frozen=True)
class Bulk:
    """What was done: parts in all, those that stood already, images of this run, and those left out as unreadable."""

    parts: int
    stood: int
    images: int
    left_out: int


@dataclass(frozen=True)
class _Done:
    """The content of a part's file, and how many of its images were classified and left out."""

    name: str
    content: bytes
    images: int
    left_out: int


class _Classifier:
    """A model that is loaded once and classifies parts by their names."""

    def __init__(
        self, source: str, run: RunSpec, device: str, parts: Mapping[str, Part], write: Write, options: dict[str, Any]
    ) -> None:
        self._runnable = prepare(open_checkpoint(source), name=source, device=devices.resolve_device(device), run=run)
        self._parts, self._write, self._options = parts, write, options

    def __call__(self, name: str) -> _Done:
        rows = list(classify(self._runnable, self._parts[name].images(), **self._options))
        left_out = sum("error" in row for row in rows)
        return _Done(name, self._write(rows), len(rows) - left_out, left_out)


def predict_parts(
    source: str,
    paths: Sequence[Path],
    output: Path,
    write: Write,
    *,
    column: str | None = None,
    run: RunSpec | None = None,
    device: str = "auto",
    ray: bool = False,
    **options: Any,
) -> Bulk:
    """Classify the images of files, tar archives and Parquet files; one file of `output` for each part of them.

    A part's file is complete or absent, and its name holds what it depends on: checkpoint, run, options, and the names
    of its images or size and time of its archive. So no row is lost or there twice, however a run ends.

    `write`: rows to the content of a Parquet file. `column`: of image bytes in Parquet files. `options`: those of
    `vitopt.prediction.classify`. Under `accelerate launch` each process takes its share of the parts, with `ray` each
    process of Ray (`vitopt.environment.cluster`); the main process writes.

    Raises:
        StorageError: the folder holds predictions of other images or by other means.
        BadImageError: an image cannot be decoded, and `skip_bad` is not set.
        DataError: an archive cannot be read.
        UnsupportedError: Ray is asked for and not installed, or asked for under `accelerate launch`.
    """
    run = run or RunSpec()
    skip_bad = bool(options.get("skip_bad", False))
    means = [open_checkpoint(source).fingerprint(), run.model_dump(mode="json"), options["top"], skip_bad]
    parts = {_file_name(number, part, means): part for number, part in enumerate(parts_of(paths, column=column))}
    with launch.in_main_process(storage.claimed(output)):
        there = {file.name for file in output.glob("part-*.parquet")} if output.is_dir() else set()
        if foreign := sorted(there - set(parts)):
            raise StorageError(
                f"{output} holds {foreign[0]}, of other images, another checkpoint or other options: choose another "
                "--output, or delete the folder"
            )
        launch.wait_for_all()  # each has looked before one writes
        left = {name: part for name, part in parts.items() if name not in there}
        if there and launch.is_main_process():
            logger.warning("%s: %d of %d parts stand", output, len(there), len(parts))
        images = left_out = 0
        if left:
            make = functools.partial(_Classifier, source, run, device, left, write, options)
            finished = answers_of_cluster(make, list(left), device) if ray else _in_turn(make(), list(left))
            for done in progress.track(finished, "parts", len(left)):
                images, left_out = images + done.images, left_out + done.left_out
                if launch.is_main_process():
                    storage.write_bytes(output / done.name, done.content)
    return Bulk(len(parts), len(there), images, left_out)


def _in_turn(classify_part: _Classifier, names: Sequence[str]) -> Iterator[_Done]:
    """The parts of all processes of this launch, each of which takes its share."""
    rank, processes = launch.process_share()
    for begin in range(0, len(names), processes):
        mine = [classify_part(name) for name in names[begin : begin + processes][rank : rank + 1]]
        yield from itertools.chain(*launch.gather_objects(mine))


def _file_name(number: int, part: Part, means: Sequence[Any]) -> str:
    digest = storage.sha256_of_json([list(part.stamp), *means])
    return f"part-{number:05d}-{digest[:12]}.parquet"
