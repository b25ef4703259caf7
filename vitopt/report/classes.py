"""Per-class changes: the classes whose accuracy moved most against the baseline."""

from dataclasses import dataclass

from vitopt.records import Record

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
    """Changed classes of one variant: the most changed ones, and how many there are besides."""

    variant: str
    baseline: str
    classes: int
    worse: int
    better: int
    shown: tuple[ClassChange, ...]

    @property
    def changed(self) -> int:
        """Number of classes whose accuracy differs."""
        return self.worse + self.better

    @property
    def rest(self) -> int:
        """Changed classes that are not shown."""
        return self.changed - len(self.shown)


def class_changes(record: Record, baseline: Record, most: int = MOST_SHOWN) -> ClassChanges | None:
    """Classes that changed, most images first; None where either has no accuracy per class.

    Sorted by images rather than points: a class of one image moves by 100 points when that image flips.
    """
    if not (record.accuracy and baseline.accuracy and record.accuracy.classes and baseline.accuracy.classes):
        return None
    reference = {one.label: one for one in baseline.accuracy.classes}
    found = [
        ClassChange(one.name, one.images, reference[one.label].top1_percent, one.top1_percent)
        for one in record.accuracy.classes
        if one.label in reference and one.top1_percent != reference[one.label].top1_percent
    ]
    found.sort(key=lambda change: (-abs(change.images_changed), -abs(change.points), change.points, change.name))
    return ClassChanges(
        variant=record.variant.name,
        baseline=baseline.variant.name,
        classes=len(record.accuracy.classes),
        worse=sum(change.points < 0 for change in found),
        better=sum(change.points > 0 for change in found),
        shown=tuple(found[:most]),
    )
