"""Which layers must stay in 16 bit: a sensitivity analysis and its skip list, in words, figures and a table."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitopt import storage
from vitopt.errors import RecordError
from vitopt.formats import FORMATS, OTHER_COLOUR
from vitopt.measure import statistics
from vitopt.recipe import LINEARS
from vitopt.records import Record
from vitopt.report import unit_plots, units
from vitopt.report.details import environment_facts
from vitopt.report.figures import Plot, rendered
from vitopt.report.rendering import inlined, templates
from vitopt.report.requirements import requirement_sentence
from vitopt.report.strip import HEAD, Strip, formats_in, strip_of
from vitopt.report.table import UNKNOWN, Table, delta_words, device_name, human_bytes, markdown_text, percent
from vitopt.report.unit_plots import kl_words
from vitopt.search.results import Loss, Point, SearchResult, Sensitivity, UnitScores, load_sensitivity

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
    advice: str | None
    skip: str | None  # a line of a recipe; None where nothing is kept, or the goal is not met
    strip: Strip | None
    formats: tuple[str, ...]  # whose colours occur
    hidden: str | None  # which units the bars leave out
    table: Table
    plots: tuple[Plot, ...] = ()

    def plots_of(self, *names: str) -> list[dict[str, Any]]:
        """Those figures that were drawn, ready for a template."""
        return [inlined(plot) for plot in self.plots if plot.name.rsplit("-", 1)[-1] in names]


def read_all(folder: Path, order: Sequence[str] = ()) -> tuple[dict[str, Sensitivity], list[str]]:
    """The analyses of a run by name, those of `order` first, and what could not be read."""
    found: dict[str, Sensitivity] = {}
    unreadable: list[str] = []
    for path in sorted(folder.glob(f"{FOLDER}/*.json"), key=lambda path: _position(path.stem, order)):
        if path.stem.endswith(".partial"):  # what an interrupted analysis goes on from
            continue
        try:
            found[path.stem] = load_sensitivity(path)
        except RecordError as error:
            unreadable.append(str(error))
    return found, unreadable


def part_of(name: str, result: Sensitivity, record: Record | None = None) -> Part:
    """What is to be said about one analysis, and about what its variant's `record` says of its floor; no plots yet."""
    strip = strip_of(name, _layers(result)) if result.search else None
    known, shown = len(units.by_name(result)), len(units.telling(result))
    hidden = f"The {shown} of {known} layers that matter most by damage or recovery are shown"
    return Part(
        name=name,
        result=result,
        answer=_answer(result),
        facts=tuple(_facts(result, record)),
        advice=result.search.advice if result.search else None,
        skip=_skip_line(result.search) if result.search else None,
        strip=strip,
        formats=tuple(formats_in([strip])) if strip else (result.format,),
        hidden=f"{hidden}, {known - shown} are left out." if shown < known else None,
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
    part = drawn(part_of(result.format, result), FOLDER, None)
    page = path.with_suffix(".html")
    text = templates.get_template("sensitivity.html").render(
        title=f"{result.format} on {Path(result.checkpoint).name}",
        section=TITLE,
        part=part,
        device=device_name(result.environment),
        environment=environment_facts(result.environment),
        **page_context(),
    )
    storage.write_text(page, text)
    return page


def plot_prefix(name: str) -> str:
    """The beginning of the names of a part's figures: safe as an id and as a file, different for different names."""
    safe = all(letter.isascii() and (letter.isalnum() or letter in "._+-") for letter in name)
    return f"{FOLDER}-{name if safe else storage.sha256_of_json(name)[:12]}"


def cautions(parts: Sequence[Part]) -> list[str]:
    """What a reader of the whole page must know: goals that were not shown, with what to do."""
    return [f"{part.name}: {part.advice}" for part in parts if part.advice]


def page_context() -> dict[str, Any]:
    """What the shared macros of the templates take from the page."""
    colours = {format: facts.colour for format, facts in FORMATS.items()}
    return {"baseline": None, "colours": {**colours, "other": OTHER_COLOUR}, "linears": LINEARS}


def markdown(part: Part, plots_folder: str) -> str:
    """The part in GitHub's Markdown, its plots as files in `plots_folder`."""
    pieces = [f"### {markdown_text(part.name)}", markdown_text(part.answer)]
    pieces.append("\n".join(f"- {name}: {markdown_text(text)}" for name, text in part.facts))
    if part.skip:
        pieces.append(f"```yaml\n{part.skip}\n```")
    pieces += [
        f"![{markdown_text(plot.title)}. {markdown_text(plot.alt)}]({plots_folder}/{plot.name}.png)"
        for plot in part.plots
    ]
    pieces += [markdown_text(part.hidden)] if part.hidden else []
    shown = set(units.telling(part.result))
    rows = [row for row in part.table.rows if row[0] in shown]
    words = part.table.text_columns
    lines = ["| " + " | ".join(part.table.headings) + " |"]
    lines.append("|" + "---|" * words + "---:|" * (len(part.table.headings) - words))
    lines += ["| " + " | ".join(map(markdown_text, row)) + " |" for row in rows]
    pieces.append("\n".join(lines))
    return "\n\n".join(pieces)


def _position(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _layers(result: Sensitivity) -> dict[str, str]:
    """The layer plan that the chosen skip list gives: logical name -> format."""
    chosen = set(result.search.chosen) if result.search else set()
    plan: dict[str, str] = {}
    for unit in units.known_units(result):
        linears = [unit] if units.place(unit)[1] else [f"{unit}.{linear}" for linear in LINEARS]
        plan |= dict.fromkeys(linears, result.half if unit in chosen else result.format)
    return plan | {HEAD: result.half}  # the head is never quantized


def _answer(result: Sensitivity) -> str:
    search = result.search
    if search is None:
        return f"No goal was given, so no skip list was chosen. {_best_alone(result)}".rstrip()
    point = _chosen_point(search)
    if point is None or not point.within_target:
        return (
            f"No list came within the goal on {result.images:,} images; nearest comes {_count_words(result, search)} "
            f"in {result.half}."
        )
    if not search.chosen:
        return f"Nothing was chosen to stay in 16 bit. With all in {result.format}, {_decision_words(search)}."
    price = [f"{human_bytes(point.extra_bytes)} more weights"]
    if point.extra_ms is not None:
        price.append(_time(point.extra_ms))
    return (
        f"Keep {_chosen_words(result, search)} in {result.half} and the rest in {result.format}. "
        f"On {result.images:,} calibration images KL falls from {kl_words(result.quantized.kl)} to "
        f"{kl_words(point.loss.kl)} nats, for {' and '.join(price)}. With this list, {_decision_words(search)}."
    )


def _count_words(result: Sensitivity, search: SearchResult) -> str:
    chosen, known = len(search.chosen), len(units.known_units(result))
    return f"{chosen} of {known} {units.kind(result, known)}" if chosen < known else f"all {known} {units.kind(result)}"


def _chosen_words(result: Sensitivity, search: SearchResult) -> str:
    """The units by name, or only how many where they are too many for a sentence."""
    if result.granularity == "linear" and len(search.chosen) > _MOST_NAMED:
        return _count_words(result, search)
    return units.words(search.chosen)


def _skip_line(search: SearchResult) -> str | None:
    point = _chosen_point(search)
    return f"skip: [{', '.join(search.chosen)}]" if search.chosen and point and point.within_target else None


def _time(milliseconds: float) -> str:
    return f"{abs(milliseconds):.2f} ms {'more' if milliseconds >= 0 else 'less'} per image"


def _best_alone(result: Sensitivity) -> str:
    found = {name: unit.recovery.kl for name, unit in units.by_name(result).items() if unit.recovery}
    if not found:
        return ""
    best = min(found, key=lambda name: found[name])
    return (
        f"Kept alone, {units.words([best])} brings back most: KL falls from {kl_words(result.quantized.kl)} "
        f"to {kl_words(found[best])} nats."
    )


def _facts(result: Sensitivity, record: Record | None) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    floors = [] if record is None else [one for one in record.requirements if one.name == "auto.max_top1_drop"]
    facts += [("on the tested images", requirement_sentence(one)) for one in floors]
    search = result.search
    if search is not None:
        facts += _search_facts(result, search)
    quantized = result.quantized
    facts.append((f"all in {result.format}", f"{_loss_words(quantized)}, KL {kl_words(quantized.kl)} nats"))
    facts.append(("top-1 by unit", _top1_words(result)))
    facts.append(("calibration", f"{result.images:,} images of {result.dataset}"))
    if result.sample_images is not None:
        facts.append(("first pass", _sample_words(result)))
    return facts


def _search_facts(result: Sensitivity, search: SearchResult) -> list[tuple[str, str]]:
    point = _chosen_point(search)
    cheapest = {"size": "fewest extra bytes", "latency": "least extra time"}.get(search.objective, search.objective)
    facts = [("goal", f"{search.goal}, for the {cheapest}")]
    facts.append(("stays in 16 bit", _count_words(result, search)))
    facts.append(("goal met", _met(search)))
    if search.advice:
        facts.append(("advice", search.advice))
    if point is not None:
        share = f", {_share(point.loss.kl, result.quantized.kl)} of that with all in {result.format}"
        facts.append(("with this list", f"{_loss_words(point.loss)}, KL {kl_words(point.loss.kl)} nats{share}"))
    facts.append(("tried", f"{len(search.points)} skip lists"))
    return facts


def _met(search: SearchResult) -> str:
    words = {"shown": "yes", "failed": "no", "undecided": "not shown"}[search.decision]
    confirmed = search.confirmed
    share = ""
    if confirmed.kl_share is not None and confirmed.kl_share_ci95 is not None:
        low, high = (100 * end for end in confirmed.kl_share_ci95)
        share = f" ({low:.0f} to {high:.0f} %) of that with all quantized"
        share = f", KL {100 * confirmed.kl_share:.0f} %{share}"
    return (
        f"{words}, by the 95 % interval on {search.confirming_images:,} images that did not choose: "
        f"{_loss_words(confirmed)}{share}"
    )


def _decision_words(search: SearchResult) -> str:
    words = {"shown": "the goal is shown to be met", "failed": "the goal is not met"}.get(
        search.decision, "it is not shown that the goal is met"
    )
    return f"{words} on {search.confirming_images:,} other images"


def _top1_words(result: Sensitivity) -> str:
    losses = [loss for unit in result.units for loss in (unit.damage, unit.recovery) if loss]
    changed = sum(map(units.shows_change, losses))
    return (
        f"{changed} of {len(losses)} intervals exclude no change; about {len(losses) * 0.05:.0f} would by chance alone"
    )


def _sample_words(result: Sensitivity) -> str:
    """The label-free first pass, and how well it agrees with the exact table where both are known."""
    both = [
        (result.sample_kl[name], unit.recovery.kl)
        for name, unit in units.by_name(result).items()
        if unit.recovery is not None and name in result.sample_kl
    ]
    text = (
        f"{len(result.sample_kl)} {units.kind(result)} ranked by KL on {result.sample_images:,} images, labels unused; "
        f"{len(result.units)} of them then scored exactly"
    )
    try:
        correlation = statistics.spearman([first for first, _ in both], [exact for _, exact in both])
    except ValueError:  # fewer than two, or all equal
        return text
    return f"{text}. Over these {len(both)}, its rank correlation with the exact recovery KL is {correlation:.2f}"


def _loss_words(loss: Loss) -> str:
    delta = delta_words(loss.top1_delta_points, loss.top1_delta_ci95_points, 1).replace("-", "−")
    return f"top-1 {delta} points against 16 bit, same class on {percent(loss.agreement_percent)} %"


def _share(part: float, whole: float) -> str:
    """A percentage, to a tenth below ten."""
    if whole <= 0:
        return UNKNOWN
    percentage = 100 * part / whole
    return f"{percentage:.{1 if abs(percentage) < 9.95 else 0}f} %"


def _chosen_point(search: SearchResult) -> Point | None:
    return next((point for point in search.points if set(point.skip) == set(search.chosen)), None)


def _table(result: Sensitivity) -> Table:
    """All figures by unit; those that only the first pass has seen have nothing but its KL."""
    scored, chosen = units.by_name(result), set(result.search.chosen) if result.search else set()
    rows = []
    for name in units.known_units(result):
        held = (result.half if name in chosen else result.format,) if result.search else ()
        sample = result.sample_kl.get(name)
        rows.append((name, *held, *_cells(scored.get(name), result), UNKNOWN if sample is None else kl_words(sample)))
    headings = (
        units.kind(result, 1),
        *(("held in",) if result.search else ()),
        "damage: KL",
        "Δ points (95 %)",
        "recovery: KL",
        "brought back",
        "Δ points (95 %)",
        "extra weights",
        "extra ms",
        "first pass: KL",
    )
    caption = f"Every {units.kind(result, 1)}: damage, recovery, and what 16 bit costs"
    return Table(caption, headings, tuple(rows), text_columns=2 if result.search else 1).known()


def _cells(unit: UnitScores | None, result: Sensitivity) -> tuple[str, ...]:
    if unit is None:
        return (UNKNOWN,) * 7
    gain = None if unit.recovery is None else _share(result.quantized.kl - unit.recovery.kl, result.quantized.kl)
    (damage, damage_delta), (recovery, recovery_delta) = map(_loss_cells, (unit.damage, unit.recovery))
    milliseconds = UNKNOWN if unit.extra_ms is None else f"{unit.extra_ms:+.3f}"
    weights = f"+{human_bytes(unit.extra_bytes)}"
    return (damage, damage_delta, recovery, gain or UNKNOWN, recovery_delta, weights, milliseconds)


def _loss_cells(loss: Loss | None) -> tuple[str, str]:
    """KL, and the change of top-1 with its interval."""
    if loss is None:
        return UNKNOWN, UNKNOWN
    return kl_words(loss.kl), delta_words(loss.top1_delta_points, loss.top1_delta_ci95_points, 1)
