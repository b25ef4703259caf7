"""What commands share: arguments that mean the same everywhere, the start of the work, errors as one clear line."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vitopt import progress
from vitopt.cli.printing import err, say
from vitopt.errors import VitoptError
from vitopt.terminal import NoteFormatter
from vitopt.threads import bind, wait_briefly

CheckpointArgument = Annotated[
    str, typer.Argument(help="Folder, hub id, [b]vit-quickstart[/b], or random:vit-large-patch16-224.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Only JSON on standard output, no bars.")]
LogToOption = Annotated[
    list[str] | None, typer.Option(help="mlflow, tensorboard (files beside the output) or wandb; repeatable.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Refuse instead of falling back to SDPA.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Compute on the CPU with this many threads, each bound to its own core.")
]
WideOption = Annotated[bool, typer.Option("--wide", help="All columns, in further tables where they do not fit.")]


def clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print a VitoptError as one line and exit with 1; Ctrl-C exits with 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except VitoptError as error:
            err.print("error:", style="bold red", end=" ")
            err.print(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err.print("interrupted: finished stages are kept; the same command goes on from there")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of our output has closed the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return wrapped


def start(as_json: bool, threads: int | None = None) -> None:
    """Set up what every working command needs: bound threads, quiet libraries, notices, bars for a person at a
    terminal, lines for a log file."""
    # Before anything imports torch. Bound threads have the machine alone and wait as their library does.
    if threads is not None:
        bind(threads)
    else:
        wait_briefly()
    from vitopt.environment import launch, libraries

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
    if os.environ.get("VITOPT_LOG") == "info":  # each variant is told of as soon as it is warm
        logging.getLogger("vitopt").setLevel(logging.INFO)
    logging.root.handlers[0].setFormatter(NoteFormatter("note: %(message)s"))
    libraries.quiet_libraries()
    if as_json or not launch.is_main_process():
        progress.enable("off")
    else:
        progress.enable("bars" if sys.stderr.isatty() else "lines")


def add_card(folder: Path) -> None:
    """Write the model card of a checkpoint that was just made; the machine that made it may lack the package for it."""
    from vitopt.environment import launch, support

    if not support.installed("jinja2"):
        say("model card: left out, jinja2 not installed")
    elif launch.is_main_process():
        from vitopt.report.card import write_card_without_figures

        write_card_without_figures(folder)
