"""Which layers must stay in 16 bit: a sensitivity analysis and its skip list, in words, figures and tables."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vitopt import storage
from vitopt.errors import RecordError
from vitopt.formats import FORMATS, OTHER_COLOUR
from vitopt.layers import LINEARS
from vitopt.report import unit_plots, units
from vitopt.report.details import environment_facts
from vitopt.report.figures import Plot, rendered
from vitopt.report.rendering import templates
from vitopt.report.strip import HEAD, Strip, strip_of
from vitopt.report.summary import listed
from vitopt.report.table import Cell, Table, delta_words, device_name, human_bytes, of, percent, tabulate, with_interval
from vitopt.report.unit_plots import kl_words
from vitopt.search.results import Loss, Point, Sensitivity, UnitScores, load_sensitivity
from vitopt.search.skiplist import frontier

FOLDER = "sensitivity"
_COST_WORDS = {"size": "bytes", "time": "milliseconds"}
_MOST_NAMED = 4  # more units do not make a sentence; the line for a recipe names all
TITLE = "Which layers must stay in 16 bit"
OWN_FILE = re.compile(rf"{FOLDER}-.+-({'|'.join(unit_plots.NAMES)})\.(svg|png)")


@dataclass(frozen=True)
class Analysis:
    """All that a page shows of one analysis."""

    name: str  # of the variant, or of the format where the analysis stands alone
    result: Sensitivity
    answer: str
    skip: str | None  # a line of a recipe; None where nothing is kept, or the goal is not met
    strip: Strip | None
    losses: Table
    front: Table | None  # of the skip lists that were tried; None without a search
    table: Table
    plots: tuple[Plot, ...]

    @property
    def advice(self) -> str | None:
        """What to do where the goal was not shown."""
        return self.result.search.advice if self.result.search else None

    def plots_of(self, *names: str) -> list[Plot]:
        """Those figures that were drawn."""
        return [plot for plot in self.plots if plot.name.rsplit("-", 1)[-1] in names]


def read_all(folder: Path, order: Sequence[str] = ()) -> tuple[dict[str, Sensitivity], list[str]]:
    """The analyses of a run by name, those of `order` first, and what could not be read."""
    # What ends in `.partial` is what an interrupted analysis goes on from.
    paths = {path.stem: path for path in sorted(folder.glob(f"{FOLDER}/*.json")) if ".partial." not in path.name}
    results: dict[str, Sensitivity] = {}
    unreadable: list[str] = []
    for name in dict.fromkeys([*(name for name in order if name in paths), *paths]):
        try:
            results[name] = load_sensitivity(paths[name])
        except RecordError as error:
            unreadable.append(str(error))
    return results, unreadable


def analysis_of(name: str, result: Sensitivity, plots: Sequence[Plot] = ()) -> Analysis:
    """What is to be said about one analysis."""
    point = _chosen_point(result)
    return Analysis(
        name=name,
        result=result,
        answer=_answer(result, point),
        skip=f"skip: [{', '.join(point.skip)}]" if point and point.skip and point.within_target else None,
        strip=strip_of(name, _layers(result)) if result.search and result.granularity != "kind" else None,
        losses=_losses(result, point),
        front=_front(result, point),
        table=_table(result),
        plots=tuple(plots),
    )


def write_sensitivity_page(path: Path) -> Path:
    """Write a page about the sensitivity result at `path` (JSON) beside it, under its name with `.html`.

    The page needs no other file. Its path is returned.

    Raises:
        RecordError: `path` is missing or holds no sensitivity result of this version.
        StorageError: the folder cannot be written.
    """
    result = load_sensitivity(path)
    text = templates.get_template("sensitivity.html").render(
        title=f"{result.format} on {Path(result.checkpoint).name}",
        section=TITLE,
        analysis=analysis_of(result.format, result, rendered(unit_plots.drawables(result, FOLDER), None)),
        device=device_name(result.environment),
        environment=environment_facts(result.environment),
        **page_context(),
    )
    page = path.with_suffix(".html")
    storage.write_text(page, text)
    return page


def plot_prefix(name: str) -> str:
    """The beginning of figures' names: safe as an id and as a file, and different for different names."""
    safe = re.fullmatch(r"[A-Za-z0-9._+-]+", name)
    return f"{FOLDER}-{name if safe else storage.sha256_of_json(name)[:12]}"


def page_context() -> dict[str, Any]:
    """What the shared macros of the templates take from the page."""
    colours = {format: facts.colour for format, facts in FORMATS.items()}
    return {"baseline": None, "colours": {**colours, "other": OTHER_COLOUR}, "linears": LINEARS}


def _chosen_point(result: Sensitivity) -> Point | None:
    search = result.search
    return next((point for point in search.points if set(point.skip) == set(search.chosen)), None) if search else None


def _layers(result: Sensitivity) -> dict[str, str]:
    """The layer plan that the chosen skip list gives: logical name -> format."""
    chosen = result.search.chosen if result.search else ()
    plan: dict[str, str] = {}
    for unit in units.known_units(result):
        linears = [unit] if units.place(unit)[1] else [f"{unit}.{linear}" for linear in LINEARS]
        plan |= dict.fromkeys(linears, result.half if unit in chosen else result.format)
    return plan | {HEAD: result.half}  # the head is never quantized


