"""What a report is of: the folder of a run, or folders that `evaluate` and `benchmark` left."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitopt.errors import RecordError
from vitopt.measure.comparison import adjusted_for_all, compare_measured, speed_ratio
from vitopt.measure.predictions import load_predictions
from vitopt.recipe_file import load_recipe
from vitopt.records import RECORD_FILE, Latency, Record, load_record
from vitopt.report import summary
from vitopt.report.recommendation import Recommendation, recommend
from vitopt.report.waterfall import chain_of


@dataclass(frozen=True)
class Results:
    """Records with what a report needs beside them; `folder` is that of the page."""

    folder: Path
    folders: list[Path]  # of the records
    records: list[Record]
    baseline: Record | None
    recipe_text: str | None = None
    chain: tuple[Record, ...] = ()  # of the waterfall
    recommendation: Recommendation | None = None


def open_run(folder: Path) -> Results:
    """The results of one run, in the order of its recipe, or of one `--output` of evaluate or benchmark.

    Raises:
        RecordError: the folder holds no records.
    """
    there = {path.name: path for path in _places(folder)}
    path = folder / "recipe.yaml"
    recipe = load_recipe(path) if path.is_file() else None
    names = [variant.name for variant in recipe.variants] if recipe else []
    # Variants that have left the recipe may still lie there; without a recipe, all that lie there count.
    folders = [there[name] for name in names if name in there] or list(there.values())
    records = [load_record(variant) for variant in folders]
    return Results(
        folder,
        folders,
        records,
        baseline=summary.baseline_of(records, recipe.baseline_name if recipe else None),
        recipe_text=path.read_text(encoding="utf-8") if recipe else None,
        chain=tuple(chain_of(records, recipe.waterfall if recipe else ())),
        recommendation=recommend(records, recipe.prefer, recipe.price_per_hour) if recipe else recommend(records),
    )


def gather(folders: Sequence[Path], page: Path) -> Results:
    """The results of several such folders, all compared with the baseline of the first, or else its first.

    What was judged against other baselines is left out. Rows of one name are told apart by their folders.

    Raises:
        RecordError: a folder holds no records, or two results are not over the same images, see `compare_measured`.
    """
    opened = [open_run(folder) for folder in folders]
    places = [place for results in opened for place in results.folders]
    names = _names(opened)
    records = [
        record.model_copy(update={"variant": record.variant.model_copy(update={"name": name})})
        for name, record in zip(names, (record for results in opened for record in results.records), strict=True)
    ]
    at = opened[0].records.index(opened[0].baseline) if opened[0].baseline else 0
    compared = [
        _against(records[at], places[at], record, place) if record is not records[at] else _alone(record)
        for record, place in zip(records, places, strict=True)
    ]
    compared = adjusted_for_all(compared)
    return Results(page, places, compared, compared[at])


def _places(folder: Path) -> list[Path]:
    """The folders of the records that lie in `folder`."""
    if (folder / RECORD_FILE).is_file():
        return [folder]
    if folders := sorted(path.parent for path in folder.glob(f"variants/*/{RECORD_FILE}")):
        return folders
    raise RecordError(
        f"{folder} holds no records ({RECORD_FILE} or variants/*/{RECORD_FILE}): give the folder of a `vitopt run`, or "
        "--output of `vitopt evaluate` or `vitopt benchmark`"
    )


def _names(opened: Sequence[Results]) -> list[str]:
    """The variants' names, with their folders where two are the same.

    Raises:
        RecordError: two are of one folder.
    """
    own = [(results.folder, record.variant.name) for results in opened for record in results.records]
    names = [name for _, name in own]
    told = [f"{name} ({folder})" if names.count(name) > 1 else name for folder, name in own]
    if twice := next((name for name in told if told.count(name) > 1), None):
        raise RecordError(f"{twice} is given twice: give each folder once")
    return told


def _alone(record: Record) -> Record:
    """The record compared with nothing."""
    rows = tuple(row.model_copy(update={"speedup_vs_baseline": None, "speedup_ci95": None}) for row in record.latency)
    return record.model_copy(update={"latency": rows, "versus_baseline": None, "requirements": ()})


def _against(baseline: Record, place_of_baseline: Path, record: Record, place: Path) -> Record:
    """The record compared with `baseline`: answers where both were measured on images, and speed."""
    if baseline.failure or record.failure:
        return _alone(record)
    changes: dict[str, object] = {"latency": tuple(_row_against(baseline, record, row) for row in record.latency)}
    if baseline.dataset and record.dataset:
        before, after = load_predictions(place_of_baseline), load_predictions(place)
        try:
            comparison = compare_measured((baseline, before), (record, after))
        except RecordError as error:
            raise RecordError(f"{place_of_baseline} and {place} do not compare: {error}") from error
        changes |= {"versus_baseline": comparison.versus, "metrics": comparison.records[1].metrics}
    return _alone(record).model_copy(update=changes)


def _row_against(baseline: Record, record: Record, row: Latency) -> Latency:
    speed = speed_ratio(baseline, record, row.batch_size)
    interval = (speed.interval.low, speed.interval.high) if speed and speed.interval else None
    return row.model_copy(update={"speedup_vs_baseline": speed.ratio if speed else None, "speedup_ci95": interval})
