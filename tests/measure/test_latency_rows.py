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


QUIET = tuple(10 + 0.4 * (index % 10) for index in range(100))


@pytest.mark.parametrize(
    ("samples_ms", "told"),
    [
        (QUIET, None),
        ((31.0, *QUIET[1:]), None),  # one slow call in a hundred
        (tuple(31.2 if index % 10 == 0 else ms for index, ms in enumerate(QUIET)), "over 3 times"),  # one in ten
        (tuple(ms * (1 if index < 10 else 3) for index, ms in enumerate(QUIET)), "times"),  # all but the first round
        ((10.0,) * 10 + (31.0,), None),  # too few to tell
    ],
)
def test_samples_that_spread_tell_of_a_disturbed_machine(samples_ms: tuple[float, ...], told: str | None) -> None:
    warnings = Rows((row(samples_ms=samples_ms),), ()).warnings
    assert len(warnings) == (told is not None)
    assert all(told is not None and told in warning and "disturbed" in warning for warning in warnings)
