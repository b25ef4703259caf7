"""A command for each kind of step but those that train, made of the table of steps."""

import inspect
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
    return [_command(name) for name, kind in STEPS.items() if kind.images != "training"]


def _command(name: str) -> Callable[..., None]:
    kind = STEPS[name]

    def command(
        *,
        checkpoint: CheckpointArgument,
        data: Any = None,
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
        with storage.reserved(output, opened.folder, data.folder if data else None):
            images = data and open_images(data.model_copy(update={"limit": settings.images}), settings.split)
            made = pkgutil.resolve_name(kind.function)(opened, settings, output, device, images=images, seed=seed)
            add_card(output)
        if as_json:
            count = {} if images is None else {"images": len(images)}
            print_json({"checkpoint": str(output), **count, "summary": made.summary()})
            return
        say(made.summary() if images is None else f"{made.summary()} on {len(images)} images")
        say(f"checkpoint: {output}")

    options = tuple(field for field in kind.spec.model_fields if field != "split")  # DATA:SPLIT names it
    command.__annotations__["settings"] = Annotated[kind.spec, Fields(options, named={"images": "limit"})]
    command.__annotations__["data"] = Annotated[DataSpec, calibration_fields()]
    command.__name__, command.__doc__ = name, kind.spec.__doc__
    if kind.images is None:
        signature = inspect.signature(command)
        others = [parameter for parameter in signature.parameters.values() if parameter.name != "data"]
        command.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
    return from_fields()(command)
