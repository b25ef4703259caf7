"""Blocks and linear layers of a sensitivity analysis: their order, their names, and which of many to show."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from vitopt.recipe import LINEARS, QKV
from vitopt.report.summary import listed
from vitopt.search.results import Loss, Sensitivity, UnitScores

MOST_SHOWN = 24  # linear layers in one figure; blocks are all shown


def place(unit: str) -> tuple[int, str]:
    """Number of the block and name of the linear layer ("" for a whole block) of a unit such as `block.3.fc2`."""
    _, number, linear = f"{unit}.".split(".", 2)
    return int(number), linear.rstrip(".")


def in_order(units: Iterable[str]) -> list[str]:
    """By block, and inside it `qkv` first, then in the order of LINEARS."""

    def key(unit: str) -> tuple[int, int, str]:
        number, linear = place(unit)
        return number, [QKV, *LINEARS, linear].index(linear), linear

    return sorted(units, key=key)


def known_units(result: Sensitivity) -> list[str]:
    """Every unit the analysis knows of, scored exactly or only on the sample, in order."""
    return in_order({*result.sample_kl, *(unit.unit for unit in result.units)})


def by_name(result: Sensitivity) -> dict[str, UnitScores]:
    """The exactly scored units, in order."""
    found = {unit.unit: unit for unit in result.units}
    return {name: found[name] for name in in_order(found)}


def kind(result: Sensitivity, count: int = 2) -> str:
    """What the units are called, in the singular for a count of one."""
    word = "layer" if result.granularity == "linear" else "block"
    return word if count == 1 else f"{word}s"


def short_name(unit: str) -> str:
    """As in `3` for a block and `3 fc2` for a layer, for the axis of a figure."""
    number, linear = place(unit)
    return f"{number} {linear}".strip()


def words(units: Sequence[str]) -> str:
    """Units as a phrase: `blocks 0–2 and 5`, or `query and fc2 of block 3, fc1 of block 4`; "" for none."""
    ordered = in_order(units)
    whole = [number for number, linear in map(place, ordered) if not linear]
    parts = [f"block{'s' if len(whole) > 1 else ''} {listed(_spans(whole))}"] if whole else []
    layers = [place(unit) for unit in ordered if place(unit)[1]]
    for number, group in itertools.groupby(layers, key=lambda layer: layer[0]):
        parts.append(f"{listed([linear for _, linear in group])} of block {number}")
    return ", ".join(parts)


def telling(result: Sensitivity, most: int = MOST_SHOWN) -> list[str]:
    """The scored units to show, in order: all blocks; of many linear layers those that matter most.

    A layer matters by the better of its two ranks, in damage and in recovery.
    """
    scored = by_name(result)
    if result.granularity != "linear" or len(scored) <= most:
        return list(scored)
    damage = _ranks({name: -unit.damage.kl for name, unit in scored.items() if unit.damage})
    recovery = _ranks({name: unit.recovery.kl for name, unit in scored.items() if unit.recovery})
    ranks = {name: sorted(of.get(name, len(scored)) for of in (damage, recovery)) for name in scored}
    return in_order(sorted(scored, key=lambda name: (ranks[name][0], sum(ranks[name])))[:most])


def shows_change(loss: Loss) -> bool:
    """Whether the interval of the change in top-1 excludes no change."""
    low, high = loss.top1_delta_ci95_points
    return low > 0 or high < 0


def _ranks(values: Mapping[str, float]) -> dict[str, int]:
    """Rank by rising value, ties in order of the units."""
    return {name: rank for rank, name in enumerate(sorted(values, key=lambda name: values[name]))}


def _spans(numbers: Sequence[int]) -> list[str]:
    """Rising numbers, three and more neighbours as `0–2`."""
    found: list[str] = []
    # Neighbours keep their distance to their place in the list.
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        found += [f"{run[0]}–{run[-1]}"] if len(run) > 2 else [str(number) for number in run]
    return found
