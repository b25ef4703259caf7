"""Blocks and linear layers of a sensitivity analysis: their order and their names."""

from collections.abc import Iterable

from vitopt.layers import LINEARS, QKV
from vitopt.search.results import Sensitivity, UnitScores


def place(unit: str) -> tuple[int, str]:
    """Number of the block and name of the linear layer of a unit such as `block.3.fc2`: "" for a whole block, 0 for a
    kind of layer in all blocks."""
    if not unit.startswith("block."):
        return 0, unit
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
    scored = {unit.unit: unit for unit in result.units}
    return {name: scored[name] for name in in_order(scored)}


def kind(result: Sensitivity, count: int = 2) -> str:
    """What the units are called, in the singular for a count of one."""
    one, more = {"linear": ("layer", "layers"), "kind": ("kind of layer", "kinds of layer")}.get(
        result.granularity, ("block", "blocks")
    )
    return one if count == 1 else more
