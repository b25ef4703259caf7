"""Stored results compared across runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitopt.errors import RecordError
from vitopt.measure.comparison import compare_stored, paired_speedup, speed_ratio
from vitopt.measure.intervals import Interval
from vitopt.measure.latency_statistics import speedup_interval
from vitopt.measure.predictions import Predictions, save_predictions
from vitopt.records import Latency, Record, Variant, save_record


def timed(samples_ms: Sequence[float], rounds: int = 1, batch_size: int = 1) -> Latency:
    p50_ms = float(np.median(samples_ms))
    return Latency(
        batch_size=batch_size,
        iterations=len(samples_ms),
        rounds=rounds,
        mean_ms=p50_ms,
        std_ms=None,
        min_ms=min(samples_ms),
        p50_ms=p50_ms,
        p95_ms=None,
        p99_ms=None,
        images_per_second=1000 / p50_ms,
        warmup_ms=0,
        warmup_iterations=1,
        samples_ms=tuple(samples_ms),
    )


def result(name: str, *rows: Latency, **fields: Any) -> Record:
    variant = Variant(name=name, format="fp32")
    return Record(variant=variant, latency=rows, **fields)


def store(folder: Path, classes: list[int], *, p50_ms: float, hashes: list[str] | None = None, **fields: Any) -> Path:
    """A result over four images of two classes whose predicted classes are `classes`; the labels are all 0."""
    logits = np.zeros((len(classes), 2), dtype=np.float32)
    logits[np.arange(len(classes)), classes] = 2
    save_record(result(folder.name, timed([p50_ms]), **fields), folder)
    ids = tuple(map(str, range(len(classes))))
    labels = np.zeros(len(classes), dtype=np.int64)
    save_predictions(Predictions(ids, tuple(hashes or ids), labels, logits), folder)
    return folder


def test_compares_two_runs_image_by_image(tmp_path: Path) -> None:
    baseline = store(tmp_path / "a", [0, 0, 0, 1], p50_ms=10)
    variant = store(tmp_path / "b", [0, 1, 0, 0], p50_ms=5)
    comparison = compare_stored(baseline, variant / "record.json")
    assert (comparison.versus.right_to_wrong, comparison.versus.wrong_to_right) == (1, 1)
    assert comparison.versus.top1_delta_points == 0
    assert comparison.versus.agreement_percent == 50
    assert comparison.lines()[1] == "batch 1: 2.00x the speed; not timed together: no interval"
    assert comparison.records[1].versus_baseline == comparison.versus
    caution = "not timed together: no interval"
    assert comparison.to_json()["speed"] == [{"batch_size": 1, "ratio": 2.0, "ci95": None, "caution": caution}]


def test_refuses_other_images(tmp_path: Path) -> None:
    baseline = store(tmp_path / "a", [0, 0, 0, 1], p50_ms=10)
    variant = store(tmp_path / "b", [0, 0, 0, 1], p50_ms=10, hashes=["0", "1", "x", "y"])
    with pytest.raises(RecordError, match=r"not measured on the same images \(2 of 4 differ\)"):
        compare_stored(baseline, variant)


def test_refuses_a_failed_result(tmp_path: Path) -> None:
    baseline = store(tmp_path / "a", [0], p50_ms=10)
    variant = store(tmp_path / "b", [0], p50_ms=10, failure="out of memory")
    with pytest.raises(RecordError, match=r"b holds a failed measurement \(out of memory\)"):
        compare_stored(baseline, variant)


def test_refuses_a_result_without_predictions(tmp_path: Path) -> None:
    baseline = store(tmp_path / "a", [0], p50_ms=10)
    variant = store(tmp_path / "b", [0], p50_ms=10)
    (variant / "predictions.parquet").unlink()
    with pytest.raises(RecordError, match=r"no predictions at .*: evaluate with --output to keep them"):
        compare_stored(baseline, variant)


def rounds_of(scale: float, seed: int) -> list[float]:
    """Ten rounds of ten calls of a machine that is up to three times slower in some rounds."""
    slow = np.linspace(1, 3, 10).repeat(10)
    return (scale * slow * np.random.default_rng(seed).lognormal(0, 0.02, 100)).tolist()


def test_records_timed_together_give_the_runs_own_speed_up() -> None:
    before, after = rounds_of(12, 0), rounds_of(4, 1)
    fields = {"measured_together": "a"}
    found = speed_ratio(result("a", timed(before, 10), **fields), result("b", timed(after, 10), **fields), 1)
    expected = speedup_interval(np.split(np.array(before), 10), np.split(np.array(after), 10))
    assert (found.ratio, found.interval, found.caution) == (expected.ratio, expected.interval, None)
    assert paired_speedup(timed(before, 10), timed(after, 10)) == expected


def test_the_ratio_of_medians_is_another_figure_than_the_speed_up() -> None:
    # The variant is four times as fast in most rounds, and a third as fast in the slow ones.
    before, after = timed([4.0, 4.0, 4.0, 12.0, 12.0, 12.0], 6), timed([1.0, 1.0, 13.0, 36.0, 36.0, 1.0], 6)
    together = speed_ratio(result("a", before, measured_together="x"), result("b", after, measured_together="x"), 1)
    apart = speed_ratio(result("a", before), result("b", after), 1)
    assert abs(together.ratio / apart.ratio - 1) > 0.1
    assert together.caution is None and apart.caution is not None


@pytest.mark.parametrize(("before", "after"), [(None, None), ("x", "y"), ("x", None)])
def test_without_one_session_there_is_no_interval(before: str | None, after: str | None) -> None:
    rows = timed(rounds_of(12, 0), 10), timed(rounds_of(4, 1), 10)
    pair = result("a", rows[0], measured_together=before), result("b", rows[1], measured_together=after)
    found = speed_ratio(*pair, 1)
    assert found.interval is None and found.caution.startswith("not timed together")
    assert found.ratio == pytest.approx(rows[0].p50_ms / rows[1].p50_ms)


def test_a_kept_row_has_the_speed_up_of_its_own_session() -> None:
    row = timed(rounds_of(4, 1), 10).model_copy(update={"speedup_vs_baseline": 2.5, "speedup_ci95": (2.4, 2.6)})
    baseline = result("a", timed(rounds_of(12, 0), 10), measured_together="new", baseline_of=("old", "older"))
    found = speed_ratio(baseline, result("b", row, measured_together="old"), 1)
    assert (found.ratio, found.interval, found.caution) == (2.5, Interval(2.4, 2.6), None)
    strange = speed_ratio(baseline, result("b", row, measured_together="elsewhere"), 1)
    assert strange.interval is None and strange.ratio != 2.5


def test_too_few_rounds_are_told() -> None:
    fields = {"measured_together": "x"}
    found = speed_ratio(result("a", timed([2.0] * 4, 2), **fields), result("b", timed([1.0] * 4, 2), **fields), 1)
    assert (found.ratio, found.interval) == (pytest.approx(2), None) and "rounds" in found.caution


@pytest.mark.parametrize("change", [{"rounds": 7}, {"samples_ms": ()}, {"rounds": 5}])
def test_without_matching_rounds_there_is_a_ratio_only(change: dict[str, Any]) -> None:
    fields = {"measured_together": "x"}
    other = timed(rounds_of(4, 1), 10).model_copy(update=change)
    found = speed_ratio(result("a", timed(rounds_of(12, 0), 10), **fields), result("b", other, **fields), 1)
    assert found.ratio == pytest.approx(3, rel=0.1) and found.interval is None and "samples" in found.caution


CPU_TWO = {"processor": "AMD EPYC", "device": "cpu", "torch_threads": 2, "threads_bound": True, "gpu": None}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gpu": {"name": "NVIDIA H200"}, "device": "cuda:0"}, "NVIDIA H200"),
        ({"processor": "Intel Xeon"}, "Intel Xeon"),
        ({"torch_threads": 8}, "8 bound threads"),
        ({"threads_bound": False}, "2 threads"),
    ],
)
def test_different_devices_are_told_in_words(change: dict[str, Any], named: str) -> None:
    here, there = (
        result("a", timed([4.0]), environment=CPU_TWO),
        result("b", timed([2.0]), environment=CPU_TWO | change),
    )
    found = speed_ratio(here, there, 1)
    assert found.interval is None and "different devices" in found.caution
    assert named in found.caution and "AMD EPYC, 2 bound threads" in found.caution
    assert speed_ratio(here, here, 1).caution == "not timed together: no interval"


def test_a_batch_size_that_one_was_not_timed_at_has_no_ratio() -> None:
    assert speed_ratio(result("a", timed([4.0], batch_size=8)), result("b", timed([2.0])), 1) is None
    assert speed_ratio(result("a", timed([4.0])), result("b"), 1) is None
