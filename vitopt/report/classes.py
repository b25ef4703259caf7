"""Per-class changes: the classes whose accuracy moved most against the baseline."""

from dataclasses import dataclass

from vitopt.records import Record
from vitopt.report.table import Table

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


_HEADINGS = ("class", "images", "baseline %", "variant %", "points", "images won or lost")


def class_changes(record: Record, baseline: Record, most: int = MOST_SHOWN) -> ClassChanges | None:
    """Classes that changed, most images first; None where none did, or either has no accuracy per class.

    Sorted by images rather than points: a class of one image moves by 100 points when that image flips.
    """
    before = {known.label: known.top1_percent for known in baseline.accuracy.classes} if baseline.accuracy else {}
    classes = record.accuracy.classes if record.accuracy else ()
    changed = []
    for after in classes:
        old, new = before.get(after.label, after.top1_percent), after.top1_percent
        if points := new - old:
            images = round(points * after.images / 100)  # won (positive) or lost (negative) on balance
            cells = after.name, f"{after.images:,}", f"{old:.1f}", f"{new:.1f}", f"{points:+.1f}", f"{images:+d}"
            changed.append((-abs(images), -abs(points), points, cells))
    if not changed:
        return None
    name, worse = record.variant.name, sum(points < 0 for *_, points, _ in changed)
    rows = tuple(cells for *_, cells in sorted(changed)[:most])
    table = Table(f"Classes of {name} that changed most", _HEADINGS, rows)
    return ClassChanges(name, len(classes), worse, len(changed) - worse, table)
