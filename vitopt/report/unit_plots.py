"""Figures of a sensitivity analysis: units as bars, linear layers as a map, skip lists against what they cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from vitopt.formats import colour_of
from vitopt.measure.statistics import pareto_front
from vitopt.recipe import LINEARS
from vitopt.report import units
from vitopt.report.figures import Drawable, canvas, styled
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


def drawables(result: Sensitivity, prefix: str) -> list[Drawable]:
    """All figures of one analysis; names of their files begin with `prefix`."""
    one = units.kind(result, 1)
    titles = {
        "damage": f"Damage: only this {one} in {result.format}",
        "recovery": f"Recovery: only this {one} in {result.half}, the others in {result.format}",
        "map": "Every layer: damage and recovery",
        "size": "Skip lists by their weights",
        "time": "Skip lists by their time",
    }
    with styled():
        drawn = {
            "damage": (unit_bars(result, "damage"), _bars_words(result, "damage")),
            "recovery": (unit_bars(result, "recovery"), _bars_words(result, "recovery")),
            "map": (layer_map(result), "The strongest colours: " + _strongest_words(result)),
            **{cost: (cost_front(result, cost), _front_words(result, cost)) for cost in COSTS},
        }
    return [(f"{prefix}-{name}", KIND, None, titles[name], words, figure) for name, (figure, words) in drawn.items()]


def unit_bars(result: Sensitivity, table: Table) -> Figure | None:
    """KL in nats as bars and, beside them, the change of top-1 in points with its 95 % interval, by unit.

    Recovery bars begin at the KL of the fully quantized model. None where no unit has this table.
    """
    shown = units.telling(result)
    losses, chosen = _losses(result, table), _chosen(result)
    if not losses:
        return None
    with styled():
        figure = canvas(_ROW * len(shown) + 62, between=0.12)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
        start = result.quantized.kl if table == "recovery" else 0.0
        for row, name in enumerate(shown):
            loss = losses.get(name)
            if loss is None:
                continue
            colour = colour_of(result.half if name in chosen else result.format)
            left.barh(row, loss.kl - start, 0.62, left=start, color=colour)
            low, high = loss.top1_delta_ci95_points
            right.plot([low, high], [row, row], color=colour, linewidth=1.4)
            face = colour if units.shows_change(loss) else "none"
            right.plot(
                [loss.top1_delta_points],
                [row],
                "o",
                color=colour,
                markersize=5,
                markerfacecolor=face,
                markeredgewidth=1.4,
            )
        if table == "recovery":
            left.use_sticky_edges = False  # room on both sides of the line
            left.autoscale_view(scaley=False)
            _reference_line(left, start, f"all {result.format} {kl_words(start)}")
        else:
            left.set_xlim(0, None if any(loss.kl for loss in losses.values()) else 1)
        right.axvline(0, color=INK, linewidth=0.8, alpha=0.6)
        left.set_ylim(len(shown) - 0.4, -1.5)  # in both tables, so that their rows are level
        left.set_yticks(range(len(shown)), [units.short_name(name) for name in shown], fontsize=_SMALL)
        left.set_ylabel("block" if result.granularity != "linear" else "block, layer")
        left.set_xlabel("KL, nats")
        right.set_xlabel("Δ top-1, points (95 %)")
        right.spines["left"].set_visible(False)
        for axes in (left, right):
            axes.tick_params(length=0)
            axes.grid(True, axis="x")
            _few_ticks(axes)
        return figure


def layer_map(result: Sensitivity) -> Figure | None:
    """Blocks across, linear layers down: damage, and KL brought back, both in nats, as strength of colour.

    None for whole blocks, and where less than half of the layers were scored.
    """
    known, scored = units.known_units(result), units.by_name(result)
    if result.granularity != "linear" or 2 * len(scored) < len(known):
        return None
    blocks = sorted({units.place(name)[0] for name in known})
    linears = [linear for linear in LINEARS if any(units.place(name)[1] == linear for name in known)]
    places = {name: (blocks.index(number), linear) for name in known for number, linear in [units.place(name)]}
    cells = {name: (column, linears.index(linear)) for name, (column, linear) in places.items() if linear in linears}
    with styled():
        figure = canvas(2 * (_ROW * len(linears) + 24) + 56, between=0.12)
        upper, lower = figure.subplots(2, 1, sharex=True)
        _map_panel(upper, result, "damage", cells)
        _map_panel(lower, result, "recovery", cells)
        for axes in (upper, lower):
            axes.set_yticks(range(len(linears)), linears, fontsize=_SMALL)
            axes.set_ylim(len(linears) - 0.5, -0.5)
            axes.set_xlim(-0.5, len(blocks) - 0.5)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        every = 1 if len(blocks) <= 16 else 4
        ticks = [column for column, number in enumerate(blocks) if number % every == 0]
        lower.set_xticks(ticks, [str(blocks[column]) for column in ticks])
        lower.set_xlabel("block")
        return figure


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
    with styled():
        figure = canvas(400)
        upper, lower = figure.subplots(2, 1, sharex=True)
        _front(upper, x, kl, frontier(points, {cost: COSTS[cost]})[cost])
        front = pareto_front(x, -loss)
        _front(lower, x, loss, front)
        labels = _point_labels(result, points)
        labelled = [index for index, label in enumerate(labels) if label]
        # Of all lists the intervals would hide the dots; those of equal lists are drawn once.
        for index in {(x[index], loss[index]): index for index in [*front, *labelled]}.values():
            low, high = points[index].loss.top1_delta_ci95_points
            colour = _dot_colour(result, points[index])
            lower.plot([x[index]] * 2, [-low, -high], color=colour, alpha=0.45, zorder=2)
        for axes, y in ((upper, kl), (lower, loss)):
            for point, at_x, at_y in zip(points, x, y, strict=True):
                _dot(axes, result, point, at_x, at_y)
            axes.grid(True)
            axes.tick_params(length=0)
            axes.margins(x=0.12, y=0.12)
        upper.set_ylim(0, None)
        upper.set_ylabel("KL, nats")
        lower.set_ylabel("loss of top-1, points")
        lower.set_xlabel(_COST_LABELS[cost])
        for axes, y in ((upper, kl), (lower, loss)):
            label_points(figure, axes, labels, x, y)
        return figure


def kl_words(kl: float) -> str:
    """Four decimals, or two digits where that would be little more than zero; in nats."""
    return f"{kl:.4f}" if kl == 0 or abs(kl) >= 0.001 else f"{kl:#.2g}"


def _chosen(result: Sensitivity) -> frozenset[str]:
    return frozenset(result.search.chosen) if result.search else frozenset()


def _losses(result: Sensitivity, table: Table) -> dict[str, Loss]:
    """One table by unit, in order."""
    found = {name: unit.damage if table == "damage" else unit.recovery for name, unit in units.by_name(result).items()}
    return {name: loss for name, loss in found.items() if loss is not None}


def _few_ticks(axes: Axes) -> None:
    """As many figures below the axes as half of a figure has room for; the axes must have their final limits."""
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    low, high = axes.get_xlim()
    for bins in (4, 3, 2):
        axes.xaxis.set_major_locator(MaxNLocator(bins, steps=[1, 2, 5, 10]))
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        if sum(map(len, axes.xaxis.get_major_formatter().format_ticks(shown))) <= _LONGEST_TICKS:
            return


def _reference_line(axes: Axes, at: float, text: str) -> None:
    axes.axvline(at, color=INK, linewidth=1.2)
    low, high = axes.get_xlim()
    to_the_left = at - low > high - at
    axes.annotate(
        text,
        (at, -0.95),
        (-5 if to_the_left else 5, 0),
        textcoords="offset points",
        va="center",
        ha="right" if to_the_left else "left",
        fontsize=_SMALL,
    )


def _map_values(result: Sensitivity, table: Table) -> dict[str, float]:
    """Damage, or what is brought back, in nats by unit."""
    found = _losses(result, table)
    if table == "damage":
        return {name: loss.kl for name, loss in found.items()}
    return {name: result.quantized.kl - loss.kl for name, loss in found.items()}


def _map_panel(axes: Axes, result: Sensitivity, table: Table, cells: Mapping[str, tuple[int, int]]) -> None:
    """One map; `cells` has column and row of every unit."""
    values, chosen = _map_values(result, table), _chosen(result)
    full = max(map(abs, values.values()), default=0.0) or 1.0
    for name, (column, row) in cells.items():
        value = values.get(name)
        if value is None:
            axes.plot([column], [row], "o", color=INK, alpha=0.3, markersize=1.5)
            continue
        # Keeping a layer can make things worse; that has the colour of damage.
        colour = colour_of(result.half if table == "recovery" and value >= 0 else result.format)
        strength = to_rgba(colour, round(0.05 + 0.95 * abs(value) / full, 2))
        axes.barh(row, 0.86, 0.82, left=column - 0.43, color=strength)
        if name in chosen:
            axes.barh(row, 0.86, 0.82, left=column - 0.43, fill=False, edgecolor=INK, linewidth=1.2)
    what = "Damage: KL" if table == "damage" else "Recovery: KL brought back"
    axes.set_title(f"{what}; full colour {kl_words(full)} nats", loc="left", fontsize=11.5)


def _points(result: Sensitivity, cost: str) -> list[Point]:
    tried = result.search.points if result.search else ()
    return [point for point in tried if COSTS[cost](point) is not None]


def _front(axes: Axes, x: np.ndarray, y: np.ndarray, front: Sequence[int]) -> None:
    # Along a step: what a cheaper list reaches holds until the next one is affordable.
    steps_x, steps_y = np.repeat(x[front], 2)[1:], np.repeat(y[front], 2)[:-1]
    axes.plot(steps_x, steps_y, color=INK, alpha=0.45, linewidth=1.2, zorder=1)


def _dot_colour(result: Sensitivity, point: Point) -> str:
    return colour_of(result.half if frozenset(point.skip) == _chosen(result) else result.format)


def _dot(axes: Axes, result: Sensitivity, point: Point, x: float, y: float) -> None:
    colour = _dot_colour(result, point)
    is_chosen = frozenset(point.skip) == _chosen(result)
    face = colour if point.within_target else "none"
    axes.plot(
        [x], [y], "o", markersize=5.5, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.5, zorder=3
    )
    if is_chosen:
        axes.plot([x], [y], "o", markersize=12, markerfacecolor="none", markeredgecolor=colour, zorder=4)


def _point_labels(result: Sensitivity, points: Sequence[Point]) -> list[str]:
    """Only the chosen list and the fully quantized model have a label."""
    chosen = _chosen(result)
    labels = []
    for point in points:
        count = len(point.skip)
        name = f"{count} {units.kind(result, count)}" if count else f"all {result.format}"
        is_chosen = frozenset(point.skip) == chosen
        labels.append(f"chosen: {name}" if is_chosen else "" if count else name)
    return labels


def _bars_words(result: Sensitivity, table: Table) -> str:
    losses = _losses(result, table)
    shown = [name for name in units.telling(result) if name in losses]
    return "KL in nats by unit: " + ", ".join(f"{name} {kl_words(losses[name].kl)}" for name in shown)


def _strongest_words(result: Sensitivity) -> str:
    said = []
    tables: tuple[Table, ...] = ("damage", "recovery")
    for table in tables:
        values = _map_values(result, table)
        if values:
            name = max(values, key=lambda unit: values[unit])
            said.append(f"{table} {name} {kl_words(values[name])} nats")
    return ", ".join(said)


def _front_words(result: Sensitivity, cost: str) -> str:
    points = _points(result, cost)
    if not points:
        return ""
    said = []
    for index in frontier(points, {cost: COSTS[cost]})[cost]:
        point, count = points[index], len(points[index].skip)
        price = human_bytes(point.extra_bytes) if cost == "size" else f"{point.extra_ms or 0:.3f} ms"
        said.append(f"{count} {units.kind(result, count)} for {price}, KL {kl_words(point.loss.kl)}")
    return "The front of KL: " + "; ".join(said)
