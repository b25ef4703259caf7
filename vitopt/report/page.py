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
from vitopt.recipe import load_recipe
from vitopt.records import RECORD_FILE, Record, load_record
from vitopt.report import details, roofline, sensitivity, summary
from vitopt.report.classes import ClassChanges, class_changes
from vitopt.report.details import environment_facts
from vitopt.report.figures import Plot, remove_others
from vitopt.report.flips import Flips, Thumbnails, flips
from vitopt.report.plots import save_plots
from vitopt.report.rendering import inlined, templates
from vitopt.report.strip import formats_in, strips
from vitopt.report.table import (
    batch_sizes,
    cautions,
    comparison,
    describe_device,
    markdown_table,
    markdown_text,
    notes,
)
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

    @property
    def title(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class Analyses:
    """The sensitivity analyses of a run, and what a reader of its report must know about them."""

    parts: list[sensitivity.Part]
    cautions: list[str]


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
    name = run.baseline.variant.name if run.baseline else None
    plots = save_plots(run.records, name, folder / PLOTS_FOLDER, run.chain)
    analyses = _analyses(run, folder / PLOTS_FOLDER)
    storage.write_text(folder / MARKDOWN_FILE, _markdown(run, plots, analyses))
    path = folder / PAGE_FILE
    storage.write_text(path, templates.get_template("report.html").render(_context(run, plots, analyses)))
    return path


def _open_run(folder: Path) -> Run:
    found = sorted(folder.glob(f"variants/*/{RECORD_FILE}"))
    if not found:
        raise RecordError(f"{folder} holds no records (variants/*/{RECORD_FILE}): give the folder of a `vitopt run`")
    names = [path.parent.name for path in found]
    path = folder / "recipe.yaml"
    recipe = load_recipe(path) if path.is_file() else None
    order = [variant.name for variant in recipe.variants] if recipe else []
    # Variants that have left the recipe may still lie there; without a recipe, all that lie there count.
    wanted = [name for name in order if name in names] or names
    records = {name: load_record(folder / "variants" / name) for name in wanted}
    ordered = list(records.values())
    baseline = summary.baseline_of(ordered, recipe.baseline_name if recipe else None)
    folders = {record.variant.name: folder / "variants" / name for name, record in records.items()}
    chain = chain_of(ordered, recipe.waterfall if recipe else ())
    return Run(folder, ordered, folders, baseline, path.read_text(encoding="utf-8") if recipe else None, chain)


def _analyses(run: Run, folder: Path) -> Analyses:
    """Every sensitivity analysis of the run, its figures saved in `folder`."""
    found, unreadable = sensitivity.read_all(run.folder, [record.variant.name for record in run.records])
    records = {record.variant.name: record for record in run.records}
    parts = [sensitivity.part_of(name, result, records.get(name)) for name, result in found.items()]
    parts = [sensitivity.drawn(part, sensitivity.plot_prefix(part.name), folder) for part in parts]
    remove_others(folder, sensitivity.OWN_FILE, [plot for part in parts for plot in part.plots])
    return Analyses(parts, sensitivity.cautions(parts) + unreadable)


def _context(run: Run, plots: Sequence[Plot], analyses: Analyses) -> dict[str, Any]:
    records, baseline = run.records, run.baseline
    layer_strips = strips(records)
    found_flips, unreadable, has_pictures = _flips(run)
    first = next((record for record in records if record.model), None)
    return {
        "title": run.title,
        "records": records,
        **sensitivity.page_context(),
        "baseline": baseline.variant.name if baseline else None,
        "model": first.model if first else None,
        "device": describe_device(records[0]),
        "dataset": next((record.dataset for record in records if record.dataset), None),
        "created": max((record.created for record in records if record.created), default=None),
        "headline": summary.headline(records, baseline),
        "highlights": summary.highlights(records, baseline),
        "cautions": cautions(records) + _differences(records) + analyses.cautions + unreadable,
        "verdicts": summary.verdicts(records, baseline),
        "tables": [comparison(records, size) for size in _sizes(records)],
        "agreement": details.agreement(records),
        "batch_invariance": details.batch_invariance(records),
        "end_to_end": details.end_to_end(records),
        "other_timings": details.other_timings(records),
        "plots": {kind: [inlined(p) for p in plots if p.kind == kind] for kind in _KINDS},
        "plot_formats": list(dict.fromkeys(record.variant.format for record in records if not record.failure)),
        "memory_kind": next((record.memory.kind for record in records if record.memory), None),
        "untimed": _untimed(records),
        "strips": layer_strips,
        "strip_formats": formats_in(layer_strips),
        "chain": [record.variant.name for record in run.chain],
        "floor": floor_words(run.chain),
        "roofline": roofline.facts(records),
        "roofline_title": roofline.TITLE,
        "sensitivity_title": sensitivity.TITLE,
        "analyses": analyses.parts,
        "class_changes": [(changes, details.changed_classes(changes)) for changes in _class_changes(run)],
        "flips": found_flips,
        "has_pictures": has_pictures,
        "formats": FORMATS,
        "most_affected": _most_affected(records),
        "commands": list(dict.fromkeys(record.command for record in records if record.command)),
        "recipe": run.recipe_text,
        "environment": environment_facts(records[0].environment),
    }


_KINDS = ("accuracy", "latency", "waterfall", "size")


def _sizes(records: Sequence[Record]) -> list[int | None]:
    """Batch sizes to show a table for; one without any where nothing was timed."""
    return [*batch_sizes(records)] or [None]


def _class_changes(run: Run) -> list[ClassChanges]:
    if run.baseline is None:
        return []
    others = [record for record in run.records if record is not run.baseline]
    found = [class_changes(record, run.baseline) for record in others]
    return [changes for changes in found if changes is not None]


def _most_affected(records: Sequence[Record]) -> str | None:
    """The variant whose examples are worth seeing first."""
    compared = [(record.versus_baseline, record.variant.name) for record in records if record.versus_baseline]
    worst = max(compared, key=lambda pair: pair[0].right_to_wrong + pair[0].wrong_to_right, default=None)
    return worst[1] if worst else None


def _flips(run: Run) -> tuple[list[Flips], list[str], bool]:
    """Flips of every variant whose predictions were kept; what could not be read; whether images were found."""
    if run.baseline is None or not _has_predictions(run, run.baseline):
        return [], [], False
    found: list[Flips] = []
    unreadable: list[str] = []
    thumbnails = Thumbnails(run.baseline.dataset)
    try:
        reference = load_predictions(run.folders[run.baseline.variant.name])
    except RecordError as error:
        return [], [str(error)], False
    for record in run.records:
        if record is run.baseline or not _has_predictions(run, record):
            continue
        folder = run.folders[record.variant.name]
        try:
            predictions = load_predictions(folder)
        except RecordError as error:
            unreadable.append(str(error))
            continue
        of_variant = flips(
            (run.baseline.variant.name, reference),
            (record.variant.name, predictions),
            _class_names(folder, record),
            thumbnails,
        )
        found += [of_variant] if of_variant is not None else []
    return found, unreadable, thumbnails.available


def _has_predictions(run: Run, record: Record) -> bool:
    return record.failure is None and (run.folders[record.variant.name] / PREDICTIONS_FILE).is_file()


def _class_names(folder: Path, record: Record) -> dict[int, str]:
    """All outputs of the head by name, or those of the labels where the checkpoint is no longer there."""
    try:
        of_head = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
        return {int(index): str(name) for index, name in of_head.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {one.label: one.name for one in record.accuracy.classes} if record.accuracy else {}


def _untimed(records: Sequence[Record]) -> list[str]:
    return [
        f"{record.variant.name} at batch {failed.batch_size}: {failed.reason}"
        for record in records
        for failed in record.latency_failures
    ]


def _differences(records: Sequence[Record]) -> list[str]:
    """Variants that were not measured under the same conditions cannot be compared without saying so."""
    measured = [record for record in records if record.failure is None]
    lines = []
    if len({describe_device(record) for record in measured}) > 1:
        lines.append("the variants were measured on different devices: their latencies do not compare")
    if len({record.dataset.sha256 for record in measured if record.dataset}) > 1:
        lines.append("the variants were measured on different images: their accuracies do not compare")
    return lines


def _markdown(run: Run, plots: Sequence[Plot], analyses: Analyses) -> str:
    records = run.records
    parts = [f"# {markdown_text(run.title)}", " ".join(map(markdown_text, summary.headline(records, run.baseline)))]
    lines = notes(records) + _differences(records) + analyses.cautions
    parts.append("\n".join(f"- {markdown_text(line)}" for line in lines))
    for size in _sizes(records):
        parts += [f"## Batch size {size}" if size else "## Comparison", markdown_table(records, size)]
        parts += [
            f"![{markdown_text(p.alt)}]({PLOTS_FOLDER}/{p.name}.png)"
            for p in plots
            if size is not None and p.batch_size == size and p.kind in ("accuracy", "waterfall")
        ]
    if facts := roofline.facts(records):
        parts += [f"## {roofline.TITLE}", "\n".join(f"- {name}: {text}" for name, text in facts)]
    if analyses.parts:
        parts += [f"## {sensitivity.TITLE}", *(sensitivity.markdown(part, PLOTS_FOLDER) for part in analyses.parts)]
    commands = dict.fromkeys(record.command for record in records if record.command)
    if commands:
        parts += ["## Repeat it", "\n".join(["```sh", *commands, "```"])]
    where = ", ".join(f"{name} {value}" for name, value in environment_facts(records[0].environment))
    dataset = next((record.dataset for record in records if record.dataset), None)
    if dataset:
        where = f"{dataset.images:,} images of {dataset.name}, sha256 {dataset.sha256}; {where}"
    parts.append(markdown_text(where))
    return "\n\n".join(part for part in parts if part) + "\n"
