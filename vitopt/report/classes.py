"""Per-class changes: the classes whose accuracy moved most against the baseline."""

from dataclasses import dataclass

from vitopt.records import Record
from vitopt.report.table import Table, of, tabulate

MOST_SHOWN = 10


@dataclass(frozen=True)
class ClassChange:
    """One class whose accuracy differs from the baseline's."""

    name: str
    images: int
    baseline_percent: float
    variant_percent: float

    @property
    def points(self) -> float:
        """Variant minus baseline, in percentage points."""
        return self.variant_percent - self.baseline_percent

    @property
    def images_changed(self) -> int:
        """Images won (positive) or lost (negative) on balance."""
        return round(self.points * self.images / 100)


@dataclass(frozen=True)
class ClassChanges:
    """Changed classes of one variant: how many became worse and better, and the most changed ones."""

    variant: str
    baseline: str
    classes: int
    worse: int
    better: int
    shown: tuple[ClassChange, ...]

    @property
    def rest(self) -> int:
        """Changed classes that are not shown."""
        return self.worse + self.better - len(self.shown)

    @property
    def table(self) -> Table:
        """The classes that are shown."""
        return tabulate(f"Classes of {self.variant} that changed most", _COLUMNS, self.shown)


_COLUMNS = {
    "class": of("name"),
    "images": of("images", "{:,}".format),
    "baseline %": of("baseline_percent", "{:.1f}".format),
    "variant %": of("variant_percent", "{:.1f}".format),
    "points": of("points", "{:+.1f}".format),
    "images won or lost": of("images_changed", "{:+d}".format),
}


def class_changes(record: Record, baseline: Record, most: int = MOST_SHOWN) -> ClassChanges | None:
    """Classes that changed, most images first; None where either has no accuracy per class.

    Sorted by images rather than points: a class of one image moves by 100 points when that image flips.
    """
    if not (record.accuracy and baseline.accuracy and record.accuracy.classes and baseline.accuracy.classes):
        return None
    before = {one.label: one.top1_percent for one in baseline.accuracy.classes}
    changed = [
        ClassChange(one.name, one.images, before[one.label], one.top1_percent)
        for one in record.accuracy.classes
        if before.get(one.label, one.top1_percent) != one.top1_percent
    ]
    changed.sort(key=lambda change: (-abs(change.images_changed), -abs(change.points), change.points, change.name))
    worse = sum(change.points < 0 for change in changed)
    names, classes = (record.variant.name, baseline.variant.name), len(record.accuracy.classes)
    return ClassChanges(*names, classes, worse, len(changed) - worse, tuple(changed[:most]))
