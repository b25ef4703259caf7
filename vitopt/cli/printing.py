"""What commands print: JSON for programs, tables and lines for people."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vitopt.recipe import Recipe
from vitopt.recipe_file import dump_yaml
from vitopt.records import Record
from vitopt.terminal import Console

if TYPE_CHECKING:
    from vitopt.measure.planning import Need
    from vitopt.optimize.plan import LayerPlan
    from vitopt.preview import Preview
    from vitopt.search.results import Sensitivity

out = Console()
err = Console(stderr=True)


def say(line: str) -> None:
    from vitopt.environment import launch

    if launch.is_main_process():
        err.print(line)


def print_json(value: Any) -> None:
    from vitopt.environment import launch

    if launch.is_main_process():
        sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()  # here, where a reader that has gone away is expected


@contextmanager
def _full_width() -> Iterator[None]:
    # Piped output has no width; a table cut at 80 columns would lose its figures.
    if out.is_terminal:
        yield
        return
    width, out.width = out.width, 200
    yield
    out.width = width


def print_table(records: Sequence[Record]) -> None:
    from vitopt.report.table import HEADINGS, UNKNOWN, batch_sizes, notes, row

    with _full_width():
        for size in batch_sizes(records) or (None,):
            rows = [row(record, size) for record in records]
            shown = [i for i in range(len(HEADINGS)) if any(cells[i] != UNKNOWN for cells in rows)]
            table = Table(title=f"batch size {size}" if size else None, title_justify="left")
            for index in shown:
                table.add_column(HEADINGS[index], justify="left" if index < 3 else "right")
            for cells in rows:
                table.add_row(*(cells[index] for index in shown))
            out.print(table)
    for record in records:
        if (found := record.throughput) is not None:
            rate = f"{found.images_per_second:,.0f} images/s at batch {found.batch_size}"
            out.print(f"• {record.variant.name}: at most {rate}")
    for note in notes(records):
        out.print(f"• {note}")


def print_sensitivity(result: "Sensitivity") -> None:
    from vitopt.report.table import human_bytes

    quantized = result.quantized
    table = Table(
        title=f"{result.format} on {result.images} images; all quantized: KL {quantized.kl:.4f}, "
        f"agreement {quantized.agreement_percent:.1f} %",
        title_justify="left",
    )
    for heading in ("unit", "damage KL", "Δ points (95 %)", "kept: KL", "Δ points (95 %)", "costs", "costs ms"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for unit in sorted(result.units, key=lambda unit: unit.recovery.kl if unit.recovery else 0):
        cells = [unit.unit]
        for loss in (unit.damage, unit.recovery):
            low, high = loss.top1_delta_ci95_points if loss else (0, 0)
            delta = f"{loss.top1_delta_points:+.1f} ({low:+.1f} to {high:+.1f})" if loss else ""
            cells += [f"{loss.kl:.4f}" if loss else "", delta]
        cells += [human_bytes(unit.extra_bytes), "" if unit.extra_ms is None else f"{unit.extra_ms:+.3f}"]
        table.add_row(*cells)
    with _full_width():
        out.print(table)
    if result.search is not None:
        found = result.search
        out.print(f"• {found.goal}: keep {', '.join(found.chosen) or 'nothing'} in 16 bit")
        out.print(f"• {found.advice or f'shown on {found.confirming_images:,} images that did not choose (95 %)'}")


def print_dry_run(recipe: Recipe, plans: "dict[str, LayerPlan]", preview: "Preview", as_json: bool) -> None:
    if as_json:
        layers = {
            name: {
                p.layer.logical: {"format": p.format, "module": p.layer.module, "reason": p.reason} for p in plan.layers
            }
            for name, plan in plans.items()
        }
        print_json({"recipe": recipe.model_dump(mode="json"), "layer_plans": layers, **preview.to_json()})
        return
    out.print(dump_yaml(recipe))
    with _full_width():
        _print_plans(plans)
    print_needs(
        [claim.need for claim in preview.claims],
        [f"{claim.about}: " for claim in preview.claims],
        [claim.there for claim in preview.claims],
    )
    for stage in preview.stages:
        time = "stands" if stage.stands else f"about {max(1, round(stage.seconds)):,} s (an estimate from a few calls)"
        out.print(f"• {stage.name}: {time}{'; ' if stage.what else ''}{stage.what}")
    for note in preview.notes:
        out.print(f"• {note}")


def print_needs(needs: "Sequence[Need]", about: Sequence[str] = (), there: Sequence[int | None] = ()) -> None:
    """A row per requirement; `about` whom and how many images or calls are `there`, where that is known."""
    if not needs:
        return
    from vitopt.report.requirements import asked

    table = Table(title="needed to show what is required", title_justify="left")
    for heading in ("required", "at least", "8 times in 10", *(["there are"] if there else []), "if"):
        table.add_column(heading, justify="left" if heading in ("required", "if") else "right")
    for index, need in enumerate(needs):
        counts = ["–" if count is None else f"{count:,} {need.unit}" for count in (need.least, need.likely)]
        counts += [f"{there[index]:,}" if there[index] is not None else "–"] if there else []
        who = about[index] if about else ""
        table.add_row(who + asked(need.requirement, need.limit), *counts, need.assumption)
    with _full_width():
        out.print(table)


def _print_plans(plans: "dict[str, LayerPlan]") -> None:
    for name, plan in plans.items():
        table = Table(title=f"layer plan of {name}", title_justify="left")
        for heading in ("layers", "format", "reason", "module of the first"):
            table.add_column(heading)
        for first, last, count in plan.groups():
            span = first.layer.logical if count == 1 else f"{first.layer.logical} … {last.layer.logical} ({count})"
            table.add_row(span, first.format, first.reason, first.layer.module)
        out.print(table)
