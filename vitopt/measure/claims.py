"""Claims decided by intervals: a figure within a limit is shown, shown to fail, or undecided.

An estimate decides nothing: a claim counts as shown only where the whole 95 % interval that the report prints is on
the right side of the limit, as in a non-inferiority trial (ICH E9, section 3.3.2).
"""

from collections.abc import Iterable
from typing import Literal

from vitopt.measure.intervals import Interval

Decision = Literal["shown", "failed", "undecided"]


def at_most(interval: Interval, limit: float) -> Decision:
    """Whether the figure is at most `limit`."""
    if interval.high <= limit:
        return "shown"
    return "failed" if interval.low > limit else "undecided"


def at_least(interval: Interval, limit: float) -> Decision:
    """Whether the figure is at least `limit`."""
    return at_most(Interval(-interval.high, -interval.low), -limit)


def together(decisions: Iterable[Decision]) -> Decision:
    """Of claims that must all hold: failed where any is, else undecided where any is, else shown."""
    worst = set(decisions)
    return "failed" if "failed" in worst else "undecided" if "undecided" in worst else "shown"
