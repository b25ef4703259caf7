"""A checkpoint that is run and measured on images."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitopt import storage
from vitopt.cli.common import (
    CheckpointArgument,
    DeviceOption,
    JsonOption,
    StrictOption,
    ThreadsOption,
    WideOption,
    start,
)
from vitopt.cli.options import Fields, from_fields
from vitopt.cli.printing import print_json, print_kept_layers, print_table
from vitopt.errors import MeasurementError, RecipeError
from vitopt.recipe import DataSpec, EvaluateSpec, RunSpec
from vitopt.records import RECORD_FILE, Record

if TYPE_CHECKING:
    from vitopt.inference import Candidate
    from vitopt.measure.evaluator import Measured

EXPANDS = "expand packed layers (nf4, int8) to this format at load; adds a row"
RunOptions = Annotated[RunSpec, Fields(help={"run_as": EXPANDS})]
LATENCY = ("latency.batch_sizes", "latency.iterations", "latency.rounds")


@from_fields()
def evaluate(
    *,
    checkpoint: CheckpointArgument,
    data: Annotated[
        DataSpec,
        Fields(
            ("source", "root", "limit", "labels", "group_column", "skip_bad_images"),
            named={"source": "data", "root": "data_root"},
        ),
    ],
    baseline: Annotated[str | None, typer.Option(help="Checkpoint to compare with, image by image.")] = None,
    run: RunOptions,
    evaluate: Annotated[
        EvaluateSpec,
        Fields(("batch_size", *LATENCY, "workers", "look_alikes"), named={"latency.batch_sizes": "latency_batch_size"}),
    ],
    ray: Annotated[
        bool, typer.Option("--ray", help="Accuracy by a process for each GPU of Ray's machines, all else here.")
    ] = False,
    strict: StrictOption = False,
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for record.json and predictions.parquet.")] = None,
    threads: ThreadsOption = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy, latency, size and memory of a checkpoint."""
    start(as_json, threads)
    from vitopt.data.images import open_images

    sources = [checkpoint] if baseline is None else [baseline, checkpoint]
    candidates = candidates_of(sources, run, expanded=[checkpoint])
    from vitopt import inference

    with claimed(output, data.folder, *sources):
        measured = inference.measure(
            candidates,
            evaluate,
            images=open_images(data, None),
            skip_bad=data.skip_bad_images,
            baseline=candidates[0].name if baseline is not None else None,
            device=device,
            strict=strict,
            ray=ray,
        )
        if not measured:
            return  # not the main process
        if output is not None:
            keep(measured[-1], output)
    record = measured[-1].record
    if as_json:
        print_json(record.to_json())
    else:
        print_table([result.record for result in measured], wide=wide)
        print_kept_layers([result.record for result in measured])
    exit_if_failed(result.record for result in measured)


def names_of(sources: Sequence[str]) -> dict[str, str]:
    """A name for each checkpoint -> the checkpoint.

    Raises:
        RecipeError: one is given twice.
    """
    short = [source.rstrip("/").rsplit("/", 1)[-1] for source in sources]
    # Folders of one name are told apart by their whole path; names are also folder names, so without slashes.
    whole = [source.strip("/.").replace("/", "_") for source in sources]
    names = [long if short.count(name) > 1 else name for long, name in zip(whole, short, strict=True)]
    if len(set(names)) < len(names):
        raise RecipeError("the same checkpoint is given twice; compare two different ones")
    return dict(zip(names, sources, strict=True))


def candidates_of(sources: Sequence[str], run: RunSpec, expanded: Sequence[str]) -> list["Candidate"]:
    """One candidate per source and, with `run_as`, one more for each of `expanded`: packed layers beside expanded
    ones, so that the memory of the one and the speed of the other are both seen."""
    from vitopt.inference import Candidate

    packed = run.model_copy(update={"run_as": None})
    candidates = []
    for name, source in names_of(sources).items():
        candidates.append(Candidate(name, source, packed))
        if run.run_as is not None and source in expanded:
            candidates.append(Candidate(f"{name}-as-{run.run_as}", source, run))
    return candidates


def exit_if_failed(records: Iterable[Record]) -> None:
    failures = [f"{record.variant.name} failed: {record.failure}" for record in records if record.failure]
    if failures:
        raise MeasurementError("; ".join(failures))


def claimed(
    output: Path | None, *inputs: str | Path | None, folders: Iterable[str] = (".",)
) -> AbstractContextManager[None]:
    """Take `output` for the records of its `folders` before they are measured; nothing to take without one."""
    from vitopt.environment import launch

    files = [f"{folder}/{name}" for folder in folders for name in (RECORD_FILE, "predictions.parquet")]
    if output is None:
        return nullcontext()
    return launch.in_main_process(storage.claimed(output, *inputs, files=files))


def keep(measured: "Measured", folder: Path) -> None:
    from vitopt.measure.predictions import save_predictions
    from vitopt.records import save_record

    save_record(measured.record, folder)
    if measured.predictions is not None:
        save_predictions(measured.predictions, folder)
