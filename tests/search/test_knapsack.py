"""The cheapest set, against trying all sets and against scipy's integer programming."""

import itertools
import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from vitopt.search.knapsack import cheapest


def brute_force(costs: list[int], gains: list[float], needed: float) -> float | None:
    """The lowest cost of any set that reaches `needed`."""
    sets = itertools.product((0, 1), repeat=len(costs))
    return min((int(np.dot(s, costs)) for s in sets if np.dot(s, gains) >= needed - 1e-9), default=None)


def test_a_dear_unit_that_does_it_alone_beats_two_of_better_worth() -> None:
    assert cheapest([100, 80, 85], [1.0, 0.9, 0.9], 1.0) == {0}


def test_random_cases_cost_what_the_best_of_all_sets_costs() -> None:
    rng = np.random.default_rng(0)
    for case in range(300):
        count = int(rng.integers(1, 9))
        costs = rng.integers(1, 100 if case % 2 else 4, count).tolist()
        gains = (rng.normal(0.3, 0.4, count) if case % 3 else rng.integers(0, 4, count) / 4).tolist()
        needed = float(rng.uniform(0, 1.2) * sum(max(0.0, gain) for gain in gains))
        found, best = cheapest(costs, gains, needed), brute_force(costs, gains, needed)
        assert (found is None) == (best is None), (costs, gains, needed)
        if found is not None:
            assert sum(costs[i] for i in found) == best, (costs, gains, needed)
            assert sum(gains[i] for i in found) >= needed - 1e-9


def test_units_that_save_are_weighed_too() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        costs = rng.integers(-20, 40, 7).tolist()
        gains = rng.normal(0.2, 0.4, 7).tolist()
        needed = float(rng.uniform(-0.2, 1.0))
        found = cheapest(costs, gains, needed)
        # What is free and helps is always kept, so it is given to all sets.
        free = [i for i in range(7) if costs[i] <= 0 < gains[i]]
        assert found is None or set(free) <= found
        best = brute_force(costs, gains, needed)
        assert (found is None) == (best is None)
        assert found is None or sum(costs[i] for i in found) == best


def test_nothing_is_needed_and_too_much_is_needed() -> None:
    assert cheapest([1, 2], [0.5, 0.5], 0.0) == frozenset()
    assert cheapest([1, 2], [0.5, 0.5], 1.1) is None
    assert cheapest([1, 2], [-0.5, 0.5], 0.6) is None
    assert cheapest([], [], 0.0) == frozenset()
    assert cheapest([1] * 10, [0.1] * 10, 1.0) == frozenset(range(10))  # ten tenths make less than one in binary


def test_of_equally_cheap_sets_the_one_that_gains_most_is_taken() -> None:
    assert cheapest([5, 5, 5], [0.5, 0.9, 0.6], 0.4) == {1}


@pytest.mark.parametrize("kind", ["layers by bytes", "layers by time"])
def test_288_layers_are_solved_exactly_and_soon(kind: str) -> None:
    rng = np.random.default_rng(2)
    by_kind = [1, 1, 1, 1, 4, 4] if kind == "layers by bytes" else [31, 29, 30, 33, 118, 131]
    costs = by_kind * 48
    gains = rng.lognormal(-5, 1.5, 288).tolist()
    needed = 0.7 * sum(gains)
    started = time.process_time()
    found = cheapest(costs, gains, needed)
    assert time.process_time() - started < 10
    assert found is not None
    solved = milp(
        costs,
        constraints=LinearConstraint(np.array([gains]), lb=needed),
        integrality=np.ones(288),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert sum(costs[i] for i in found) == round(solved.fun)
