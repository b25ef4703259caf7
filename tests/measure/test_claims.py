import math

import pytest

from vitopt.measure.claims import at_least, at_most
from vitopt.measure.intervals import Interval


@pytest.mark.parametrize(
    ("low", "high", "decision"),
    [(0.1, 0.5, "shown"), (0.1, 0.6, "undecided"), (0.5, 0.6, "undecided"), (0.51, 0.6, "failed")],
)
def test_a_figure_is_within_a_limit_only_with_its_whole_interval(low, high, decision):
    assert at_most(Interval(low, high), 0.5) == decision
    assert at_least(Interval(-high, -low), -0.5) == decision


def test_an_interval_without_an_upper_end_shows_nothing():
    assert at_most(Interval(0.1, math.inf), 0.5) == "undecided"
    assert at_most(Interval(0.6, math.inf), 0.5) == "failed"
