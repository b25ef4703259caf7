"""Per-class changes: the classes whose accuracy moved most against the baseline."""

from dataclasses import dataclass
from typing import NamedTuple

from vitopt.records import Record
from vitopt.report.table import Table, of, tabulate

MOST_SHOWN = 10


@dataclass(frozen=True)
class ClassChanges:
    """Changed classes of one variant: how many became worse and better, and a table of the most changed ones."""

    variant: str
    classes: int
    worse: int
    better: int
    table: Table

    @property
    def rest(self) -> int:
        """Changed classes that are not shown."""
        return self.worse + self.better - len(self.table)


class _Change(NamedTuple):
    name: str
    images: int
    before: float
    after: float
    points: float
    images_changed: int  # won (positive) or lost (negative) on balance


_COLUMNS = {
    "class": of("name"),
    "images": of("images", "{:,}".format),
    "baseline %": of("before", "{:.1f}".format),
    "variant %": of("after", "{:.1f}".format),
    "points": of("points", "{:+.1f}".format),
    "images won or lost": of("images_changed", "{:+d}".format),
}


def class_changes(record: Record, baseline: Record, most: int = MOST_SHOWN) -> ClassChanges | None:
    """Classes that changed, most images first; None where none did, or either has no accuracy per class.

    Sorted by images rather than points: a class of one image moves by 100 points when that image flips.
    """
    before = {known.label: known.top1_percent for known in baseline.accuracy.classes} if baseline.accuracy else {}
    classes = record.accuracy.classes if record.accuracy else ()
    changed = []
    for after in classes:
        points = after.top1_percent - before.get(after.label, after.top1_percent)
        if points:
            images = round(points * after.images / 100)
            changed.append(_Change(after.name, after.images, before[after.label], after.top1_percent, points, images))
    if not changed:
        return None
    changed.sort(key=lambda change: (-abs(change.images_changed), -abs(change.points), change.points, change.name))
    name, worse = record.variant.name, sum(change.points < 0 for change in changed)
    table = tabulate(f"Classes of {name} that changed most", _COLUMNS, changed[:most])
    return ClassChanges(name, len(classes), worse, len(changed) - worse, table)
