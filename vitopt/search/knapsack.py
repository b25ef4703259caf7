"""The cheapest set of units whose gains reach what is needed: an exact 0/1 covering knapsack."""

from collections.abc import Sequence

import numpy as np


def cheapest(costs: Sequence[int], gains: Sequence[float], needed: float) -> frozenset[int] | None:
    """Indices of the cheapest set with gains of at least `needed` in sum; None where not even all helpful ones do.

    What helps and costs nothing or less is always in it. Of equally cheap sets the one of highest gain is taken.
    Exact: all sets that no other beats in cost and gain are kept, item by item (Nemhauser and Ullmann 1969,
    "Discrete dynamic programming and capital allocation"). Of one cost only the best stays, so that time and memory
    grow with the number of different sums of costs: give integers, as bytes are.
    """
    free = {index for index, (cost, gain) in enumerate(zip(costs, gains, strict=True)) if cost <= 0 < gain}
    # What costs and does not help is never taken; what saves and hurts may be, and comes before all that costs.
    open_ = [index for index, cost in enumerate(costs) if (cost < 0 > gains[index]) or (cost > 0 < gains[index])]
    open_.sort(key=costs.__getitem__)
    # Rounding of a sum must not decide.
    needed -= sum(gains[index] for index in free) + 1e-12 * (abs(needed) + sum(map(abs, gains)))
    within_reach = np.append(np.cumsum([max(0.0, gains[i]) for i in reversed(open_)])[::-1], 0.0)
    cost, gain = np.zeros(1, np.int64), np.zeros(1)
    came_from: list[np.ndarray] = []  # per item and kept set: twice the set before, plus one where the item was taken
    for position, index in enumerate(open_):
        cost = np.stack([cost, cost + costs[index]], axis=1).ravel()
        gain = np.stack([gain, gain + gains[index]], axis=1).ravel()
        kept = _unbeaten(cost, gain)
        kept = kept[gain[kept] + within_reach[position + 1] >= needed]
        # The cheapest set that is enough ends the search above its cost, once nothing is left that saves.
        enough = np.flatnonzero(gain[kept] >= needed)
        if len(enough) and not any(costs[later] < 0 for later in open_[position + 1 :]):
            kept = kept[: enough[0] + 1]
        cost, gain = cost[kept], gain[kept]
        came_from.append(kept)
    enough = np.flatnonzero(gain >= needed)
    if not len(enough):
        return None
    state = int(enough[0])
    chosen = set(free)
    for index, kept in zip(reversed(open_), reversed(came_from), strict=True):
        state, taken = divmod(int(kept[state]), 2)
        chosen |= {index} if taken else set()
    return frozenset(chosen)


def _unbeaten(cost: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Indices of the sets that have more gain than every one as cheap, by rising cost and gain."""
    order = np.lexsort((-gain, cost))
    best_before = np.concatenate(([-np.inf], np.maximum.accumulate(gain[order])[:-1]))
    return np.asarray(order[gain[order] > best_before])
