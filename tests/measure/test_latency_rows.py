"""What the rows of a record say against themselves."""

from typing import Any

import pytest

from vitopt.measure.latency_rows import Rows
from vitopt.records import Latency


def row(batch_size: int = 1, **changes: Any) -> Latency:
    fields: dict[str, Any] = {
        "batch_size": batch_size,
        "iterations": 100,
        "rounds": 10,
        "mean_ms": 10,
        "std_ms": 1,
        "min_ms": 9,
        "p50_ms": 10,
        "p95_ms": 12,
        "p99_ms": 13,
        "images_per_second": 100,
        "warmup_ms": 100,
        "warmup_iterations": 34,
        "settled": True,
        "samples_ms": (),
    }
    return Latency(**fields | changes)


def test_steady_rows_need_no_word() -> None:
    assert Rows((row(), row(8, p95_ms=None)), ()).warnings == []


def test_a_warm_up_that_never_settled_is_told_with_the_remedy() -> None:
    (warning,) = Rows((row(), row(8, settled=False)), ()).warnings
    assert warning.startswith("batch 8:") and "34 calls" in warning and "warmup_seconds" in warning


@pytest.mark.parametrize(("p95_ms", "told"), [(14.9, 0), (31.0, 1)])
def test_samples_that_spread_tell_of_a_disturbed_machine(p95_ms: float, told: int) -> None:
    warnings = Rows((row(p95_ms=p95_ms),), ()).warnings
    assert len(warnings) == told
    assert all("3.1 times the median" in warning for warning in warnings)
