"""Stored results: compared, judged by limits, and planned for."""

from pathlib import Path
from typing import Annotated

import typer

from vitopt import storage
from vitopt.cli.common import JsonOption, WideOption, start
from vitopt.cli.options import Fields, from_fields
from vitopt.cli.printing import out, print_json, print_needs, print_table
from vitopt.errors import RecipeError, StorageError
from vitopt.recipe import RequireSpec

# What can be planned for: bytes are known without measuring.
MEASURED = tuple(name for name in RequireSpec.model_fields if name != "max_megabytes")


@from_fields()
def compare(
    *,
    baseline: Annotated[Path, typer.Argument(help="record.json or its folder: what to compare with.")],
    variant: Annotated[Path, typer.Argument(help="record.json or its folder: what is compared.")],
    require: RequireSpec,
    markdown: Annotated[Path | None, typer.Option(help="File for a summary, as of a pull request.")] = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two stored results image by image; refuses results over different images.

    With any limit it is a gate: it ends with 0 if the 95 % intervals show all limits met, with 3 if one is shown to
    be missed, else with 4.
    """
    start(as_json)
    if markdown is not None:
        _refuse_to_overwrite(markdown)
    from vitopt.measure.comparison import compare_stored
    from vitopt.measure.gate import judge, overall

    comparison = compare_stored(baseline, variant)
    before, after = comparison.records
    required = judge(require, after, before)
    records = before, after.model_copy(update={"requirements": required})
    if markdown is not None:
        from vitopt.report.table import pull_request

        storage.write_text(markdown, pull_request(records))
    if as_json:
        gate = {
            "decision": overall(required),
            "requirements": [requirement.model_dump(mode="json") for requirement in required],
        }
        print_json(comparison.to_json() | (gate if required else {}))
    else:
        print_table(records, wide=wide)
        for line in comparison.lines():
            out.print(f"• {line}")
    raise typer.Exit({"shown": 0, "failed": 3, "undecided": 4}[overall(required)])


def _refuse_to_overwrite(markdown: Path) -> None:
    from vitopt.report.table import SUMMARY_MARK

    there = markdown.is_dir() or (markdown.exists() and markdown.stat().st_size > 0)
    if there and not (markdown.is_file() and markdown.read_bytes().startswith(SUMMARY_MARK.encode())):
        raise StorageError(
            f"{markdown} exists and is not a summary of an earlier comparison: choose another --markdown"
        )


@from_fields()
def plan(
    *,
    require: Annotated[RequireSpec, Fields(MEASURED)],
    pilot: Annotated[
        Path | None,
        typer.Option(help="Record of a first, small comparison; its rates are assumed to be the true ones."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say how many images and calls a claim needs, before anything is measured."""
    if not require.limits:
        raise RecipeError("nothing to plan for: give at least one limit, as in --max-top1-drop 0.5")
    from vitopt.measure.planning import needs
    from vitopt.records import load_record

    planned = needs(require, load_record(pilot) if pilot else None)
    if as_json:
        print_json([vars(need) for need in planned])
        return
    print_needs(planned)
