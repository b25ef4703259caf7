from types import SimpleNamespace

import pytest

from vitopt.report import units
from vitopt.search.goal import Goal
from vitopt.search.results import Loss


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ([], ""),
        (["block.3"], "block 3"),
        (["block.10", "block.2"], "blocks 2 and 10"),
        (["block.0", "block.1", "block.2", "block.5"], "blocks 0–2 and 5"),
        (["block.4.fc1", "block.3.fc2", "block.3.query"], "query and fc2 of block 3, fc1 of block 4"),
    ],
)
def test_units_are_named_as_a_phrase(chosen, words):
    assert units.words(chosen) == words


def test_units_are_in_order_of_blocks_and_of_their_layers():
    names = ["block.10.query", "block.2.fc2", "block.2.query", "block.2.output"]

    assert units.in_order(names) == ["block.2.query", "block.2.output", "block.2.fc2", "block.10.query"]
    assert [units.short_name(name) for name in ("block.3", "block.3.fc2")] == ["3", "3 fc2"]


def test_all_blocks_are_shown_and_of_many_layers_those_that_matter_most(make: SimpleNamespace):
    assert len(units.telling(make.sensitivity(40))) == 40
    assert len(units.telling(make.sensitivity(4, "linear"))) == 24
    result = make.sensitivity(24, "linear")

    shown = units.telling(result)

    assert len(shown) == units.MOST_SHOWN
    assert shown == units.in_order(shown)
    by_recovery = sorted(result.units, key=lambda unit: unit.recovery.kl)
    by_damage = sorted(result.units, key=lambda unit: -unit.damage.kl)
    assert {unit.unit for unit in [*by_recovery[:12], *by_damage[:12]]} <= set(shown)


def test_units_without_a_table_are_told_by_the_other(make: SimpleNamespace):
    result = make.sensitivity(8, "linear", goal=None)
    half = tuple(unit.model_copy(update={"damage": None}) for unit in result.units)

    shown = units.telling(result.model_copy(update={"units": half}), most=5)

    assert set(shown) == {unit.unit for unit in sorted(result.units, key=lambda unit: unit.recovery.kl)[:5]}


def test_units_of_the_first_pass_are_known_though_not_scored(make: SimpleNamespace):
    result = make.sensitivity(12, goal=Goal(max_kl_share=0.9), sample=3)

    assert len(units.known_units(result)) == 12
    assert len(units.by_name(result)) == 3


def test_an_interval_without_zero_shows_a_change(make: SimpleNamespace):
    def loss(low: float, high: float) -> Loss:
        return make.loss(0.1).model_copy(update={"top1_delta_ci95_points": (low, high)})

    assert [units.shows_change(loss(*ends)) for ends in [(-1, 1), (-2, -1), (0.5, 3), (0, 2)]] == [
        False,
        True,
        True,
        False,
    ]
