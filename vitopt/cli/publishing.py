"""A checkpoint to the Hugging Face hub."""

from typing import Annotated

import typer

from vitopt import progress
from vitopt.cli.common import JsonOption, start
from vitopt.cli.printing import out, print_json


def push(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Who may see it.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is not there; main without it.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a checkpoint and its model card to the Hugging Face hub, and nothing else of its folder."""
    start(as_json)
    from vitopt.models.checkpoint import open_checkpoint
    from vitopt.models.publish import push as upload

    opened = open_checkpoint(checkpoint)
    with progress.task("uploading", None):
        commit = upload(opened, repository, private=private, revision=revision)
    print_json({"repository": repository, "commit": commit}) if as_json else out.print(f"pushed: {commit}")
