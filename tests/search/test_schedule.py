"""Schedules against all that there are."""

import itertools

import pytest

from vitopt.search.schedule import Costs, fewest, filled, neighbours, proposed

# A block's cost grows with the tokens that it is given and leaves; merging costs a little.
COSTS = Costs(
    tokens=13, protected=1, blocks=4, block=lambda given, gone: 5 * given + 10 * (given - gone) + (gone > 0), rest=40
)
DAMAGE = {0: {3: 0.9, 6: 3.0}, 1: {3: 0.4, 6: 1.5}, 2: {3: 0.3, 6: 0.5}}


def everything(grid: int, steps: int) -> list[tuple[int, ...]]:
    forms = itertools.product(range(0, 7, grid), repeat=3)
    return [(*form, 0) for form in forms if COSTS.possible((*form, 0)) and sum(gone > 0 for gone in form) <= steps]


def loss_of(removed: tuple[int, ...]) -> float:
    tokens, total = 13, 0.0
    for block, gone in enumerate(removed[:-1]):
        share = gone * 12 / (tokens - 1)
        half, whole = DAMAGE[block][3], DAMAGE[block][6]
        total += share / 3 * half if share <= 3 else half + (share - 3) / 3 * (whole - half)
        tokens -= gone
    return total


@pytest.mark.parametrize(
    ("target", "steps", "grid"), [(0.9, 3, 1), (0.75, 3, 1), (0.75, 1, 1), (0.7, 2, 2), (0.6, 3, 1)]
)
def test_no_schedule_loses_less_for_the_same_arithmetic(target: float, steps: int, grid: int) -> None:
    found = proposed(COSTS, DAMAGE, target, steps, grid)
    assert found is not None and COSTS.possible(found) and COSTS.share(found) <= target
    assert sum(gone > 0 for gone in found) <= steps and all(gone % grid == 0 for gone in found)
    as_cheap = [one for one in everything(grid, steps) if COSTS.flops(one) <= COSTS.flops(found)]
    assert loss_of(found) <= min(map(loss_of, as_cheap)) + 1e-9


def test_what_no_schedule_saves_is_none() -> None:
    assert proposed(COSTS, DAMAGE, 0.1) is None
    assert proposed(COSTS, DAMAGE, 0.5, steps=1) is None


@pytest.mark.parametrize("steps", [1, 2, None])
def test_no_schedule_takes_fewer_flops(steps: int | None) -> None:
    found = fewest(COSTS, steps)
    assert COSTS.possible(found)
    assert COSTS.flops(found) == min(map(COSTS.flops, everything(1, steps or 3)))


def test_neighbours_are_possible_cheap_enough_and_other_schedules() -> None:
    start = (4, 0, 3, 0)
    target = COSTS.share(start)
    near = list(neighbours(start, COSTS, target, grid=1))
    assert near and start not in near and len(set(near)) == len(near)
    assert all(COSTS.possible(one) and COSTS.share(one) <= target for one in near)
    assert any(one[1] for one in near)  # a step has moved


def test_the_last_step_takes_as_many_tokens_as_the_target_needs() -> None:
    target = COSTS.share((4, 0, 3, 0))
    assert filled((4, 0, 1, 0), COSTS, target, 1) == filled((4, 0, 6, 0), COSTS, target, 1) == (4, 0, 3, 0)
    assert filled((0, 0, 1, 0), COSTS, 0.5, 1) is None and filled((0, 0, 0, 0), COSTS, 0.9, 1) is None
