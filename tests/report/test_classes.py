from types import SimpleNamespace

from vitopt.records import ClassAccuracy
from vitopt.report.classes import class_changes


def test_only_changed_classes_are_listed_most_images_first(make: SimpleNamespace):
    # Image i is of class i modulo 4: circle loses 3, square 1, cross wins 1, stripe stays.
    baseline = make.record("fp32", predictions=make.predictions(wrong=(1,)))
    variant = make.record("nf4", predictions=make.predictions(wrong=(0, 4, 8, 2)))

    changes = class_changes(variant, baseline)

    assert changes.table.rows == (
        ("circle", "10", "100.0", "70.0", "-30.0", "-3"),
        ("square", "10", "100.0", "90.0", "-10.0", "-1"),
        ("cross", "10", "90.0", "100.0", "+10.0", "+1"),
    )
    assert (changes.worse, changes.better, changes.rest, changes.classes) == (2, 1, 0, 4)


def test_the_rest_is_counted(make: SimpleNamespace):
    baseline = make.record("fp32", predictions=make.predictions())
    variant = make.record("nf4", predictions=make.predictions(wrong=(0, 1, 2, 3)))

    changes = class_changes(variant, baseline, most=1)

    assert (len(changes.table), changes.rest) == (1, 3)


def test_more_images_come_before_more_points(make: SimpleNamespace):
    def with_classes(large: float, small: float):
        record = make.record("a", predictions=make.predictions())
        classes = (
            ClassAccuracy(label=0, name="large", images=50, top1_percent=large),
            ClassAccuracy(label=1, name="a small one", images=1, top1_percent=small),
        )
        return record.model_copy(update={"accuracy": record.accuracy.model_copy(update={"classes": classes})})

    changes = class_changes(with_classes(90.0, 0.0), with_classes(96.0, 100.0))

    assert [(row[0], row[-1]) for row in changes.table.rows] == [("large", "-3"), ("a small one", "-1")]


def test_without_accuracy_or_a_change_there_is_nothing_to_show(make: SimpleNamespace):
    measured, timed = make.record("a", predictions=make.predictions()), make.record("b", p50_ms={1: 1.0})

    assert class_changes(timed, measured) is None
    assert class_changes(measured, timed) is None
    assert class_changes(measured, measured) is None
