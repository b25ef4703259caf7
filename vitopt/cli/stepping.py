"""A command for each kind of step that learns from calibration images, made of the table of steps."""

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vitopt import storage
from vitopt.cli.common import CheckpointArgument, DeviceOption, JsonOption, add_card, start
from vitopt.cli.options import Fields, calibration_fields, from_fields
from vitopt.cli.printing import print_json, say
from vitopt.recipe import DataSpec
from vitopt.steps import STEPS


def step_commands() -> list[Callable[..., None]]:
    """In the order of the table. A kind that trains has a command of its own, as it tells more."""
    return [_command(name) for name, kind in STEPS.items() if kind.images == "calibration"]


def _command(name: str) -> Callable[..., None]:
    kind = STEPS[name]

    def command(
        *,
        checkpoint: CheckpointArgument,
        data: Annotated[DataSpec, calibration_fields()],
        output: Annotated[Path, typer.Option(help="Folder for the checkpoint.")],
        settings: Any,
        seed: Annotated[int, typer.Option(help="Seed of what is chosen by chance.")] = 0,
        device: DeviceOption = "auto",
        as_json: JsonOption = False,
    ) -> None:
        start(as_json)
        from vitopt.data.images import open_images
        from vitopt.models.checkpoint import open_checkpoint

        opened = open_checkpoint(checkpoint)
        with storage.reserved(output, opened.folder, data.folder):
            images = open_images(data.model_copy(update={"limit": settings.images}), settings.split)
            made = pkgutil.resolve_name(kind.function)(opened, settings, output, device, images=images, seed=seed)
            add_card(output)
        if as_json:
            print_json({"checkpoint": str(output), "images": len(images), "summary": made.summary()})
            return
        say(f"{made.summary()} on {len(images)} images")
        say(f"checkpoint: {output}")

    options = tuple(field for field in kind.spec.model_fields if field != "split")  # DATA:SPLIT names it
    command.__annotations__["settings"] = Annotated[kind.spec, Fields(options, named={"images": "limit"})]
    command.__name__, command.__doc__ = name, kind.spec.__doc__
    return from_fields()(command)
