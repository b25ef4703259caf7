"""Checkpoints timed against each other: as they are, in several formats, run in several ways."""

import csv
import io
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

import typer

from vitopt import storage
from vitopt.cli.common import DeviceOption, JsonOption, StrictOption, ThreadsOption, WideOption, start
from vitopt.cli.options import Fields, from_fields, refuse
from vitopt.cli.printing import print_json, print_table
from vitopt.cli.running import LATENCY, RunOptions, candidates_of, claimed, exit_if_failed, keep, names_of
from vitopt.errors import RecipeError, StorageError
from vitopt.formats import Format
from vitopt.recipe import EvaluateSpec, RunSpec, VariantSpec, suggest
from vitopt.recipe_file import validate
from vitopt.records import Latency, Record
from vitopt.terminal import spreadsheet_text

if TYPE_CHECKING:
    from vitopt.inference import Candidate
    from vitopt.measure.evaluator import Measured

EAGER = "eager"  # a way to run with no option set


def _refuse_two_answers(context: typer.Context) -> None:
    if context.params["runs"]:
        refuse(context, "compile", "autotune", "compile_whole", because="--run already says which rows are compiled")


@from_fields(_refuse_two_answers)
def benchmark(
    *,
    checkpoints: Annotated[list[str], typer.Argument(help="Folders, hub ids or random:ARCHITECTURE.")],
    formats: Annotated[
        str | None, typer.Option("--format", help="Make each checkpoint in these formats, as in fp32,bf16,nf4,w8a8.")
    ] = None,
    runs: Annotated[
        str | None,
        typer.Option("--run", help="Run each in these ways, options joined by +: eager,compile,compile+fuse-qkv."),
    ] = None,
    run: RunOptions,
    evaluate: Annotated[
        EvaluateSpec, Fields((*LATENCY, "throughput", "roofline"), named={"latency.batch_sizes": "batch_size"})
    ],
    strict: StrictOption = False,
    device: DeviceOption = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder that gets one record per row.")] = None,
    table: Annotated[Path | None, typer.Option("--csv", help="New file: a line for each row and batch size.")] = None,
    threads: ThreadsOption = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Time checkpoints, formats and ways to run against each other, interleaved; the first row is the baseline."""
    wanted = _formats(formats)
    ways = _ways_to_run(runs, run)
    if table is not None and table.exists():
        raise StorageError(f"{table} exists already: choose another --csv")
    start(as_json, threads)
    from vitopt import inference
    from vitopt.environment import devices, support

    for format in wanted:
        support.require_format(format, devices.resolve_device(device))
    rows = _rows(checkpoints, wanted, ways)
    places = {row.name: f"variants/{row.name.replace(' ', '+')}" for row in rows}
    with claimed(output, *checkpoints, folders=places.values()), tempfile.TemporaryDirectory() as folder:
        candidates = list(_candidates(rows, Path(folder), device))
        measured = inference.measure(candidates, evaluate, baseline=rows[0].name, device=device, strict=strict)
        if not measured:
            return  # not the main process
        measured = [_of_source(result, {row.name: row.checkpoint for row in rows}) for result in measured]
        if output is not None:
            for result in measured:
                keep(result, output / places[result.record.variant.name])
    records = [result.record for result in measured]
    if table is not None:
        storage.write_text(table, _csv(records))
    print_json([record.to_json() for record in records]) if as_json else print_table(records, wide=wide)
    exit_if_failed(records)


def _formats(text: str | None) -> list[Format]:
    names = list(dict.fromkeys(text.split(","))) if text is not None else []
    for name in names:
        if name not in get_args(Format):
            raise RecipeError(f"--format: no format {name!r}; {suggest(name, get_args(Format))}")
    return names  # type: ignore[return-value]


def _ways_to_run(text: str | None, shared: RunSpec) -> dict[str, RunSpec]:
    """By the words of `--run`; a word is an option that is switched on, or `option=value`."""
    ways = {}
    for words in text.split(",") if text is not None else [""]:
        content = shared.model_dump(exclude_unset=True)
        for word in words.split("+") if words not in ("", EAGER) else []:
            option, _, value = word.partition("=")
            content[option.replace("-", "_")] = value or True
        ways[words] = validate(RunSpec, content, where=f"--run {words}" if words else "arguments")
    return ways


class _Row(NamedTuple):
    name: str
    checkpoint: str
    format: Format | None  # None: as it is
    run: RunSpec


def _rows(checkpoints: Sequence[str], formats: Sequence[Format], ways: Mapping[str, RunSpec]) -> list[_Row]:
    """Each checkpoint in each format, run in each way; as it is without formats, see `candidates_of` without ways."""
    if not formats and list(ways) == [""]:
        return [
            _Row(candidate.name, str(candidate.source), None, candidate.run)
            for candidate in candidates_of(checkpoints, ways[""], expanded=checkpoints)
        ]
    return [
        _Row(" ".join(filter(None, [name, format, words.replace("+", " ")])), checkpoint, format, run)
        for name, checkpoint in names_of(checkpoints).items()
        for format in formats or (None,)
        for words, run in ways.items()
    ]


def _candidates(rows: Sequence[_Row], folder: Path, device: str) -> Iterator["Candidate"]:
    """What is measured; checkpoints in other formats are made in `folder`."""
    from vitopt.inference import Candidate, made
    from vitopt.models.checkpoint import open_checkpoint

    for number, (checkpoint, group) in enumerate(itertools.groupby(rows, key=lambda row: row.checkpoint)):
        same = list(group)
        # A variant's name may hold no spaces; the candidate's may.
        variants = [
            validate(VariantSpec, {"name": "variant", "format": row.format, **dict(row.run)}, where=row.name)
            for row in same
            if row.format
        ]
        if not variants:
            yield from (Candidate(row.name, checkpoint, row.run) for row in same)
            continue
        for row, candidate in zip(
            same, made(open_checkpoint(checkpoint), variants, folder / str(number), device), strict=True
        ):
            yield replace(candidate, name=row.name)


def _of_source(measured: "Measured", sources: Mapping[str, str]) -> "Measured":
    """The same, with the checkpoint that was given as the model's source and not a temporary one."""
    model = measured.record.model
    if model is None:
        return measured
    named = model.model_copy(update={"source": sources[measured.record.variant.name]})
    return replace(measured, record=measured.record.model_copy(update={"model": named}))


def _csv(records: Sequence[Record]) -> str:
    """A line for each row and batch size; columns have the names that they have in the records."""
    lines = [_cells(record, row) for record in records for row in record.latency or (None,)]
    columns = max(lines, key=len)
    text = io.StringIO()
    written = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    written.writeheader()
    written.writerows(lines)
    return text.getvalue()


def _cells(record: Record, row: Latency | None) -> dict[str, Any]:
    variant, model, size, memory = record.variant, record.model, record.size, record.memory
    cells: dict[str, Any] = {
        "variant": spreadsheet_text(variant.name),
        "checkpoint": spreadsheet_text(model.source) if model else None,
        "format": variant.format,
        **{option: variant.ran.get(option) for option in RunSpec().options},
        "failure": spreadsheet_text(record.failure) if record.failure else None,
        "weight_bytes": size.weight_bytes if size else None,
        "disk_bytes": size.disk_bytes if size else None,
        "peak_memory_bytes": memory.peak_bytes if memory else None,
    }
    for name, value in row.model_dump(exclude={"samples_ms", "device_samples_ms"}).items() if row else ():
        if "_ci95" in name:
            low, high = value or (None, None)
            cells |= {name.replace("_ci95", "_ci95_low"): low, name.replace("_ci95", "_ci95_high"): high}
        else:
            cells[name] = value
    return cells
