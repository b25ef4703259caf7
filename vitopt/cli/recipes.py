"""A whole recipe: carried out, and its report written again."""

from pathlib import Path
from typing import Annotated

import typer

from vitopt import storage
from vitopt.cli.common import JsonOption, LogToOption, StrictOption, ThreadsOption, WideOption, start
from vitopt.cli.printing import out, print_dry_run, print_json, print_table, say
from vitopt.errors import RecipeError
from vitopt.recipe_file import load_recipe


def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME without it.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as in finetune.epochs=1.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved recipe, the layer plans, what its claims need and about how long it takes.",
        ),
    ] = False,
    strict: StrictOption = False,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be decoded, and count them.")
    ] = False,
    log_to: LogToOption = None,
    threads: ThreadsOption = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Carry out a recipe: fine-tune, quantize, measure, report, export."""
    overrides = [*(set_ or []), *(["strict=true"] if strict else [])]
    overrides += ["data.skip_bad_images=true"] if skip_bad_images else []
    overrides += [f"log_to=[{','.join(log_to)}]"] if log_to else []
    resolved = load_recipe(recipe, overrides)
    folder = output or Path("runs") / resolved.name
    start(as_json, threads)
    if dry_run:
        from vitopt.checks import plans
        from vitopt.preview import preview

        print_dry_run(resolved, plans(resolved), preview(resolved, folder), as_json)
        return
    from vitopt import pipeline

    result = pipeline.run(resolved, folder, say)
    if as_json:
        print_json([record.to_json() for record in result.records])
        return
    from vitopt.environment import launch

    if launch.is_main_process():
        print_table(result.records, wide=wide)
        if result.recommendation is not None:
            out.print(f"\n{result.recommendation.line}")
        if result.report is not None:
            out.print(f"\nreport: {result.report}")
        if result.export is not None:
            out.print(f"export: {result.export}")
        if result.exported is not None and result.exported.variant.ran.get("engine", "torch") != "torch":
            out.print(f"\nHow its engine runs it without vitopt: {result.export}/README.md")
        elif result.exported is not None and result.report is not None:
            from vitopt.report.card import loading_code

            out.print("\nIt opens with plain transformers:\n")
            out.print(loading_code(result.exported, str(result.export)))


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Folder of a run, or --output of evaluate, benchmark, sensitivity."),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder for a report of several folders.")] = None,
    log_to: LogToOption = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write report.md and report.html of a run again, or of results over the same images that it compares."""
    if (output is None) != (len(folders) == 1):
        raise RecipeError("--output is for a report of several folders; the report of one folder is written into it")
    start(as_json)
    from vitopt.report.page import REPORT_FILES, write_report
    from vitopt.report.results import gather, open_run
    from vitopt.report.sensitivity import write_sensitivity_page
    from vitopt.tracking import Tracking

    first = folders[0]
    if output is None and (first / "sensitivity.json").is_file() and not (first / "variants").is_dir():
        with storage.locked(first):
            page = write_sensitivity_page(first / "sensitivity.json")
        print_json({"report": str(page), "variants": []}) if as_json else out.print(f"page: {page}")
        return
    place = (output or first).resolve()
    tracking = Tracking(tuple(log_to or ()), place.name, place / "log")
    results = open_run(first) if output is None else gather(folders, output)
    with storage.locked(first) if output is None else storage.claimed(output, *folders, files=REPORT_FILES):
        path = write_report(results)
    tracking.log(results.records)
    if as_json:
        print_json({"report": str(path), "variants": [record.variant.name for record in results.records]})
        return
    print_table(results.records, wide=wide)
    out.print(f"\nreport: {path}")
