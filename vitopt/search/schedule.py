"""Which blocks merge how many tokens: the schedule of lowest damage for a share of the arithmetic.

Damage is taken to add up over blocks and to depend on the share of its tokens that a block merges. That proposes;
measuring corrects it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

# Tokens that leave each block.
Removed = tuple[int, ...]
_BISECTIONS = 30


@dataclass(frozen=True)
class Costs:
    """What schedules cost: FLOPs of a `block` for (tokens given, tokens that leave), and of the `rest` of the model.

    `tokens` come into the first of `blocks`, of which `protected` never leave.
    """

    tokens: int
    protected: int
    blocks: int
    block: Callable[[int, int], int]
    rest: int

    def share(self, removed: Removed) -> float:
        """FLOPs of a schedule over those of the model with all its tokens."""
        return self.flops(removed) / self.flops((0,) * self.blocks)

    def possible(self, removed: Removed) -> bool:
        """Whether every block has the tokens that leave it, and none leave the last."""
        given = self._given(removed)
        fits = all(0 <= gone <= self.most(tokens) for tokens, gone in zip(given, removed, strict=True))
        return fits and removed[-1] == 0

    def most(self, tokens: int) -> int:
        """Most tokens that can leave a block that is given so many."""
        return (tokens - self.protected) // 2

    def flops(self, removed: Removed) -> int:
        """Arithmetic of one image."""
        return self.rest + sum(itertools.starmap(self.block, zip(self._given(removed), removed, strict=True)))

    def _given(self, removed: Removed) -> list[int]:
        return [self.tokens - gone for gone in itertools.accumulate((0, *removed[:-1]))]


def proposed(
    costs: Costs, damage: Mapping[int, Mapping[int, float]], target: float, steps: int | None = None, grid: int = 1
) -> Removed | None:
    """The schedule of lowest summed damage whose FLOPs are at most the share `target`; None where none is.

    `damage`: block -> tokens that leave it alone -> what that costs, for instance KL. `steps`: most blocks that merge.
    Numbers of tokens are multiples of `grid`. For a price of FLOPs the best schedule is found exactly, block by block
    over the tokens that are left; the lowest price that reaches the target is found by bisection (Everett 1963,
    "Generalized Lagrange multiplier method").
    """
    steps = costs.blocks if steps is None else steps
    choices = _Choices(costs, damage, grid)
    unit = max(max(found.values()) for found in damage.values()) / costs.flops((0,) * costs.blocks)
    best: Removed | None = None
    low, high = 0.0, 1e4 * unit  # at the last hardly anything but FLOPs counts
    for _ in range(_BISECTIONS):
        price = high if best is None else (low + high) / 2
        found = choices.cheapest(price, steps)
        if costs.share(found) <= target:
            best, high = found, price
        elif best is None:
            return None
        else:
            low = price
    return best


def fewest(costs: Costs, steps: int | None = None) -> Removed:
    """The schedule of least FLOPs, with tokens leaving in at most so many blocks."""
    harmless = {block: {1: 0.0} for block in range(costs.blocks - 1)}
    return _Choices(costs, harmless, 1).cheapest(1.0, costs.blocks if steps is None else steps)


class _Choices:
    """FLOPs and damage of each number of tokens that can leave a block, for each number that it can be given."""

    def __init__(self, costs: Costs, damage: Mapping[int, Mapping[int, float]], grid: int):
        self._grid, self._blocks = grid, costs.blocks
        given = range(costs.tokens, costs.protected, -grid)
        shape = (len(given), costs.most(costs.tokens) // grid + 1)
        self._flops = np.full(shape, np.inf)
        self._damage = np.full((costs.blocks, *shape), np.inf)
        self._damage[:, :, 0] = 0.0
        for row, tokens in enumerate(given):
            gone = np.arange(0, costs.most(tokens) + 1, grid)
            self._flops[row, : len(gone)] = [costs.block(tokens, int(number)) for number in gone]
            for block, known in damage.items():
                places = sorted(known)
                losses = [0.0, *(known[place] for place in places)]
                share = gone * (costs.tokens - costs.protected) / (tokens - costs.protected)
                self._damage[block, row, : len(gone)] = np.interp(share, [0, *places], losses)

    def cheapest(self, price: float, steps: int) -> Removed:
        """The schedule of lowest damage plus `price` times FLOPs, with tokens leaving in at most so many blocks."""
        rows, amounts = self._flops.shape
        spent = np.full((rows, steps + 1), np.inf)
        spent[0, 0] = 0.0
        taken: list[np.ndarray] = []  # per block: what was taken to come to (tokens left, steps)
        for block in range(self._blocks):
            after, took = np.full_like(spent, np.inf), np.zeros(spent.shape, np.int64)
            for amount in range(min(amounts, rows)):
                cost = (price * self._flops[:, amount] + self._damage[block, :, amount])[: rows - amount, None]
                reached = np.full_like(spent, np.inf)
                if amount:
                    reached[amount:, 1:] = spent[: rows - amount, :-1] + cost
                else:
                    reached = spent + cost
                took[reached < after] = amount
                after = np.minimum(after, reached)
            spent = after
            taken.append(took)
        row, step = np.unravel_index(int(spent.argmin()), spent.shape)
        removed: list[int] = []
        for took in reversed(taken):
            amount = int(took[row, step])
            removed.insert(0, amount * self._grid)
            row, step = row - amount, step - (amount > 0)
        return tuple(removed)


def neighbours(removed: Removed, costs: Costs, target: float, grid: int) -> Iterator[Removed]:
    """Schedules near one, each of at most the share `target`: a step in the block before or after it, or tokens that
    leave in another block instead."""
    seen = {removed}
    steps = [block for block, gone in enumerate(removed) if gone]
    for block, other in itertools.product(steps, range(costs.blocks - 1)):
        near = abs(block - other) == 1
        amounts = ({removed[block]} if near else set()) | ({2 * grid} if other in steps or near else set())
        for amount in sorted(amounts, reverse=True):
            moved = list(removed)
            moved[block] -= amount
            moved[other] += amount
            if block != other and (fitted := filled(tuple(moved), costs, target, grid)) and fitted not in seen:
                seen.add(fitted)
                yield fitted


def filled(removed: Removed, costs: Costs, target: float, grid: int) -> Removed | None:
    """The schedule with as many tokens in its last step as `target` takes, and no more; None where none would do."""
    if min(removed) < 0 or not any(removed):
        return None
    last = max(block for block, gone in enumerate(removed) if gone)
    given = costs.tokens - sum(removed[:last])
    for gone in range(grid, costs.most(given) + 1, grid):
        fitted = (*removed[:last], gone, *removed[last + 1 :])
        if costs.possible(fitted) and costs.share(fitted) <= target:
            return fitted
    return None


def smallest(forms: Iterable[Removed], costs: Costs, target: float) -> Removed | None:
    """The first of `forms` that is possible and of at most the share `target`; None where none is."""
    return next((form for form in forms if costs.possible(form) and costs.share(form) <= target), None)
