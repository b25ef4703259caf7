"""What commands print: JSON for programs, tables and lines for people."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitopt.cli.tables import Column, print_columns
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


# What decides which variant to ship: shown first where a terminal is too narrow for all columns.
_DECIDES = (
    "top-1 %",
    "Δ points (95 %)",
    "agree %",
    "escalated %",
    "mean ms",
    "p50 ms",
    "speed-up",
    "weights",
    "required",
    "KL",
    "p95 ms",
    "format",
)


def print_table(records: Sequence[Record], *, wide: bool | None = None) -> None:
    """The comparison at each batch size, in as many columns as fit or, if `wide`, in several tables; then the notes.

    `wide` None: the command has no such option.
    """
    from vitopt.report.table import TEXT_COLUMNS, batch_sizes, comparison, notes

    left_out: dict[str, None] = {}
    for size in batch_sizes(records) or (None,):
        table = comparison(records, size)
        columns = [
            Column(heading, [row[index] for row in table.rows], text=index < TEXT_COLUMNS or heading == "metrics")
            for index, heading in enumerate(table.headings)
        ]
        left_out |= dict.fromkeys(
            print_columns(out, f"batch size {size}" if size else "", columns, _DECIDES, wide=bool(wide))
        )
    if left_out:
        where = "in --json" if wide is None else "with --wide"
        out.print(f"• more columns {where}: {', '.join(left_out)}")
    print_serving(records, wide=bool(wide))
    for record in records:
        if (throughput := record.throughput) is not None:
            rate = f"{throughput.images_per_second:,.0f} images/s at batch {throughput.batch_size}"
            out.print(f"• {record.variant.name}: at most {rate}")
    for note in notes(records):
        out.print(f"• {note}")


def print_serving(records: Sequence[Record], *, wide: bool) -> None:
    """What callers of each served variant felt at each rate, and the highest that keeps the target."""
    from vitopt.report.serving import all_rates
    from vitopt.report.table import rate

    for table in all_rates(records):
        columns = [Column(heading, [row[i] for row in table.rows]) for i, heading in enumerate(table.headings)]
        print_columns(out, table.caption, columns, ("p50 ms", "p99 ms", "refused", "top-1 %"), wide=wide)
    for record in records:
        if (serving := record.serving) is None:
            continue
        for one in serving.rates:
            for what, count in one.errors.items():
                out.print(f"• {rate(one.rate)} requests/s: {count} x {what}")
        if serving.target_p99_ms is not None:
            kept = f"{rate(serving.highest_rate)} requests/s keep" if serving.highest_rate else "no rate keeps"
            cost = f"; a million cost {serving.cost_per_million:.2f}" if serving.cost_per_million is not None else ""
            out.print(f"• {record.variant.name}: {kept} a p99 of {serving.target_p99_ms:g} ms{cost}")


def print_kept_layers(records: Sequence[Record]) -> None:
    """A line for each quantized variant: its layers that are in another format."""
    from vitopt.report.variants import kept_layers

    for record in records:
        for format, names in kept_layers(record).items():
            out.print(f"• {record.variant.name}: in {format} {', '.join(names)}")


def print_sensitivity(result: "Sensitivity") -> None:
    from vitopt.report.table import delta_words, human_bytes

    quantized = result.quantized
    units = sorted(result.units, key=lambda unit: unit.recovery.kl if unit.recovery else 0)
    columns = [Column("unit", [unit.unit for unit in units], text=True)]
    for heading, losses in (
        ("damage KL", [unit.damage for unit in units]),
        ("kept: KL", [unit.recovery for unit in units]),
    ):
        columns.append(Column(heading, [f"{loss.kl:.4f}" if loss else "" for loss in losses]))
        deltas = [
            delta_words(loss.top1_delta_points, loss.top1_delta_ci95_points, 1) if loss else "" for loss in losses
        ]
        columns.append(Column("Δ points (95 %)", deltas))
    columns.append(Column("costs", [human_bytes(unit.extra_bytes) for unit in units]))
    columns.append(Column("costs ms", ["" if unit.extra_ms is None else f"{unit.extra_ms:+.3f}" for unit in units]))
    print_columns(
        out,
        f"{result.format} on {result.images} images; all quantized: KL {quantized.kl:.4f}, "
        f"agreement {quantized.agreement_percent:.1f} %",
        columns,
    )
    if result.search is not None:
        search = result.search
        out.print(f"• {search.goal}: keep {', '.join(search.chosen) or 'nothing'} in 16 bit")
        out.print(
            f"• {search.advice or f'shown (95 %) on {search.confirming_images:,} images that were not used to choose'}"
        )


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
    out.print(dump_yaml(recipe, defaults=False))
    out.print("All other keys have their defaults; --json prints them too.\n")
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

    who = about or [""] * len(needs)
    columns = [
        Column(
            "required",
            [name + asked(need.requirement, need.limit) for name, need in zip(who, needs, strict=True)],
            True,
        ),
        Column("at least", [_count(need.least, need.unit) for need in needs]),
        Column("8 times in 10", [_count(need.likely, need.unit) for need in needs]),
        *([Column("there are", [_count(count) for count in there])] if there else []),
        Column("if", [need.assumption for need in needs], True),
    ]
    print_columns(out, "needed to show what is required", columns)


def _count(count: int | None, unit: str = "") -> str:
    return "–" if count is None else f"{count:,} {unit}".rstrip()


def _print_plans(plans: "dict[str, LayerPlan]") -> None:
    alike: dict[str, tuple[list[str], LayerPlan]] = {}
    for name, plan in plans.items():
        alike.setdefault(str(plan.layers), ([], plan))[0].append(name)
    for names, plan in alike.values():
        name = ", ".join(names)
        groups = plan.groups()
        spans = [
            first.layer.logical if count == 1 else f"{first.layer.logical} … {last.layer.logical} ({count})"
            for first, last, count in groups
        ]
        columns = [
            Column("layers", spans, True),
            Column("format", [first.format for first, _, _ in groups], True),
            Column("reason", [first.reason for first, _, _ in groups], True),
            Column("module of the first", [first.layer.module for first, _, _ in groups], True),
        ]
        print_columns(out, f"layer plan of {name}", columns)
