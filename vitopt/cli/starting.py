"""What comes first: what this machine can run, and a recipe to begin with."""

import sys
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vitopt.cli.common import DeviceOption, JsonOption, start
from vitopt.cli.printing import out, print_json
from vitopt.recipe import Labels


def doctor(as_json: JsonOption = False, device: DeviceOption = "auto") -> None:
    """Tell what this machine can run and why it cannot run the rest."""
    start(as_json)
    from vitopt.environment import devices, machine

    facts = machine.diagnose(devices.resolve_device(device))
    if as_json:
        print_json(facts)
        return
    libraries = facts.pop("libraries")
    present = [f"{name} {version}" for name, version in libraries.items() if version is not None]
    absent = [name for name, version in libraries.items() if version is None]
    openmp = facts["machine"].pop("openmp")
    waiting = (
        ", ".join(f"{name}={value}" for name, value in openmp["waiting"].items()) or "as the library does by itself"
    )
    shown: dict[str, dict[str, Any]] = {
        "machine": facts["machine"]
        | {"OpenMP": f"{openmp['library'] or 'not loaded'}, threads wait: {waiting}", "libraries": ", ".join(present)}
        | {"not installed": ", ".join(absent) or "nothing is missing"},
        "can run": {
            name: Text("yes", "green") if reason is None else reason for name, reason in facts["can_run"].items()
        },
    }
    for title, rows in shown.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value if isinstance(value, Text) else _words(value))
        out.print(table)
        out.print()


def _words(value: Any) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value] if isinstance(value, bool | None) else str(value)


def init(
    model: Annotated[str, typer.Argument(help="Checkpoint to start from.")],
    data: Annotated[str, typer.Argument(help="Images to fine-tune and measure on.")],
    name: Annotated[str, typer.Option(help="Name of the run.")] = "my-run",
    labels: Annotated[
        Labels, typer.Option(help="name, or index: labels are numbers that count the head's outputs from 0.")
    ] = "name",
) -> None:
    """Print a recipe for a model and a data set, fitted to this machine."""
    start(as_json=False)
    from vitopt.starting import starting_recipe

    sys.stdout.write(starting_recipe(model, data, name, labels))
    sys.stdout.flush()
