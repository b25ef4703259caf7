"""The Pareto front: the points that no other point beats in both cost and score."""

import numpy as np
from numpy.typing import ArrayLike


def pareto_front(costs: ArrayLike, scores: ArrayLike) -> list[int]:
    """Indices of the points no other point beats at lower cost and higher score, by rising cost.

    Both arrays are (points,). A point is dropped when another is at least as good in both and
    better in one; equal points stay together, in the order given.
    """
    cost, score = np.asarray(costs, np.float64), np.asarray(scores, np.float64)
    front: list[int] = []
    for index in np.lexsort((-score, cost)).tolist():
        best = front[-1] if front else None
        if best is None or score[index] > score[best] or (score[index] == score[best] and cost[index] == cost[best]):
            front.append(index)
    return front
