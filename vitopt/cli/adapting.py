"""Checkpoints that do less for easy images."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitopt import storage
from vitopt.adaptive_spec import AdaptiveSpec, TargetSpec
from vitopt.cli.common import CheckpointArgument, DeviceOption, JsonOption, clear_errors, start
from vitopt.cli.options import Fields, calibration_fields, from_fields
from vitopt.cli.printing import out, print_json, say
from vitopt.cli.tables import Column, print_columns
from vitopt.errors import RecipeError
from vitopt.recipe import DataSpec, RunSpec
from vitopt.recipe_file import validate

if TYPE_CHECKING:
    from vitopt.adaptive.calibrated import Calibrated

app = typer.Typer(no_args_is_help=True, help="Do less for easy images: a cheap first pass, the whole for the others.")

_SHOWN = (0, 5, 10, 15, 20, 30, 50, 100)  # percent of escalated images, in the table of the curve


@from_fields()
def calibrate(
    *,
    checkpoint: CheckpointArgument,
    data: Annotated[DataSpec, calibration_fields()],
    low: Annotated[int | None, typer.Option(help="Side in pixels of the first pass's images.")] = None,
    draft: Annotated[
        str | None, typer.Option(help="Checkpoint of the first pass; without it CHECKPOINT at a lower resolution.")
    ] = None,
    target: Annotated[TargetSpec, Fields(("max_top1_loss", "escalation_rate", "confidence", "proxy", "images"))],
    high: Annotated[int | None, typer.Option(help="Side in pixels of the second pass: what CHECKPOINT takes.")] = None,
    first: Annotated[
        list[str] | None,
        typer.Option(help="How the first pass is run where that differs, OPTION=VALUE as in a recipe; repeatable."),
    ] = None,
    run: RunSpec,
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint of both passes.")],
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find when a first pass at lower resolution, or of a small draft model, is sure enough, and keep both as one.

    The output is evaluated, timed and called like any checkpoint.
    """
    content = target.model_dump(exclude_unset=True) | {"low": low, "draft": draft, "first": _options(first or [])}
    spec = validate(AdaptiveSpec, content, where="arguments")
    validate(RunSpec, run.model_dump() | spec.first, where="--first")
    start(as_json)
    from vitopt.adaptive.make import at_size, make, require_low
    from vitopt.data.images import open_images
    from vitopt.models.checkpoint import open_checkpoint

    second = open_checkpoint(checkpoint)
    if high is not None and second.image_size != (high, high):
        raise RecipeError(f"--high {high}: {checkpoint} takes {' x '.join(map(str, second.image_size))} pixels")
    first_pass = second if spec.draft is None else open_checkpoint(spec.draft)
    images = open_images(data.model_copy(update={"limit": spec.images}), "train")
    folders = second.folder, first_pass.folder, data.folder
    with storage.reserved(output, *folders), storage.temporary_folder() as folder:
        if spec.low is not None:
            require_low(first_pass, spec.low, second)
            first_pass = at_size(first_pass, spec.low, folder / "low")
        options: dict[str, Any] = {"images": images, "run": run, "skip_bad": data.skip_bad_images}
        made = make(first_pass, second, spec, output, device, **options)
    if as_json:
        print_json({"checkpoint": str(output)} | made.model_dump(mode="json", by_alias=True))
        return
    _print(made)
    say(f"checkpoint: {output}")


app.command()(clear_errors(calibrate))


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """`OPTION=VALUE` texts by option; an option alone is switched on."""
    pairs = [text.partition("=") for text in texts]
    return {name.replace("-", "_"): value if equals else True for name, equals, value in pairs}


def _print(made: "Calibrated") -> None:
    def words(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    chosen = made.rule.proxy
    columns = [
        Column("proxy", [f"{row.proxy}{' (taken)' if row.proxy == chosen else ''}" for row in made.proxies], text=True),
        Column("AUROC, other class", [words(row.auroc_changed) for row in made.proxies]),
        Column("AUROC, farthest tenth", [words(row.auroc_far) for row in made.proxies]),
        Column("Spearman, distance", [words(row.spearman) for row in made.proxies]),
    ]
    print_columns(out, f"Proxies on {made.images:,} calibration images", columns)
    points = [min(made.curve, key=lambda point: abs(point.escalated_percent - at)) for at in _SHOWN]
    points = list({point.escalated_percent: point for point in points}.values())
    curve = [
        Column("escalated %", [f"{point.escalated_percent:.1f}" for point in points]),
        Column("top-1 %", [f"{point.top1_percent:.1f}" for point in points]),
        Column("lost %", [f"{point.lost_percent:.2f}" for point in points]),
        Column("gained %", [f"{point.gained_percent:.2f}" for point in points]),
    ]
    print_columns(out, "What escalating them gives", curve)
    if made.distances is not None:
        told = ", ".join(f"{name} {value:.3g}" for name, value in made.distances.items())
        say(f"distance of the class tokens of both passes: {told}")
    threshold = "none" if made.rule.threshold is None else f"{made.rule.threshold:.4g}"
    say(f"threshold {threshold} of {chosen}, temperature {made.rule.temperature:.2f}: {made.promise}")
