"""What comes first: what this machine can run, and a recipe to begin with."""

import sys
from typing import Annotated

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
    yes = Text("yes", "green")
    for title, section in facts.items():
        table = Table(title=title.replace("_", " "), title_justify="left", show_header=False, box=None)
        for name, value in section.items():
            mark = {None: yes, True: yes, False: Text("no")}.get(value) if title == "can_run" else None
            table.add_row(name, mark or ("not installed" if value is None else str(value)))
        out.print(table)
        out.print()


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
