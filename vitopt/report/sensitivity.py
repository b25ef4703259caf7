"""Which layers must stay in 16 bit: a sensitivity analysis and its skip list, in words, figures and a table."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitopt import storage
from vitopt.errors import RecordError
from vitopt.formats import FORMATS, OTHER_COLOUR
from vitopt.recipe import LINEARS
from vitopt.records import Record
from vitopt.report import unit_plots, units
from vitopt.report.details import environment_facts
from vitopt.report.figures import Plot, rendered
from vitopt.report.rendering import templates
from vitopt.report.requirements import requirement_sentence
from vitopt.report.strip import HEAD, Strip, strip_of
from vitopt.report.table import Cell, Table, delta_words, device_name, human_bytes, of, percent, tabulate
from vitopt.report.unit_plots import kl_words
from vitopt.search.results import Loss, Point, Sensitivity, UnitScores, load_sensitivity

FOLDER = "sensitivity"
_MOST_NAMED = 4  # single layers; more do not make a sentence
TITLE = "Which layers must stay in 16 bit"
OWN_FILE = re.compile(rf"{FOLDER}-.+-({'|'.join(unit_plots.NAMES)})\.(svg|png)")


@dataclass(frozen=True)
class Part:
    """All that a page shows of one analysis; `plots` only where they have been drawn."""

    name: str  # of the variant, or of the format where the analysis stands alone
    result: Sensitivity
    answer: str
    facts: tuple[tuple[str, str], ...]
    skip: str | None  # a line of a recipe; None where nothing is kept, or the goal is not met
    strip: Strip | None
    table: Table
    plots: tuple[Plot, ...] = ()

    @property
    def advice(self) -> str | None:
        """What to do where the goal was not shown."""
        return self.result.search.advice if self.result.search else None

    @property
    def telling(self) -> Table:
        """The rows of those units that the bars show."""
        shown = units.telling(self.result)
        return replace(self.table, rows=tuple(row for row in self.table.rows if row[0] in shown))

    def plots_of(self, *names: str) -> list[Plot]:
        """Those figures that were drawn."""
        return [plot for plot in self.plots if plot.name.rsplit("-", 1)[-1] in names]


def read_all(folder: Path, order: Sequence[str] = ()) -> tuple[dict[str, Sensitivity], list[str]]:
    """The analyses of a run by name, those of `order` first, and what could not be read."""
    # What ends in `.partial` is what an interrupted analysis goes on from.
    complete = [path for path in sorted(folder.glob(f"{FOLDER}/*.json")) if not path.stem.endswith(".partial")]
    paths = {path.stem: path for path in complete}
    found: dict[str, Sensitivity] = {}
    unreadable: list[str] = []
    for name in dict.fromkeys([*(name for name in order if name in paths), *paths]):
        try:
            found[name] = load_sensitivity(paths[name])
        except RecordError as error:
            unreadable.append(str(error))
    return found, unreadable


def part_of(name: str, result: Sensitivity, record: Record | None = None) -> Part:
    """What is to be said about one analysis, and about what its variant's `record` says of its floor; no plots yet."""
    point = _chosen_point(result)
    return Part(
        name=name,
        result=result,
        answer=_answer(result),
        facts=tuple(_facts(result, record)),
        skip=f"skip: [{', '.join(point.skip)}]" if point and point.skip and point.within_target else None,
        strip=strip_of(name, _layers(result)) if result.search else None,
        table=_table(result),
    )


def drawn(part: Part, prefix: str, folder: Path | None) -> Part:
    """The part with its figures, whose ids and files begin with `prefix`; saved in `folder` unless that is None.

    Raises:
        StorageError: the folder cannot be written.
    """
    return replace(part, plots=tuple(rendered(unit_plots.drawables(part.result, prefix), folder)))


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
        part=drawn(part_of(result.format, result), FOLDER, None),
        device=device_name(result.environment),
        environment=environment_facts(result.environment),
        **page_context(),
    )
    page = path.with_suffix(".html")
    storage.write_text(page, text)
    return page


def plot_prefix(name: str) -> str:
    """The beginning of the names of a part's figures: safe as an id and as a file, different for different names."""
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


def _answer(result: Sensitivity) -> str:
    search, point, all_kl = result.search, _chosen_point(result), kl_words(result.quantized.kl)
    if search is None:
        text = "No goal was given, so no skip list was chosen."
        recovered = [(unit.recovery.kl, name) for name, unit in units.by_name(result).items() if unit.recovery]
        if recovered:
            kl, name = min(recovered, key=lambda one: one[0])
            text += f" Kept alone, {units.words([name])} brings back most: KL {kl_words(kl)} instead of {all_kl} nats."
        return text
    count = _count(result)
    if point is None or not point.within_target:
        return f"No list met the goal on {result.images:,} images. The nearest keeps {count} in {result.half}."
    decision = {"shown": "shown to be met", "failed": "not met", "undecided": "not shown to be met"}[search.decision]
    end = f"the goal is {decision} on {search.confirming_images:,} other images."
    if not search.chosen:
        return f"Nothing was chosen to stay in 16 bit. With all in {result.format}, {end}"
    price = f"{human_bytes(point.extra_bytes)} more weights"
    if point.extra_ms is not None:
        price += f" and {abs(point.extra_ms):.2f} ms {'more' if point.extra_ms >= 0 else 'less'} per image"
    many = result.granularity == "linear" and len(search.chosen) > _MOST_NAMED
    return (
        f"Keep {count if many else units.words(search.chosen)} in {result.half} and the rest in {result.format}. "
        f"On {result.images:,} calibration images KL falls from {all_kl} to {kl_words(point.loss.kl)} nats, "
        f"for {price}. With this list, {end}"
    )


