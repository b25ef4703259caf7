"""The report of a run: `report.md`, one self-contained `report.html`, and its plots as files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitopt import storage
from vitopt.errors import RecordError
from vitopt.formats import FORMATS
from vitopt.measure.predictions import PREDICTIONS_FILE, load_predictions
from vitopt.recipe_file import load_recipe
from vitopt.records import RECORD_FILE, Record, load_record
from vitopt.report import details, roofline, sensitivity, summary
from vitopt.report.classes import class_changes
from vitopt.report.figures import Plot, remove_others
from vitopt.report.flips import Flips, Thumbnails, flips
from vitopt.report.plots import save_plots
from vitopt.report.rendering import templates
from vitopt.report.strip import strips
from vitopt.report.table import batch_sizes, cautions, comparison, device_name, notes
from vitopt.report.waterfall import chain_of, floor_words

PAGE_FILE = "report.html"
MARKDOWN_FILE = "report.md"
PLOTS_FOLDER = "plots"


@dataclass(frozen=True)
class Run:
    """What a run's folder holds that a report needs."""

    folder: Path
    records: list[Record]
    folders: dict[str, Path]  # of the variants, by name
    baseline: Record | None
    recipe_text: str | None
    chain: list[Record]  # of the waterfall


def load_run(folder: Path) -> list[Record]:
    """Records of all variants of a run, in the order of its recipe.

    Raises:
        RecordError: the folder holds no records.
    """
    return _open_run(folder).records


def write_report(folder: Path) -> Path:
    """Write `report.md`, `report.html` and `plots/` into the folder of a run and return the path of the page.

    Raises:
        RecordError: the folder holds no records.
        StorageError: the folder cannot be written.
    """
    run = _open_run(folder)
    plots = save_plots(
        run.records, run.baseline.variant.name if run.baseline else None, folder / PLOTS_FOLDER, run.chain
    )
    context = _context(run, plots)
    storage.write_text(folder / MARKDOWN_FILE, templates.get_template(MARKDOWN_FILE).render(context))
    path = folder / PAGE_FILE
    storage.write_text(path, templates.get_template(PAGE_FILE).render(context))
    return path


def _open_run(folder: Path) -> Run:
    names = [path.parent.name for path in sorted(folder.glob(f"variants/*/{RECORD_FILE}"))]
    if not names:
        raise RecordError(f"{folder} holds no records (variants/*/{RECORD_FILE}): give the folder of a `vitopt run`")
    path = folder / "recipe.yaml"
    recipe = load_recipe(path) if path.is_file() else None
    order = [variant.name for variant in recipe.variants] if recipe else []
    # Variants that have left the recipe may still lie there; without a recipe, all that lie there count.
    wanted = [folder / "variants" / name for name in order if name in names] or [
        folder / "variants" / name for name in names
    ]
    records = [load_record(place) for place in wanted]
    return Run(
        folder,
        records,
        folders={record.variant.name: place for record, place in zip(records, wanted, strict=True)},
        baseline=summary.baseline_of(records, recipe.baseline_name if recipe else None),
        recipe_text=path.read_text(encoding="utf-8") if recipe else None,
        chain=chain_of(records, recipe.waterfall if recipe else ()),
    )


def _analyses(run: Run) -> tuple[list[sensitivity.Part], list[str]]:
    """Every sensitivity analysis of the run, its figures saved, and what could not be read."""
    records, plots = {record.variant.name: record for record in run.records}, run.folder / PLOTS_FOLDER
    results, unreadable = sensitivity.read_all(run.folder, list(records))
    parts = [
        sensitivity.drawn(sensitivity.part_of(name, result, records.get(name)), sensitivity.plot_prefix(name), plots)
        for name, result in results.items()
    ]
    remove_others(plots, sensitivity.OWN_FILE, [plot for part in parts for plot in part.plots])
    return parts, unreadable


