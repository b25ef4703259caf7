"""Figures of a sensitivity analysis: units as bars, linear layers as a map, skip lists against what they cost."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitopt.formats import colour_of
from vitopt.layers import LINEARS, QKV
from vitopt.report import units
from vitopt.report.figures import Plot, blank, canvas, step_line, styled
from vitopt.report.labels import label_points
from vitopt.report.svg import INK
from vitopt.search.results import Point, Sensitivity
from vitopt.search.skiplist import frontier

KIND = "sensitivity"
COSTS: dict[str, Callable[[Point], float | None]] = {
    "size": lambda point: point.extra_bytes / 1e6,
    "time": lambda point: point.extra_ms,
}
NAMES = ("units", "map", *COSTS)  # ends of the names of the figures' files
_COST_LABELS = {"size": "extra weights, MB", "time": "extra time at batch 1, ms per image"}
_DAMAGE, _RECOVERY = "Damage: KL, nats", "Recovery: KL brought back, nats"
_ROW = 17.0  # points per unit
_SMALL = 10.5


def drawables(result: Sensitivity, prefix: str) -> list[Plot]:
    """All figures of one analysis; names of their files begin with `prefix`."""
    layers = layer_map(result)
    figures = {
        "units": (f"Every {units.kind(result, 1)} alone", unit_bars(result) if layers is None else None),
        "map": ("Every layer alone", layers),
        "size": ("Skip lists by their weights", cost_front(result, "size")),
        "time": ("Skip lists by their time", cost_front(result, "time")),
    }
    return [Plot(f"{prefix}-{name}", KIND, title, title, figure) for name, (title, figure) in figures.items()]


@styled()
def unit_bars(result: Sensitivity) -> Figure | None:
    """Damage, and KL brought back, of every scored unit as bars; None where there are none."""
    panels = _effects(result)
    shown = [name for name in units.by_name(result) if any(name in effects for effects in panels.values())]
    if not shown:
        return None
    figure = canvas(_ROW * len(shown) + 62, between=0.08)
    for axes, (title, effects) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for row, name in enumerate(shown):
            if name in effects:
                axes.barh(row, effects[name], 0.62, color=_colour(result, name in _chosen(result)))
        if not any(effects.values()):
            axes.set_xlim(0, 1)
        axes.axvline(0, color=INK, linewidth=0.8, alpha=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.grid(True, axis="x")
        axes.set_xlabel(title)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks(range(len(shown)), [_short(name) for name in shown], fontsize=_SMALL)
    return figure


@styled()
def layer_map(result: Sensitivity) -> Figure | None:
    """Blocks across, linear layers down: damage, and KL brought back, as strength of colour.

    None for whole blocks, and where less than half of the layers were scored.
    """
    known = {name: units.place(name) for name in units.known_units(result)}
    if result.granularity != "linear" or 2 * len(result.units) < len(known):
        return None
    blocks = sorted({number for number, _ in known.values()})
    linears = [linear for linear in (QKV, *LINEARS) if linear in {own for _, own in known.values()}]
    figure = canvas(2 * (_ROW * len(linears) + 24) + 56, between=0.12)
    for axes, (title, effects) in zip(figure.subplots(2, 1, sharex=True), _effects(result).items(), strict=True):
        full = max(map(abs, effects.values()), default=0.0) or 1.0
        for name, value in effects.items():
            number, linear = known[name]
            if linear not in linears:
                continue
            # Keeping a layer can make things worse; that has the colour of damage.
            colour = to_rgba(
                _colour(result, title == _RECOVERY and value >= 0), round(0.05 + 0.95 * abs(value) / full, 2)
            )
            edge = INK if name in _chosen(result) else "none"
            place = {"y": linears.index(linear), "left": blocks.index(number) - 0.43}
            axes.barh(**place, width=0.86, height=0.82, color=colour, edgecolor=edge, linewidth=1.2)
        axes.set_title(f"{title}; full colour {kl_words(full)}", loc="left", fontsize=11.5)
        axes.set_yticks(range(len(linears)), linears, fontsize=_SMALL)
        axes.set(xlim=(-0.5, len(blocks) - 0.5), ylim=(len(linears) - 0.5, -0.5))
        axes.spines[:].set_visible(False)
    every = 1 if len(blocks) <= 16 else 4
    ticks = [column for column, number in enumerate(blocks) if number % every == 0]
    axes.set_xticks(ticks, [str(blocks[column]) for column in ticks])
    axes.set_xlabel("block")
    return figure


@styled()
def cost_front(result: Sensitivity, cost: str) -> Figure | None:
    """KL against a cost of COSTS, one dot per skip list that was tried.

    None without a search, and where fewer than two lists have this cost.
    """
    tried = result.search.points if result.search else ()
    points = [point for point in tried if COSTS[cost](point) is not None]
    if len(points) < 2:
        return None
    x = np.array([COSTS[cost](point) for point in points], np.float64)
    kl = np.array([point.loss.kl for point in points])
    figure, axes = blank(240)
    step_line(axes, x, kl, frontier(points, {cost: COSTS[cost]})[cost])
    for point, at_x, at_y in zip(points, x, kl, strict=True):
        chosen = _is_chosen(result, point)
        _dot(axes, at_x, at_y, _colour(result, chosen), point.within_target)
        if chosen:
            _dot(axes, at_x, at_y, _colour(result, chosen), False, size=12)
    axes.grid(True)
    axes.margins(x=0.12, y=0.12)
    axes.set(ylabel="KL, nats", ylim=(-0.04 * kl.max(), None), xlabel=_COST_LABELS[cost])
    label_points(figure, axes, [_label(result, point) for point in points], x, kl)
    return figure


def kl_words(kl: float) -> str:
    """Four decimals, or two digits where that would be little more than zero; in nats."""
    return f"{kl:.4f}" if kl == 0 or abs(kl) >= 0.001 else f"{kl:#.2g}"


def _effects(result: Sensitivity) -> dict[str, dict[str, float]]:
    """Damage, and what is brought back, in nats by unit."""
    scored = units.by_name(result)
    damage = {name: unit.damage.kl for name, unit in scored.items() if unit.damage}
    recovery = {name: result.quantized.kl - unit.recovery.kl for name, unit in scored.items() if unit.recovery}
    return {_DAMAGE: damage, _RECOVERY: recovery}


def _short(unit: str) -> str:
    return unit.removeprefix("block.").replace(".", " ")


def _colour(result: Sensitivity, in_half: bool) -> str:
    return colour_of(result.half if in_half else result.format)


def _chosen(result: Sensitivity) -> frozenset[str]:
    return frozenset(result.search.chosen) if result.search else frozenset()


def _is_chosen(result: Sensitivity, point: Point) -> bool:
    return frozenset(point.skip) == _chosen(result)


def _label(result: Sensitivity, point: Point) -> str:
    """Only the chosen list and the fully quantized model have one."""
    count = len(point.skip)
    name = f"{count} {units.kind(result, count)}" if count else f"all {result.format}"
    return f"chosen: {name}" if _is_chosen(result, point) else "" if count else name


def _dot(axes: Axes, x: float, y: float, colour: str, filled: bool, size: float = 5.5) -> None:
    face = colour if filled else "none"
    axes.plot(x, y, "o", color=colour, markersize=size, markerfacecolor=face, markeredgewidth=1.4, zorder=3)
