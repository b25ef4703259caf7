import numpy as np

from vitopt.measure.pareto import pareto_front


def test_equals_the_definition():
    costs, scores = np.random.default_rng(12).integers(0, 12, (2, 60))

    def beaten(i):
        return any(
            costs[j] <= costs[i] and scores[j] >= scores[i] and (costs[j] < costs[i] or scores[j] > scores[i])
            for j in range(60)
        )

    front = pareto_front(costs, scores)
    assert set(front) == {i for i in range(60) if not beaten(i)}
    assert front == sorted(front, key=lambda i: costs[i])


def test_equal_points_stay_together():
    assert pareto_front([2.0, 1.0, 2.0, 3.0], [5.0, 1.0, 5.0, 5.0]) == [1, 0, 2]
