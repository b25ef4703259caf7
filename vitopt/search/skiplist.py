"""The search for a skip list: the cheapest set of units in 16 bit that meets a goal.

Greedy by score per cost, each step verified by evaluation, then a step back: units that turn out not to be
needed are given back. All that was tried is returned, because the frontier matters more than one point.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vitopt.measure import statistics
from vitopt.search.results import Loss, Point, SearchResult, UnitScores

Objective = Literal["size", "latency"]
Evaluate = Callable[[frozenset[str]], Loss]


@dataclass(frozen=True)
class Goal:
    """What a skip list must reach: a floor of accuracy, a share of the quantized model's KL, or both.

    `max_top1_drop`: points of top-1 against the 16-bit model. `max_kl_share`: KL divergence at most this share
    of that of the fully quantized model.
    """

    max_top1_drop: float | None = None
    max_kl_share: float | None = None

    def words(self) -> str:
        """The goal as a phrase."""
        parts = []
        if self.max_top1_drop is not None:
            parts.append(f"top-1 drops by at most {self.max_top1_drop:g} points")
        if self.max_kl_share is not None:
            parts.append(f"KL is at most {self.max_kl_share:g} of the quantized model's")
        return " and ".join(parts)


def can_show(goal: Goal, images: int) -> bool:
    """Whether so many images could show the floor at all: with not one image changed, is the interval within it?"""
    if goal.max_top1_drop is None:
        return True
    return -100 * statistics.paired_delta_interval(images, 0, 0, 0).low <= goal.max_top1_drop


def search_skip_list(
    units: Sequence[UnitScores],
    evaluate: Evaluate,
    goal: Goal,
    *,
    quantized: Loss,
    images: int,
    objective: Objective = "size",
) -> SearchResult:
    """Find the cheapest skip list that meets `goal` on the calibration images.

    `evaluate` measures the model with exactly these units in 16 bit; `quantized` is its value for none. Where
    so few images cannot show the floor, the estimate decides instead of the interval's end, and the result
    says so and how many images it would take.
    """
    by_interval = can_show(goal, images)
    costs = {unit.unit: _cost(unit, objective) for unit in units}
    gains = {unit.unit: quantized.kl - unit.recovery.kl for unit in units if unit.recovery is not None}
    order = sorted(gains, key=lambda name: _worth(gains[name], costs[name]), reverse=True)
    tried: dict[frozenset[str], Loss] = {frozenset(): quantized}

    def meets(chosen: frozenset[str]) -> bool:
        if chosen not in tried:
            tried[chosen] = evaluate(chosen)
        return _meets(goal, tried[chosen], quantized, by_interval)

    kept: list[str] = []
    for name in order:
        if meets(frozenset(kept)):
            break
        kept.append(name)
    reached = meets(frozenset(kept))
    # Dearest first: giving back a dear unit saves most.
    for name in sorted(kept, key=lambda name: costs[name], reverse=True) if reached else ():
        without = frozenset(kept) - {name}
        if meets(without):
            kept.remove(name)
    chosen = tuple(sorted(kept, key=[unit.unit for unit in units].index))
    shown = reached and (by_interval or _meets(goal, tried[frozenset(kept)], quantized, by_interval=True))
    return SearchResult(
        goal=goal.words(),
        objective=objective,
        chosen=chosen,
        floor_shown=shown,
        advice=None if shown else _advice(goal, reached, images),
        points=tuple(_point(names, loss, units, goal, quantized, by_interval) for names, loss in tried.items()),
    )


def _cost(unit: UnitScores, objective: Objective) -> float:
    if objective == "latency" and unit.extra_ms is not None:
        return unit.extra_ms
    return float(unit.extra_bytes)


def _worth(gain: float, cost: float) -> tuple[bool, float]:
    # A unit that helps and costs nothing (16 bit can be faster than unpacking 4 bit) goes before all others.
    return (gain > 0 and cost <= 0, gain / cost if cost > 0 else gain)


def _meets(goal: Goal, loss: Loss, quantized: Loss, by_interval: bool) -> bool:
    if goal.max_kl_share is not None and loss.kl > goal.max_kl_share * quantized.kl:
        return False
    if goal.max_top1_drop is None:
        return True
    delta = loss.top1_delta_ci95_points[0] if by_interval else loss.top1_delta_points
    return -delta <= goal.max_top1_drop


def _advice(goal: Goal, reached: bool, images: int) -> str:
    if not reached:
        return f"not even all units in 16 bit show that {goal.words()} on {images} images: relax the goal"
    needed = _images_to_show(goal.max_top1_drop or 0.0)
    return (
        f"{images} images cannot show that {goal.words()} (95 %): the estimate meets it, the interval does not; "
        f"give at least {needed:,} calibration images, or allow a larger drop"
    )


def _images_to_show(drop: float) -> int:
    """Fewest images, in steps of 10 %, whose interval lies within `drop` when no image changes."""
    images = 10
    while not can_show(Goal(max_top1_drop=drop), images) and images < 10_000_000:
        images = round(images * 1.1) + 1
    return images


def _point(
    names: frozenset[str],
    loss: Loss,
    units: Sequence[UnitScores],
    goal: Goal,
    quantized: Loss,
    by_interval: bool,
) -> Point:
    chosen = [unit for unit in units if unit.unit in names]
    milliseconds = [unit.extra_ms for unit in chosen]
    return Point(
        skip=tuple(unit.unit for unit in chosen),
        loss=loss,
        extra_bytes=sum(unit.extra_bytes for unit in chosen),
        extra_ms=None if None in milliseconds else sum(ms for ms in milliseconds if ms is not None),
        meets_goal=_meets(goal, loss, quantized, by_interval),
    )


def frontier(points: Sequence[Point], costs: Mapping[str, Callable[[Point], float | None]]) -> dict[str, list[int]]:
    """By kind of cost, the indices of points that no other point beats in both cost and KL, cheapest first."""
    fronts = {}
    for name, cost in costs.items():
        known = [(index, value) for index, point in enumerate(points) if (value := cost(point)) is not None]
        front = statistics.pareto_front([value for _, value in known], [-points[index].loss.kl for index, _ in known])
        fronts[name] = [known[position][0] for position in front]
    return fronts
