"""The report of a run or of several results: `report.md`, one self-contained `report.html`, and its plots as files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitopt import storage
from vitopt.errors import RecordError
from vitopt.formats import FORMATS
from vitopt.measure.predictions import PREDICTIONS_FILE, Predictions, load_predictions
from vitopt.records import Record
from vitopt.report import details, roofline, sensitivity, serving, summary, unit_plots
from vitopt.report.classes import class_changes
from vitopt.report.figures import Plot, remove_others, rendered
from vitopt.report.flips import Flips, Thumbnails, flips
from vitopt.report.plots import save_plots
from vitopt.report.rendering import templates
from vitopt.report.results import Results, open_run
from vitopt.report.strip import strips
from vitopt.report.table import batch_sizes, cautions, comparison, device_name, notes

PAGE_FILE = "report.html"
REPORT_FILES = ("report.md", PAGE_FILE)
PLOTS_FOLDER = "plots"


def write_report(results: Results | Path) -> Path:
    """Write `report.md`, `report.html` and `plots/` of results, or of the run in a folder; return the path of the page.

    Raises:
        RecordError: the folder holds no records.
        StorageError: the folder cannot be written.
    """
    run = open_run(results) if isinstance(results, Path) else results
    baseline = run.baseline.variant.name if run.baseline else None
    context = _context(run, baseline, save_plots(run.records, baseline, run.folder / PLOTS_FOLDER, run.chain))
    for name in REPORT_FILES:
        storage.write_text(run.folder / name, templates.get_template(name).render(context))
    return run.folder / PAGE_FILE


def _context(run: Results, baseline: str | None, plots: Sequence[Plot]) -> dict[str, Any]:
    """What both reports are made of."""
    records = run.records
    analyses, unreadable_analyses = _analyses(run)
    flipped, unreadable_predictions, has_pictures = _flips(run)
    together = _differences(records) + [
        f"{analysis.name}: {analysis.advice}" for analysis in analyses if analysis.advice
    ]
    changes = [class_changes(record, run.baseline) for record in records if run.baseline]
    return {
        **sensitivity.page_context(),
        "title": run.folder.resolve().name,
        "records": records,
        "baseline": baseline,
        "device": device_name(records[0].environment),
        "dataset": next((record.dataset for record in records if record.dataset), None),
        "headline": summary.headline(records, run.baseline, run.recommendation.line if run.recommendation else None),
        "highlights": summary.highlights(records, run.baseline),
        "cautions": cautions(records) + together + unreadable_analyses + unreadable_predictions,
        "notes": notes(records) + together + unreadable_analyses,
        "tables": {size: comparison(records, size) for size in batch_sizes(records) or (None,)},
        "judgements": [
            table for table in (details.against_baseline(records, run.baseline), details.requirements(records)) if table
        ],
        "agreement": details.agreement(records),
        "batch_invariance": details.batch_invariance(records),
        "end_to_end": details.end_to_end(records),
        "other_timings": details.other_timings(records),
        "served": serving.best_rates(records),
        "served_rates": serving.all_rates(records),
        "plots": {kind: [plot for plot in plots if plot.kind == kind] for kind in _KINDS},
        "plots_folder": PLOTS_FOLDER,
        "memory_kind": next((record.memory.kind for record in records if record.memory), None),
        "strips": strips(records),
        "chain": [record.variant.name for record in run.chain],
        "roofline": roofline.facts(records),
        "roofline_title": roofline.TITLE,
        "sensitivity_title": sensitivity.TITLE,
        "analyses": analyses,
        "class_changes": [change for change in changes if change],
        "flips": flipped,
        "has_pictures": has_pictures,
        "formats": FORMATS,
        # Its examples are worth seeing first.
        "most_affected": max(flipped, key=lambda variant: variant.flipped).variant if flipped else None,
        "recipe": run.recipe_text,
        "environment": details.environment_facts(records[0].environment),
    }


_KINDS = ("accuracy", "latency", "waterfall", "serving", "size")


def _analyses(run: Results) -> tuple[list[sensitivity.Analysis], list[str]]:
    """Every sensitivity analysis of the run, its figures saved, and what could not be read."""
    folder = run.folder / PLOTS_FOLDER
    results, unreadable = sensitivity.read_all(run.folder, [record.variant.name for record in run.records])
    analyses = []
    for name, result in results.items():
        plots = rendered(unit_plots.drawables(result, sensitivity.plot_prefix(name)), folder)
        analyses.append(sensitivity.analysis_of(name, result, plots))
    remove_others(folder, sensitivity.OWN_FILE, [plot for analysis in analyses for plot in analysis.plots])
    return analyses, unreadable


def _flips(run: Results) -> tuple[list[Flips], list[str], bool]:
    """Flips of every variant whose predictions were kept; what could not be read; whether images were found."""
    unreadable: list[str] = []

    def predictions(record: Record) -> Predictions | None:
        folder = folders[record.variant.name]
        if record.accuracy is None or not (folder / PREDICTIONS_FILE).is_file():
            return None
        try:
            return load_predictions(folder)
        except RecordError as error:
            unreadable.append(str(error))
            return None

    folders = {record.variant.name: folder for record, folder in zip(run.records, run.folders, strict=True)}
    if run.baseline is None or (before := predictions(run.baseline)) is None:
        return [], unreadable, False
    thumbnails, flipped = Thumbnails(run.baseline.dataset), []
    for record in run.records:
        if record is not run.baseline and (after := predictions(record)) is not None:
            name = record.variant.name
            flipped.append(flips(name, before, after, _class_names(folders[name], record), thumbnails))
    return [variant for variant in flipped if variant], unreadable, thumbnails.available


def _class_names(folder: Path, record: Record) -> dict[int, str]:
    """All outputs of the head by name, or those of the labels where the checkpoint is no longer there."""
    try:
        of_head = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
        return {int(index): str(name) for index, name in of_head.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {known.label: known.name for known in record.accuracy.classes} if record.accuracy else {}


def _differences(records: Sequence[Record]) -> list[str]:
    """Variants that were not measured under the same conditions cannot be compared without saying so."""
    measured = [record for record in records if record.failure is None]
    lines = []
    if len({device_name(record.environment) for record in measured}) > 1:
        lines.append("the variants were measured on different devices: their latencies do not compare")
    if len({record.dataset.sha256 for record in measured if record.dataset}) > 1:
        lines.append("the variants were measured on different images: their accuracies do not compare")
    return lines