def _count(result: Sensitivity) -> str:
    chosen, known = len(result.search.chosen if result.search else ()), len(units.known_units(result))
    return f"{chosen} of {known} {units.kind(result)}" if chosen < known else f"all {known} {units.kind(result)}"


def _facts(result: Sensitivity, record: Record | None) -> list[tuple[str, str]]:
    floors = [one for one in (record.requirements if record else ()) if one.name == "auto.max_top1_drop"]
    facts = [("on the tested images", requirement_sentence(one)) for one in floors]
    if (search := result.search) is not None:
        cheapest = {"size": "fewest extra bytes", "latency": "least extra time"}.get(search.objective, search.objective)
        met = {"shown": "yes", "failed": "no", "undecided": "not shown"}[search.decision]
        images = f"{search.confirming_images:,} images that did not choose"
        share, ends = search.confirmed.kl_share, search.confirmed.kl_share_ci95
        confirmed = f"{met}, by the 95 % interval on {images}: {_loss(search.confirmed)}"
        if share is not None and ends is not None:
            low, high = (f"{100 * end:.0f}" for end in ends)
            confirmed += f", KL {100 * share:.0f} % ({low} to {high} %) of that with all quantized"
        facts += [("goal", f"{search.goal}, for the {cheapest}"), ("stays in 16 bit", _count(result))]
        facts += [("goal met", confirmed)] + ([("advice", search.advice)] if search.advice else [])
        if point := _chosen_point(result):
            part = _share(point.loss.kl, result.quantized.kl)
            of_all = f" ({part} of that with all in {result.format})" if part else ""
            facts.append(("with this list", f"{_loss(point.loss)}, KL {kl_words(point.loss.kl)} nats{of_all}"))
        facts.append(("tried", f"{len(search.points)} skip lists"))
    losses = [loss for unit in result.units for loss in (unit.damage, unit.recovery) if loss]
    changed, chance = sum(map(units.shows_change, losses)), 0.05 * len(losses)
    change = f"{changed} of {len(losses)} intervals exclude no change; about {chance:.0f} would by chance alone"
    facts.append((f"all in {result.format}", f"{_loss(result.quantized)}, KL {kl_words(result.quantized.kl)} nats"))
    facts += [("top-1 by unit", change), ("calibration", f"{result.images:,} images of {result.dataset}")]
    return facts + ([] if result.sample_images is None else [("first pass", _first_pass(result))])


def _first_pass(result: Sensitivity) -> str:
    """The label-free first pass, and how well it agrees with the exact table where both are known."""
    both = [
        (result.sample_kl[one.unit], one.recovery.kl)
        for one in result.units
        if one.recovery and one.unit in result.sample_kl
    ]
    text = (
        f"{len(result.sample_kl)} {units.kind(result)} ranked by KL on {result.sample_images:,} images, labels unused"
    )
    text += f"; {len(result.units)} of them then scored exactly"
    if not both or any(len(set(kl)) == 1 for kl in zip(*both, strict=True)):  # fewer than two, or all equal
        return text
    from scipy.stats import spearmanr  # slow to import

    correlation = spearmanr(*zip(*both, strict=True)).statistic
    return f"{text}. The rank correlation of these {len(both)} with the exact recovery KL is {correlation:.2f}"


def _loss(loss: Loss) -> str:
    delta, agreement = _delta(loss).replace("-", "−"), percent(loss.agreement_percent)
    return f"top-1 {delta} points against 16 bit, same class on {agreement} %"


def _delta(loss: Loss) -> str:
    return delta_words(loss.top1_delta_points, loss.top1_delta_ci95_points, 1)


def _share(part: float, whole: float) -> str | None:
    """A percentage, to a tenth below ten."""
    share = 100 * part / whole if whole > 0 else None
    return None if share is None else f"{share:.{1 if abs(share) < 9.95 else 0}f} %"


@dataclass(frozen=True)
class _Unit:
    name: str
    held: str | None
    scores: UnitScores | None
    sample: float | None


def _table(result: Sensitivity) -> Table:
    """All figures by unit; those that only the first pass has seen have nothing but its KL."""
    search, scored, all_kl, kind = result.search, units.by_name(result), result.quantized.kl, units.kind(result, 1)
    columns: dict[str, Cell] = {
        kind: of("name"),
        **({"held in": of("held")} if search else {}),
        "damage: KL": of("scores.damage.kl", kl_words),
        "damage: Δ points (95 %)": of("scores.damage", _delta),
        "recovery: KL": of("scores.recovery.kl", kl_words),
        "brought back": of("scores.recovery.kl", lambda kl: _share(all_kl - kl, all_kl)),
        "recovery: Δ points (95 %)": of("scores.recovery", _delta),
        "extra weights": of("scores.extra_bytes", lambda count: f"+{human_bytes(count)}"),
        "extra ms": of("scores.extra_ms", "{:+.3f}".format),
        "first pass: KL": of("sample", kl_words),
    }
    rows = [
        _Unit(
            name,
            result.half if search and name in search.chosen else result.format,
            scored.get(name),
            result.sample_kl.get(name),
        )
        for name in units.known_units(result)
    ]
    return tabulate(f"Every {kind}: damage, recovery, and what 16 bit costs", columns, rows, 2 if search else 1)