def _context(run: Run, plots: Sequence[Plot]) -> dict[str, Any]:
    """What both reports are made of."""
    records, baseline = run.records, run.baseline
    analyses, unreadable_analyses = _analyses(run)
    flipped, unreadable_predictions, has_pictures = _flips(run)
    together = _differences(records) + [f"{part.name}: {part.advice}" for part in analyses if part.advice]
    others = [record for record in records if record is not baseline]
    changes = [class_changes(record, baseline) for record in others] if baseline else []
    compared = [(versus, record.variant.name) for record in records if (versus := record.versus_baseline)]
    # Its examples are worth seeing first.
    worst = max(compared, key=lambda pair: pair[0].right_to_wrong + pair[0].wrong_to_right, default=None)
    return {
        **sensitivity.page_context(),
        "title": run.folder.resolve().name,
        "records": records,
        "baseline": baseline.variant.name if baseline else None,
        "device": device_name(records[0].environment),
        "dataset": next((record.dataset for record in records if record.dataset), None),
        "headline": summary.headline(records, baseline),
        "highlights": summary.highlights(records, baseline),
        "cautions": cautions(records) + together + unreadable_analyses + unreadable_predictions,
        "notes": notes(records) + together + unreadable_analyses,
        "verdicts": summary.verdicts(records, baseline),
        "tables": {size: comparison(records, size) for size in batch_sizes(records) or (None,)},
        "agreement": details.agreement(records),
        "batch_invariance": details.batch_invariance(records),
        "end_to_end": details.end_to_end(records),
        "other_timings": details.other_timings(records),
        "plots": {kind: [plot for plot in plots if plot.kind == kind] for kind in _KINDS},
        "plots_folder": PLOTS_FOLDER,
        "memory_kind": next((record.memory.kind for record in records if record.memory), None),
        "strips": strips(records),
        "chain": [record.variant.name for record in run.chain],
        "floor": floor_words(run.chain),
        "roofline": roofline.facts(records),
        "roofline_title": roofline.TITLE,
        "sensitivity_title": sensitivity.TITLE,
        "analyses": analyses,
        "class_changes": [found for found in changes if found is not None],
        "flips": flipped,
        "has_pictures": has_pictures,
        "formats": FORMATS,
        "most_affected": worst[1] if worst else None,
        "recipe": run.recipe_text,
        "environment": details.environment_facts(records[0].environment),
    }


_KINDS = ("accuracy", "latency", "waterfall", "size")


def _flips(run: Run) -> tuple[list[Flips], list[str], bool]:
    """Flips of every variant whose predictions were kept; what could not be read; whether images were found."""
    found: list[Flips] = []
    unreadable: list[str] = []
    kept = [
        record
        for record in run.records
        if record.accuracy is not None and (run.folders[record.variant.name] / PREDICTIONS_FILE).is_file()
    ]
    if run.baseline is None or run.baseline not in kept:
        return [], [], False
    name, thumbnails = run.baseline.variant.name, Thumbnails(run.baseline.dataset)
    try:
        reference = load_predictions(run.folders[name])
    except RecordError as error:
        return [], [str(error)], False
    for record in kept:
        folder, variant = run.folders[record.variant.name], record.variant.name
        if variant == name:
            continue
        try:
            predictions = (variant, load_predictions(folder))
        except RecordError as error:
            unreadable.append(str(error))
            continue
        one = flips((name, reference), predictions, _class_names(folder, record), thumbnails)
        found += [one] if one is not None else []
    return found, unreadable, thumbnails.available


def _class_names(folder: Path, record: Record) -> dict[int, str]:
    """All outputs of the head by name, or those of the labels where the checkpoint is no longer there."""
    try:
        of_head = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
        return {int(index): str(name) for index, name in of_head.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {one.label: one.name for one in record.accuracy.classes} if record.accuracy else {}


def _differences(records: Sequence[Record]) -> list[str]:
    """Variants that were not measured under the same conditions cannot be compared without saying so."""
    measured = [record for record in records if record.failure is None]
    lines = []
    if len({device_name(record.environment) for record in measured}) > 1:
        lines.append("the variants were measured on different devices: their latencies do not compare")
    if len({record.dataset.sha256 for record in measured if record.dataset}) > 1:
        lines.append("the variants were measured on different images: their accuracies do not compare")
    return lines
