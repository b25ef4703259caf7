from types import SimpleNamespace

from vitopt.report import units
from vitopt.search.goal import Goal


def test_units_are_in_order_of_blocks_and_of_their_layers():
    names = ["block.10.query", "block.2.fc2", "block.2.query", "block.2.output"]

    assert units.in_order(names) == ["block.2.query", "block.2.output", "block.2.fc2", "block.10.query"]


def test_units_of_the_first_pass_are_known_though_not_scored(make: SimpleNamespace):
    result = make.sensitivity(12, goal=Goal(max_kl_share=0.9), sample=3)

    assert len(units.known_units(result)) == 12
    assert len(units.by_name(result)) == 3
