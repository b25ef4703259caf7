"""The search for a skip list: the cheapest set of units in 16 bit that meets a goal.

A knapsack over the units' gains in KL proposes a set, which is then measured. The KL by which it misses the target, or
falls below it, is added to the gain that the next set must have, until a set is proposed a second time. All of this
uses the choosing images alone; the last set is measured once on the confirming images. Every set that was measured is
returned.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from vitopt.measure.claims import Decision
from vitopt.measure.intervals import bisect
from vitopt.measure.pareto import pareto_front
from vitopt.search.goal import Goal, decide, images_to_show, images_to_show_kl, likely_shown
from vitopt.search.knapsack import cheapest
from vitopt.search.results import Loss, Point, SearchResult, UnitScores

Objective = Literal["size", "latency"]
Evaluate = Callable[[frozenset[str]], Loss]

_MOST_LOOKS = 24
MS_STEP = 1e-4  # times are added up in such steps, finer than any of them is measured


def search_skip_list(
    units: Sequence[UnitScores],
    evaluate: Evaluate,
    confirm: Evaluate,
    goal: Goal,
    *,
    quantized: Loss,
    images: int,
    confirming_images: int,
    objective: Objective = "size",
    untried: int = 0,
    tried: Mapping[frozenset[str], Loss] = MappingProxyType({}),
    cost_of: Callable[[frozenset[str]], float] | None = None,
) -> SearchResult:
    """Find the cheapest skip list that meets `goal`, and decide on other images whether it does.

    `evaluate` measures the model with exactly these units in 16 bit on the `images` that choose; `quantized` is its
    value for none. `confirm` does the same on the `confirming_images` others and is called once. `untried` units
    exist beside `units` that were not scored. `tried`: lists that `evaluate` measured before. `cost_of`: what a whole
    list costs by the objective, where that was measured; without it the sum of its units' costs.
    """
    names = [unit.unit for unit in units]
    costs, gains = _costs(units, objective), [_gain(unit, quantized) for unit in units]
    most_kl = _highest_kl(goal, units, quantized, confirming_images)
    measured, seen = dict(tried), set[frozenset[str]]()
    demand = _excess(goal, most_kl, quantized, quantized)
    while len(seen) < _MOST_LOOKS:
        indices = cheapest(costs, gains, demand)
        if indices is None:  # the scores do not reach it; all units together may
            indices = frozenset(range(len(units)))
        chosen = frozenset(names[index] for index in indices)
        if chosen in seen:
            break
        seen.add(chosen)
        if chosen not in measured:
            measured[chosen] = evaluate(chosen) if chosen else quantized
        # The next set must gain what the scores promised of this one, and the KL that it still has over the target.
        demand = sum(gains[index] for index in indices) + _excess(goal, most_kl, quantized, measured[chosen])
    measured = {frozenset(): quantized} | measured
    excess = {chosen: _excess(goal, most_kl, quantized, loss) for chosen, loss in measured.items()}
    cost = {kept: cost_of(kept) if cost_of else sum(costs[names.index(name)] for name in kept) for kept in measured}
    reached = [chosen for chosen in measured if excess[chosen] <= 0]
    # Where none reaches it, the one that comes nearest.
    best = (
        min(reached, key=lambda chosen: cost[chosen]) if reached else min(measured, key=lambda chosen: excess[chosen])
    )
    confirmed = confirm(best)
    decision = decide(goal, confirmed)
    return SearchResult(
        goal=goal.words(),
        objective=objective,
        chosen=tuple(name for name in names if name in best),
        decision=decision,
        choosing_images=images,
        confirming_images=confirming_images,
        confirmed=confirmed,
        advice=_advice(goal, decision, confirmed, confirming_images, len(best) == len(names), untried),
        points=tuple(_point(chosen, loss, units, excess[chosen] <= 0) for chosen, loss in measured.items()),
    )


def _costs(units: Sequence[UnitScores], objective: Objective) -> list[int]:
    milliseconds = [unit.extra_ms for unit in units if unit.extra_ms is not None]
    if objective == "latency" and len(milliseconds) == len(units):
        return [round(ms / MS_STEP) for ms in milliseconds]
    return [unit.extra_bytes for unit in units]  # also where a time is unknown: two kinds of cost do not add up


def _gain(unit: UnitScores, quantized: Loss) -> float:
    """The KL that keeping a unit brings back, wherever in the search that is.

    The mean of what it brings back as the first unit to be kept and as the last: its Shapley value, if units act on
    each other in pairs, so that the gains of all units add up to the whole KL (Shapley 1953, "A value for n-person
    games"; Owen 1972, "Multilinear extensions of games").
    """
    known = [] if unit.recovery is None else [quantized.kl - unit.recovery.kl]
    known += [] if unit.damage is None else [unit.damage.kl]
    return sum(known) / len(known) if known else 0.0


def _excess(goal: Goal, most_kl: float, quantized: Loss, loss: Loss) -> float:
    """KL in nats by which a mixture is over what the search aims at; zero or less is within it.

    KL and a share of it are aimed at with the upper end of their intervals on the choosing images: the confirming
    images are more, and show about four of five such lists.
    """
    over = [loss.kl - most_kl] if goal.max_top1_drop is not None else []
    if goal.max_kl_share is not None:
        share = loss.kl if loss.kl_share_ci95 is None else loss.kl_share_ci95[1] * quantized.kl
        over.append(share - goal.max_kl_share * quantized.kl)
    if goal.max_kl is not None:
        over.append((loss.kl if loss.kl_ci95 is None else loss.kl_ci95[1]) - goal.max_kl)
    return max(over)


def _highest_kl(goal: Goal, units: Sequence[UnitScores], quantized: Loss, confirming_images: int) -> float:
    """The KL at which the confirming images likely show the floor of top-1.

    On a few hundred images the top-1 of one mixture is noise, so the search ranks and aims by KL alone. What KL the
    floor allows is read from all mixtures of the tables together. Small errors of the logits flip images that are near
    a border: as many as the errors are large, so as the root of KL; and nearly as many to either side, so that what is
    lost net goes as KL itself.

    Where so few images would show it of no mixture at all, the KL that is estimated to lose half of the floor: one that
    is estimated to lose all of it would be below it every other time.
    """
    if goal.max_top1_drop is None:
        return math.inf
    floor = goal.max_top1_drop
    seen = [(quantized.kl, quantized.top1_delta_points, quantized.agreement_percent)]
    for unit in units:
        # Recovery's top-1 is against the quantized model.
        for loss, start in ((unit.damage, 0.0), (unit.recovery, quantized.top1_delta_points)):
            seen += [(loss.kl, start + loss.top1_delta_points, loss.agreement_percent)] if loss else []
    roots = sum(math.sqrt(kl) for kl, _, _ in seen)
    if roots == 0:
        return 0.0
    drop_per_kl = max(0.0, -sum(delta for _, delta, _ in seen) / sum(kl for kl, _, _ in seen))
    changed_per_root = sum(1 - agreement / 100 for _, _, agreement in seen) / roots

    def enough(kl: float) -> bool:
        changed = min(1.0, changed_per_root * math.sqrt(kl))
        return likely_shown(confirming_images, floor, drop_per_kl * kl, changed)

    most = bisect(enough, 0.0, quantized.kl)
    least = min(loss.kl for unit in units for loss in (unit.damage or unit.recovery,) if loss) if units else 0.0
    if most >= least and enough(most):
        return most
    return min(quantized.kl, floor / 2 / drop_per_kl) if drop_per_kl else quantized.kl


def _advice(
    goal: Goal, decision: Decision, confirmed: Loss, confirming_images: int, all_kept: bool, untried: int
) -> str | None:
    """What to do where the goal was not shown; None where it was."""
    if decision == "shown":
        return None
    seen: list[str] = []
    wanted: list[int | None] = []  # calibration images for each part of the goal; None where no number would do
    if goal.max_top1_drop is not None:
        low, high = confirmed.top1_delta_ci95_points
        seen.append(f"top-1 {confirmed.top1_delta_points:+.1f} ({low:+.1f} to {high:+.1f}) points")
        drop, changed = max(0.0, -confirmed.top1_delta_points), 1 - confirmed.agreement_percent / 100
        wanted.append(images_to_show(goal.max_top1_drop, drop, changed))
    if goal.max_kl_share is not None and confirmed.kl_share is not None and confirmed.kl_share_ci95 is not None:
        low, high = confirmed.kl_share_ci95
        seen.append(f"KL {confirmed.kl_share:.2f} ({low:.2f} to {high:.2f}) of the quantized model's")
    if goal.max_kl is not None:
        limits = "no interval of so few" if confirmed.kl_ci95 is None else "{:.4f} to {:.4f}".format(*confirmed.kl_ci95)
        seen.append(f"KL {confirmed.kl:.4f} ({limits}) nats")
        wanted.append(images_to_show_kl(goal.max_kl, confirmed.kl, confirmed.kl_ci95, confirming_images))
    enough = max((count for count in wanted if count is not None), default=None) if None not in wanted else None
    words = "is not met" if decision == "failed" else "is not shown (95 %)"
    remedies = [f"give about {enough:,} calibration images"] if enough is not None and decision == "undecided" else []
    if all_kept and untried:
        remedies.append(f"score more than these candidates ({untried} units were not tried)")
    remedies.append("relax the goal")
    return (
        f"that {goal.words()} {words} on {confirming_images:,} images that were not used to choose: {', '.join(seen)}; "
        f"{', or '.join(remedies)}"
    )


def _point(names: frozenset[str], loss: Loss, units: Sequence[UnitScores], within_target: bool) -> Point:
    chosen = [unit for unit in units if unit.unit in names]
    milliseconds = [unit.extra_ms for unit in chosen]
    return Point(
        skip=tuple(unit.unit for unit in chosen),
        loss=loss,
        extra_bytes=sum(unit.extra_bytes for unit in chosen),
        extra_ms=None if None in milliseconds else sum(ms for ms in milliseconds if ms is not None),
        within_target=within_target,
    )


def frontier(points: Sequence[Point], costs: Mapping[str, Callable[[Point], float | None]]) -> dict[str, list[int]]:
    """By kind of cost, the indices of points that no other point beats in both cost and KL, cheapest first."""
    fronts = {}
    for name, cost in costs.items():
        known = [(index, value) for index, point in enumerate(points) if (value := cost(point)) is not None]
        front = pareto_front([value for _, value in known], [-points[index].loss.kl for index, _ in known])
        fronts[name] = [known[position][0] for position in front]
    return fronts