def _answer(result: Sensitivity, point: Point | None) -> str:
    search = result.search
    if search is None:
        return "No goal was given, so no skip list was chosen."
    known = units.known_units(result)
    count = f"{len(search.chosen)} of {len(known)} {units.kind(result, len(known))}"
    goal = f"{search.goal}, for the {'least extra time' if search.objective == 'latency' else 'fewest extra bytes'}"
    if point is None or not point.within_target:
        return f"No skip list met the goal ({goal}). The nearest keeps {count} in {result.half}."
    names = listed(units.in_order(search.chosen)) if len(search.chosen) <= _MOST_NAMED else count
    decision = {"shown": "shown to be met", "failed": "not met", "undecided": "not shown to be met"}[search.decision]
    return (
        f"Keep {names or 'nothing'} in {result.half}, the rest in {result.format}. The goal ({goal}) is {decision} "
        f"on {search.confirming_images:,} images that were not used to choose."
    )


class _Outcome(NamedTuple):
    """A mixture of formats, how far it is from the 16-bit model on so many images, and what it costs."""

    name: str
    images: int
    loss: Loss
    point: Point | None = None


def _losses(result: Sensitivity, point: Point | None) -> Table:
    """The quantized model and the chosen skip list, on the images that chose it and on others."""

    def share(outcome: _Outcome) -> str | None:
        loss, whole = outcome.loss, result.quantized.kl
        value = loss.kl / whole if loss.kl_share is None and whole else loss.kl_share
        return None if value is None else with_interval("{:.0%}".format, value, loss.kl_share_ci95)

    columns: dict[str, Cell] = {
        "held": of("name"),
        "images": of("images", "{:,}".format),
        "Δ points (95 %)": of("loss", _delta),
        "agree %": of("loss.agreement_percent", percent),
        "KL, nats": of("loss.kl", kl_words),
        "KL share (95 %)": share,
        "extra weights": of("point.extra_bytes", lambda count: f"+{human_bytes(count)}"),
        "extra ms": of("point.extra_ms", "{:+.2f}".format),
    }
    outcomes = [_Outcome(f"all in {result.format}", result.images, result.quantized)]
    if (search := result.search) and point:
        outcomes.append(_Outcome("skip list, on the images that chose it", result.images, point.loss, point))
        outcomes.append(_Outcome("skip list, on other images", search.confirming_images, search.confirmed, point))
    return tabulate("Against the 16-bit model", columns, outcomes)


def _front(result: Sensitivity, chosen: Point | None) -> Table | None:
    """The skip lists that no other one beats in both KL and what the search counted as costs, cheapest first."""
    search = result.search
    if search is None:
        return None
    cost = "time" if search.objective == "latency" and all(p.extra_ms is not None for p in search.points) else "size"
    points = [search.points[index] for index in frontier(search.points, {cost: unit_plots.COSTS[cost]})[cost]]

    def kept(point: Point) -> str:
        count = len(point.skip)
        names = (
            ", ".join(units.in_order(point.skip)) if count <= _MOST_NAMED else f"{count} {units.kind(result, count)}"
        )
        return f"{names or 'nothing'} (chosen)" if point == chosen else names or "nothing"

    columns: dict[str, Cell] = {
        f"kept in {result.half}": kept,
        "agree %": of("loss.agreement_percent", percent),
        "KL, nats": lambda point: with_interval(kl_words, point.loss.kl, point.loss.kl_ci95),
        "extra weights": of("extra_bytes", lambda count: f"+{human_bytes(count)}"),
        "extra ms": of("extra_ms", "{:+.2f}".format),
    }
    title = f"The front of the {len(search.points)} skip lists that were tried: KL for {_COST_WORDS[cost]}"
    return tabulate(title, columns, points)


def _delta(loss: Loss) -> str:
    return delta_words(loss.top1_delta_points, loss.top1_delta_ci95_points, 1)


class _Unit(NamedTuple):
    name: str
    held: str | None
    scores: UnitScores | None
    sample: float | None


def _table(result: Sensitivity) -> Table:
    """All figures by unit; those that only the first pass has seen have nothing but its KL."""
    search, scored, kind = result.search, units.by_name(result), units.kind(result, 1)
    columns: dict[str, Cell] = {
        kind: of("name"),
        "held in": of("held"),
        "damage: KL": of("scores.damage.kl", kl_words),
        "damage: Δ points (95 %)": of("scores.damage", _delta),
        "recovery: KL": of("scores.recovery.kl", kl_words),
        "recovery: Δ points (95 %)": of("scores.recovery", _delta),
        "extra weights": of("scores.extra_bytes", lambda count: f"+{human_bytes(count)}"),
        "extra ms": of("scores.extra_ms", "{:+.3f}".format),
        "first pass: KL": of("sample", kl_words),
    }
    rows = []
    for name in units.known_units(result):
        held = (result.half if name in search.chosen else result.format) if search else None
        rows.append(_Unit(name, held, scored.get(name), result.sample_kl.get(name)))
    return tabulate(f"Every {kind}: damage, recovery, and what 16 bit costs", columns, rows, 2 if search else 1)
