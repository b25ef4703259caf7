"""A whole recipe: carried out, and its report written again."""

from pathlib import Path
from typing import Annotated

import typer

from vitopt import storage
from vitopt.cli.common import JsonOption, LogToOption, StrictOption, ThreadsOption, WideOption, start
from vitopt.cli.printing import out, print_dry_run, print_json, print_table, say
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
    start(as_json, threads)
    if dry_run:
        from vitopt.checks import plans
        from vitopt.preview import preview

        print_dry_run(resolved, plans(resolved), preview(resolved), as_json)
        return
    from vitopt import pipeline

    result = pipeline.run(resolved, output or Path("runs") / resolved.name, say)
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
        if result.exported is not None and result.report is not None:
            from vitopt.report.card import loading_code

            out.print("\nIt opens with plain transformers:\n")
            out.print(loading_code(result.exported, str(result.export)))


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN-DIR", help="Folder of a run.")],
    log_to: LogToOption = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write report.md and report.html of a run again from its records."""
    start(as_json)
    from vitopt.report.page import load_run, write_report
    from vitopt.report.sensitivity import write_sensitivity_page
    from vitopt.tracking import Tracking

    if (run_folder / "sensitivity.json").is_file() and not (run_folder / "variants").is_dir():
        with storage.locked(run_folder):
            page = write_sensitivity_page(run_folder / "sensitivity.json")
        print_json({"report": str(page), "variants": []}) if as_json else out.print(f"page: {page}")
        return
    tracking = Tracking(tuple(log_to or ()), run_folder.resolve().name, run_folder / "log")
    records = load_run(run_folder)
    with storage.locked(run_folder):
        path = write_report(run_folder)
    tracking.log(records)
    if as_json:
        print_json({"report": str(path), "variants": [record.variant.name for record in records]})
        return
    print_table(records, wide=wide)
    out.print(f"\nreport: {path}")
