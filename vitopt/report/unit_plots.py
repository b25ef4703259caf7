"""Figures of a sensitivity analysis: units as bars, linear layers as a map, skip lists against what they cost."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from vitopt.formats import colour_of
from vitopt.measure.statistics import pareto_front
from vitopt.recipe import LINEARS, QKV
from vitopt.report import units
from vitopt.report.figures import Plot, canvas, step_line, styled
from vitopt.report.labels import label_points
from vitopt.report.svg import INK
from vitopt.report.table import human_bytes
from vitopt.search.results import Loss, Point, Sensitivity
from vitopt.search.skiplist import frontier

Table = Literal["damage", "recovery"]
KIND = "sensitivity"
COSTS: dict[str, Callable[[Point], float | None]] = {
    "size": lambda point: point.extra_bytes / 1e6,
    "time": lambda point: point.extra_ms,
}
NAMES = ("damage", "recovery", "map", *COSTS)  # ends of the names of the figures' files
_COST_LABELS = {"size": "extra weights, MB", "time": "extra time at batch 1, ms per image"}
_ROW = 17.0  # points per unit
_SMALL = 10.5
_LONGEST_TICKS = 20  # characters


def drawables(result: Sensitivity, prefix: str) -> list[Plot]:
    """All figures of one analysis; names of their files begin with `prefix`."""
    one, quantized = units.kind(result, 1), result.format
    found = [
        ("damage", f"Damage: only this {one} in {quantized}", _words(result, "damage"), unit_bars(result, "damage")),
        (
            "recovery",
            f"Recovery: only this {one} in {result.half}, the others in {quantized}",
            _words(result, "recovery"),
            unit_bars(result, "recovery"),
        ),
        (
            "map",
            "Every layer: damage and recovery",
            f"The strongest. {_words(result, 'damage', 3)}; {_words(result, 'recovery', 3)}",
            layer_map(result),
        ),
        ("size", "Skip lists by their weights", _front_words(result, "size"), cost_front(result, "size")),
        ("time", "Skip lists by their time", _front_words(result, "time"), cost_front(result, "time")),
    ]
    return [Plot(f"{prefix}-{name}", KIND, title, words, figure) for name, title, words, figure in found]


@styled()
def unit_bars(result: Sensitivity, table: Table) -> Figure | None:
    """KL in nats as bars and, beside them, the change of top-1 in points with its 95 % interval, by unit.

    Recovery bars begin at the KL of the fully quantized model. None where no unit has this table.
    """
    shown, losses = units.telling(result), _losses(result, table)
    if not losses:
        return None
    figure = canvas(_ROW * len(shown) + 62, between=0.12)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
    start = result.quantized.kl if table == "recovery" else 0.0
    for row, name in enumerate(shown):
        if (loss := losses.get(name)) is None:
            continue
        colour = colour_of(result.half if name in _chosen(result) else result.format)
        left.barh(row, loss.kl - start, 0.62, left=start, color=colour)
        right.plot(loss.top1_delta_ci95_points, [row, row], color=colour, linewidth=1.4)
        _dot(right, loss.top1_delta_points, row, colour, units.shows_change(loss), size=5)
    if table == "recovery":
        left.use_sticky_edges = False  # room on both sides of the line
        left.autoscale_view(scaley=False)
        left.axvline(start, color=INK, linewidth=1.2)
        low, high = left.get_xlim()
        aside, side = (-5, "right") if start - low > high - start else (5, "left")
        text, style = f"all {result.format} {kl_words(start)}", {"va": "center", "ha": side, "fontsize": _SMALL}
        left.annotate(text, (start, -0.95), (aside, 0), textcoords="offset points", **style)
    else:
        left.set_xlim(0, None if any(loss.kl for loss in losses.values()) else 1)
    right.axvline(0, color=INK, linewidth=0.8, alpha=0.6)
    left.set_ylim(len(shown) - 0.4, -1.5)  # in both tables, so that their rows are level
    left.set_yticks(range(len(shown)), [units.short_name(name) for name in shown], fontsize=_SMALL)
    left.set(xlabel="KL, nats", ylabel="block" if result.granularity != "linear" else "block, layer")
    right.set_xlabel("Δ top-1, points (95 %)")
    right.spines["left"].set_visible(False)
    for axes in (left, right):
        axes.grid(True, axis="x")
        _few_ticks(axes)
    return figure


@styled()
def layer_map(result: Sensitivity) -> Figure | None:
    """Blocks across, linear layers down: damage, and KL brought back, both in nats, as strength of colour.

    None for whole blocks, and where less than half of the layers were scored.
    """
    known = {name: units.place(name) for name in units.known_units(result)}
    if result.granularity != "linear" or 2 * len(result.units) < len(known):
        return None
    blocks = sorted({number for number, _ in known.values()})
    present = {linear for _, linear in known.values()}
    linears = [linear for linear in (QKV, *LINEARS) if linear in present]
    cells = {
        name: (blocks.index(number), linears.index(linear))
        for name, (number, linear) in known.items()
        if linear in linears
    }
    figure = canvas(2 * (_ROW * len(linears) + 24) + 56, between=0.12)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _map_panel(upper, result, "damage", cells)
    _map_panel(lower, result, "recovery", cells)
    for axes in (upper, lower):
        axes.set_yticks(range(len(linears)), linears, fontsize=_SMALL)
        axes.set(xlim=(-0.5, len(blocks) - 0.5), ylim=(len(linears) - 0.5, -0.5))
        axes.spines[:].set_visible(False)
    every = 1 if len(blocks) <= 16 else 4
    ticks = [column for column, number in enumerate(blocks) if number % every == 0]
    lower.set_xticks(ticks, [str(blocks[column]) for column in ticks])
    lower.set_xlabel("block")
    return figure


def _map_panel(axes: Axes, result: Sensitivity, table: Table, cells: Mapping[str, tuple[int, int]]) -> None:
    """One map; `cells` has column and row of every unit."""
    values = _effects(result, table)
    full = max(map(abs, values.values()), default=0.0) or 1.0
    for name, (column, row) in cells.items():
        if (value := values.get(name)) is None:
            axes.plot(column, row, "o", color=INK, alpha=0.3, markersize=1.5)
            continue
        # Keeping a layer can make things worse; that has the colour of damage.
        colour = colour_of(result.half if table == "recovery" and value >= 0 else result.format)
        strength = to_rgba(colour, round(0.05 + 0.95 * abs(value) / full, 2))
        axes.barh(row, 0.86, 0.82, left=column - 0.43, color=strength)
        if name in _chosen(result):
            axes.barh(row, 0.86, 0.82, left=column - 0.43, fill=False, edgecolor=INK, linewidth=1.2)
    what = "Damage: KL" if table == "damage" else "Recovery: KL brought back"
    axes.set_title(f"{what}; full colour {kl_words(full)} nats", loc="left", fontsize=11.5)


@styled()
def cost_front(result: Sensitivity, cost: str) -> Figure | None:
    """KL and loss of top-1 against a cost of COSTS, one dot per skip list that was tried.

    None without a search, and where fewer than two lists have this cost.
    """
    points = _points(result, cost)
    if len(points) < 2:
        return None
    x = np.array([COSTS[cost](point) for point in points], np.float64)
    kl = np.array([point.loss.kl for point in points])
    loss = -np.array([point.loss.top1_delta_points for point in points])
    figure = canvas(400)
    upper, lower = figure.subplots(2, 1, sharex=True)
    step_line(upper, x, kl, frontier(points, {cost: COSTS[cost]})[cost])
    front = pareto_front(x, -loss)
    step_line(lower, x, loss, front)
    # Only the chosen list and the fully quantized model have a label.
    labels = [_label(result, point) for point in points]
    labelled = [index for index, label in enumerate(labels) if label]
    # Of all lists the intervals would hide the dots; those of equal lists are drawn once.
    for index in {(x[index], loss[index]): index for index in [*front, *labelled]}.values():
        low, high = points[index].loss.top1_delta_ci95_points
        colour = colour_of(result.half if _is_chosen(result, points[index]) else result.format)
        lower.plot([x[index]] * 2, [-low, -high], color=colour, alpha=0.45, zorder=2)
    for axes, y in ((upper, kl), (lower, loss)):
        for point, at_x, at_y in zip(points, x, y, strict=True):
            colour = colour_of(result.half if _is_chosen(result, point) else result.format)
            _dot(axes, at_x, at_y, colour, point.within_target)
            if _is_chosen(result, point):
                _dot(axes, at_x, at_y, colour, False, size=12)
        axes.grid(True)
        axes.margins(x=0.12, y=0.12)
    upper.set(ylabel="KL, nats", ylim=(0, None))
    lower.set(ylabel="loss of top-1, points", xlabel=_COST_LABELS[cost])
    for axes, y in ((upper, kl), (lower, loss)):
        label_points(figure, axes, labels, x, y)
    return figure


def kl_words(kl: float) -> str:
    """Four decimals, or two digits where that would be little more than zero; in nats."""
    return f"{kl:.4f}" if kl == 0 or abs(kl) >= 0.001 else f"{kl:#.2g}"


def _chosen(result: Sensitivity) -> frozenset[str]:
    return frozenset(result.search.chosen) if result.search else frozenset()


def _is_chosen(result: Sensitivity, point: Point) -> bool:
    return frozenset(point.skip) == _chosen(result)


def _points(result: Sensitivity, cost: str) -> list[Point]:
    tried = result.search.points if result.search else ()
    return [point for point in tried if COSTS[cost](point) is not None]


def _label(result: Sensitivity, point: Point) -> str:
    count = len(point.skip)
    name = f"{count} {units.kind(result, count)}" if count else f"all {result.format}"
    return f"chosen: {name}" if _is_chosen(result, point) else "" if count else name


def _losses(result: Sensitivity, table: Table) -> dict[str, Loss]:
    """One table by unit, in order."""
    found: dict[str, Any] = {name: getattr(unit, table) for name, unit in units.by_name(result).items()}
    return {name: loss for name, loss in found.items() if loss is not None}


def _effects(result: Sensitivity, table: Table) -> dict[str, float]:
    """Damage, or what is brought back, in nats by unit."""
    start, sign = (0.0, 1) if table == "damage" else (result.quantized.kl, -1)
    return {name: start + sign * loss.kl for name, loss in _losses(result, table).items()}


def _dot(axes: Axes, x: float, y: float, colour: str, filled: bool, size: float = 5.5) -> None:
    face = colour if filled else "none"
    axes.plot(x, y, "o", color=colour, markersize=size, markerfacecolor=face, markeredgewidth=1.4, zorder=3)


def _few_ticks(axes: Axes) -> None:
    """As many figures below the axes as half of a figure has room for; the axes must have their final limits."""
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    low, high = axes.get_xlim()
    for bins in (4, 3, 2):
        axes.xaxis.set_major_locator(MaxNLocator(bins, steps=[1, 2, 5, 10]))
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        if sum(map(len, axes.xaxis.get_major_formatter().format_ticks(shown))) <= _LONGEST_TICKS:
            return


def _words(result: Sensitivity, table: Table, most: int | None = None) -> str:
    """Effects of the units, or of the `most` strongest ones."""
    effects = _effects(result, table)
    strongest = sorted(effects, key=lambda name: -effects[name])[:most]
    shown = [name for name in effects if name in (strongest if most else units.telling(result))]
    what = "KL in nats: " if table == "damage" else "KL brought back, in nats: "
    return what + ", ".join(f"{name} {kl_words(effects[name])}" for name in shown)


def _front_words(result: Sensitivity, cost: str) -> str:
    points = _points(result, cost)
    said = []
    for point in (points[index] for index in (frontier(points, {cost: COSTS[cost]})[cost] if points else ())):
        price = human_bytes(point.extra_bytes) if cost == "size" else f"{point.extra_ms or 0:.3f} ms"
        said.append(f"{len(point.skip)} {units.kind(result)} for {price}, KL {kl_words(point.loss.kl)}")
    return "; ".join(said)
