"""The command line: arguments become specs, errors become one clear line.

Nothing heavy is imported before a command needs it, so that help and refused recipes answer at once.
"""

import signal
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from vitopt import __version__
from vitopt.cli import adapting
from vitopt.cli.benchmarking import benchmark
from vitopt.cli.common import clear_errors
from vitopt.cli.comparing import compare, plan
from vitopt.cli.exporting import export
from vitopt.cli.loading import load
from vitopt.cli.predicting import predict
from vitopt.cli.printing import out
from vitopt.cli.publishing import push
from vitopt.cli.quantizing import quantize, sensitivity
from vitopt.cli.recipes import report, run
from vitopt.cli.reducing import tokens
from vitopt.cli.running import evaluate
from vitopt.cli.serving import serve
from vitopt.cli.starting import doctor, init
from vitopt.cli.stepping import step_commands
from vitopt.cli.training import finetune

app = typer.Typer(
    name="vitopt",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# In the order of the help.
_commands: tuple[Callable[..., None], ...] = (
    run, finetune, *step_commands(), quantize, sensitivity, tokens, evaluate, benchmark, compare, plan, predict, serve,
    load, report, export, push, doctor, init,
)  # fmt: skip
for _command in _commands:
    app.command()(clear_errors(_command))
app.add_typer(adapting.app, name="adaptive")


def main() -> None:
    """Entry point of the console script."""
    # A terminated run cleans up after itself exactly like an interrupted one.
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make Vision Transformers small and fast, and prove what that cost."""
