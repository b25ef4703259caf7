"""Classes of images, printed or written as a table."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vitopt import storage
from vitopt.cli.common import CheckpointArgument, DeviceOption, JsonOption, ThreadsOption, start
from vitopt.cli.options import Fields, from_fields
from vitopt.cli.printing import err, out, print_json
from vitopt.errors import RecipeError, StorageError
from vitopt.recipe import EvaluateSpec, RunSpec
from vitopt.terminal import spreadsheet_text

Predictions = Sequence[dict[str, Any]]


@from_fields()
def predict(
    *,
    checkpoint: CheckpointArgument,
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns like 'photos/*.jpg', or - for names on stdin.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 5,
    evaluate: Annotated[
        EvaluateSpec, Fields(("batch_size", "workers"), help={"batch_size": "images per call of the model"})
    ],
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be decoded, and list them.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="New .csv, .json, .jsonl or .parquet; or a folder of parts: the same command goes on."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of image bytes in Parquet files.")] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="With a folder as --output: a process for each GPU of Ray's machines.")
    ] = False,
    run: RunSpec,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify images."""
    in_parts = output is not None and (output.is_dir() or not output.suffix)
    write = _parquet if in_parts else _writer(output)
    start(as_json, threads)
    from vitopt.prediction import image_paths, predict

    options: dict[str, Any] = {
        "run": run,
        "device": device,
        "batch_size": evaluate.batch_size,
        "workers": evaluate.workers,
    }
    paths, options["skip_bad"] = image_paths(_names(images)), skip_bad_images
    if in_parts:
        assert output is not None
        from vitopt.bulk import predict_parts

        done = predict_parts(checkpoint, paths, output, write, top=top, column=column, ray=ray, **options)
        if as_json:
            print_json(asdict(done))
        bad = f", {done.left_out:,} could not be decoded" if done.left_out else ""
        stood = f", {done.stood:,} of them from before" if done.stood else ""
        err.print(f"{done.images:,} images classified{bad}; {done.parts:,} parts in {output}{stood}")
        return
    if ray:
        raise RecipeError("--ray works in parts: give a folder as --output")
    if column is not None or any(path.suffix.lower() in (".tar", ".parquet") for path in paths):
        raise RecipeError("tar and Parquet files are read in parts: give a folder as --output")
    predictions = list(predict(checkpoint, paths, top=top, **options))
    if output is not None:
        storage.write_bytes(output, write(predictions))
    if as_json:
        print_json(predictions)
    elif output is None:
        for prediction in predictions:
            path = f"  ({prediction['path']} pass)" if prediction.get("path") else ""
            out.print(prediction["image"], style="bold", end=f"{path}\n")
            for guess in prediction["classes"]:
                out.print(f"  {guess['percent']:5.1f} %  {guess['label']}")
    left_out = [prediction for prediction in predictions if "error" in prediction]
    for prediction in left_out:
        err.print(f"left out: {prediction['error']}")
    if output is not None:
        err.print(f"{len(predictions) - len(left_out):,} of {len(predictions):,} images classified: {output}")


def _names(arguments: Iterable[str]) -> Iterator[str]:
    """The arguments, with the lines of standard input in place of `-`."""
    for name in arguments:
        if name == "-":
            yield from filter(None, (line.rstrip("\r\n") for line in sys.stdin))
        else:
            yield name


def _writer(output: Path | None) -> Callable[[Predictions], bytes]:
    """What makes the content of `output`, by its ending; refused before the long work where it cannot be written."""
    if output is None:
        return lambda predictions: b""
    if output.suffix not in _WRITERS:
        raise RecipeError(f"--output {output} must end in {', '.join(_WRITERS)}")
    if output.exists():
        raise StorageError(f"{output} exists already: choose another --output")
    return _WRITERS[output.suffix]


def _json(predictions: Predictions) -> bytes:
    return (json.dumps(predictions, indent=2, allow_nan=False) + "\n").encode()


def _json_lines(predictions: Predictions) -> bytes:
    return "".join(json.dumps(prediction, allow_nan=False) + "\n" for prediction in predictions).encode()


def _csv(predictions: Predictions) -> bytes:
    """A row per image: `image,label_1,percent_1,…,error`, and `path` of an adaptive model."""
    ranks = max(len(prediction["classes"]) for prediction in predictions)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    paths = ["path"] if any("path" in prediction for prediction in predictions) else []
    table.writerow(
        ["image", *(f"{key}_{rank}" for rank in range(1, ranks + 1) for key in ("label", "percent")), "error", *paths]
    )
    for prediction in predictions:
        cells = [spreadsheet_text(prediction["image"])]
        for guess in prediction["classes"]:
            cells += [spreadsheet_text(guess["label"]), f"{guess['percent']:.4f}"]
        cells += [""] * (1 + 2 * ranks - len(cells))
        error, path = spreadsheet_text(prediction.get("error", "")), [prediction.get("path", "")] if paths else []
        table.writerow([*cells, error, *path])
    return text.getvalue().encode()


def _parquet(predictions: Predictions) -> bytes:
    """Columns `image`, `labels` and `percents` (lists, best first), `error`, and `path` of an adaptive model."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "image": [prediction["image"] for prediction in predictions],
        "labels": [[guess["label"] for guess in prediction["classes"]] for prediction in predictions],
        "percents": [[guess["percent"] for guess in prediction["classes"]] for prediction in predictions],
        "error": [prediction.get("error") for prediction in predictions],
    }
    types = [("image", pyarrow.string()), ("labels", pyarrow.list_(pyarrow.string()))]
    types += [("percents", pyarrow.list_(pyarrow.float64())), ("error", pyarrow.string())]
    if any("path" in prediction for prediction in predictions):
        columns["path"] = [prediction.get("path") for prediction in predictions]
        types.append(("path", pyarrow.string()))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=pyarrow.schema(types)), buffer)
    return buffer.getvalue()


_WRITERS = {".csv": _csv, ".json": _json, ".jsonl": _json_lines, ".parquet": _parquet}
