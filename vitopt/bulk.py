"""Classes of any number of images, part by part: a run that was ended goes on where it stopped."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitopt import progress, storage
from vitopt.adaptive.runtime import prepare
from vitopt.data.shards import Part, parts_of
from vitopt.environment import devices, launch
from vitopt.errors import StorageError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.prediction import classify
from vitopt.recipe import RunSpec

logger = logging.getLogger(__name__)

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Bulk:
    """What was done: parts in all, those that stood already, images of this run, and those left out as unreadable."""

    parts: int
    stood: int
    images: int
    left_out: int


def predict_parts(
    source: str,
    paths: Sequence[Path],
    output: Path,
    write: Callable[[Rows], bytes],
    *,
    top: int,
    column: str | None = None,
    run: RunSpec | None = None,
    device: str = "auto",
    **options: Any,
) -> Bulk:
    """Classify the images of files, tar archives and Parquet files; one file of `output` for each part of them.

    A part's file is complete or absent, and its name holds what it depends on: checkpoint, run, options, and the names
    of its images or size and time of its archive. So
    no row is lost or there twice, however a run ends. `write`: rows to the content of a Parquet file. `column`: of
    image bytes in Parquet files. `options`: those of `vitopt.prediction.classify`. Under `accelerate launch` each
    process takes its share of the parts, and the main one writes.

    Raises:
        StorageError: the folder holds predictions of other images or by other means.
        BadImageError: an image cannot be decoded, and `skip_bad` is not set.
        DataError: an archive cannot be read.
    """
    checkpoint = open_checkpoint(source)
    run = run or RunSpec()
    skip_bad = bool(options.get("skip_bad", False))
    means = [checkpoint.fingerprint(), run.model_dump(mode="json"), top, skip_bad]
    parts = {_file_name(number, part, means): part for number, part in enumerate(parts_of(paths, column=column))}
    with launch.in_main_process(storage.claimed(output)):
        there = {file.name for file in output.glob("part-*.parquet")} if output.is_dir() else set()
        if foreign := sorted(there - set(parts)):
            raise StorageError(
                f"{output} holds {foreign[0]}, of other images, another checkpoint or other options: choose another "
                "--output, or delete the folder"
            )
        launch.wait_for_all()  # each has looked before one writes
        left = [name for name in parts if name not in there]
        if there and launch.is_main_process():
            logger.warning("%s: %d of %d parts stand", output, len(there), len(parts))
        images = left_out = 0
        if left:
            runnable = prepare(checkpoint, name=source, device=devices.resolve_device(device), run=run)
            rank, processes = launch.process_share()
            for begin in progress.track(range(0, len(left), processes), "parts", -(-len(left) // processes)):
                mine = left[begin : begin + processes][rank : rank + 1]
                done = [(name, _rows(runnable, parts[name], top, options)) for name in mine]
                answers = [(name, write(rows), len(rows), sum("error" in row for row in rows)) for name, rows in done]
                for name, content, some, bad in itertools.chain(*launch.gather_objects(answers)):
                    images, left_out = images + some - bad, left_out + bad
                    if launch.is_main_process():
                        storage.write_bytes(output / name, content)
    return Bulk(len(parts), len(there), images, left_out)


def _rows(runnable: Any, part: Part, top: int, options: dict[str, Any]) -> Rows:
    return list(classify(runnable, part.images(), top, **options))


def _file_name(number: int, part: Part, means: Sequence[Any]) -> str:
    digest = storage.sha256_of_json([list(part.stamp), *means])
    return f"part-{number:05d}-{digest[:12]}.parquet"
