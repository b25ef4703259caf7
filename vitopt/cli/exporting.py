"""A checkpoint as another runtime takes it."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitopt import progress, storage
from vitopt.cli.common import CheckpointArgument, DeviceOption, JsonOption, start
from vitopt.cli.options import Fields, from_fields
from vitopt.cli.printing import print_json, say
from vitopt.errors import RecipeError
from vitopt.formats import QUANTIZED_FORMATS
from vitopt.recipe import ENGINES, CalibrationSpec, DataSpec, RunSpec, VariantSpec, computes_itself
from vitopt.recipe_file import validate


@from_fields()
def export(
    *,
    checkpoint: CheckpointArgument,
    engine: Annotated[
        Literal["openvino", "onnxruntime", "tensorrt", "aoti"], typer.Option(help="Runtime that the files are for.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the model file and an example that runs it.")],
    format: Annotated[
        str | None, typer.Option(help="fp32, bf16 or w8a8; without it that of the checkpoint, or of its variant.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="With w8a8: layers that stay in bf16, repeatable.")] = None,
    data: Annotated[
        DataSpec | None,
        Fields(
            ("source", "root", "limit", "labels"),
            named={"source": "data", "root": "data_root"},
            help={
                "source": "with w8a8: images that fix the scales of activations, never your test images; faster",
                "limit": "at most so many images, spread over the classes",
            },
        ),
    ],
    run: Annotated[RunSpec, Fields(ENGINES["aoti"].options)],
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write what another runtime needs to classify photos without vitopt and transformers.

    aoti and tensorrt write for this kind of device alone. aoti compiles torch's own model, with its options.
    """
    if data is not None and format not in QUANTIZED_FORMATS:
        raise RecipeError("--data: only a quantized --format, as w8a8, is calibrated on images")
    content: dict[str, Any] = {"name": "export", "format": format or "fp32", "skip": skip or [], "engine": engine}
    content |= run.model_dump(include=run.model_fields_set)
    if data is not None:
        if not computes_itself(engine):
            raise RecipeError(f"--data: {engine} takes the scales that `vitopt calibrate` left beside the checkpoint")
        content["static_scales"] = True
    variant = validate(VariantSpec, content, where="export")
    if variant.skips_automatically:
        raise RecipeError(
            f"--skip auto: `vitopt quantize --skip auto --engine {engine}` chooses, then export takes that"
        )
    start(as_json)
    from vitopt.data.images import open_images
    from vitopt.engines.package import export as write
    from vitopt.models.checkpoint import open_checkpoint
    from vitopt.report.card import write_card_of_export

    opened, images = open_checkpoint(checkpoint), None
    with storage.reserved(output, opened.folder, data.folder if data else None):
        if data is not None:
            limited = data.model_copy(update={"limit": data.limit or CALIBRATION_IMAGES})
            images = open_images(limited, CalibrationSpec().split)
        with progress.task(f"exporting to {engine}", None):
            made = write(
                opened, variant, output, device, images=images, as_it_is=format is None and not run.model_fields_set
            )
        write_card_of_export(opened, made, output)
    files = sorted(file.name for file in output.iterdir() if not file.name.startswith("."))
    if as_json:
        print_json({"folder": str(output), "engine": engine, "format": made.format, "files": files})
        return
    say(f"{made.format} for {engine} {made.version}: {', '.join(files)}")
    say(f"try it: python {output / 'example.py'} photo.jpg")


CALIBRATION_IMAGES = 300
