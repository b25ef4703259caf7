"""Stored results compared across runs."""

from pathlib import Path

import numpy as np
import pytest

from vitopt.errors import RecordError
from vitopt.measure.comparison import compare_stored
from vitopt.measure.predictions import Predictions, save_predictions
from vitopt.records import Latency, Record, Variant, save_record


def store(folder: Path, classes: list[int], *, p50_ms: float, hashes: list[str] | None = None, failure=None) -> Path:
    """A result over four images of two classes whose predicted classes are `classes`; the labels are all 0."""
    logits = np.zeros((len(classes), 2), dtype=np.float32)
    logits[np.arange(len(classes)), classes] = 2
    latency = Latency(
        batch_size=1,
        iterations=1,
        rounds=1,
        mean_ms=p50_ms,
        std_ms=None,
        min_ms=p50_ms,
        p50_ms=p50_ms,
        p95_ms=None,
        p99_ms=None,
        images_per_second=1000 / p50_ms,
        warmup_ms=0,
        warmup_iterations=1,
        samples_ms=(p50_ms,),
    )
    variant = Variant(name=folder.name, format="fp32", attention_requested="sdpa", attention_used="sdpa")
    save_record(Record(variant=variant, latency=(latency,), failure=failure), folder)
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
    assert comparison.latency_ratios == {1: 2.0}
    assert (
        comparison.lines()[1] == "batch 1: 2.00x the speed; the two were not interleaved, so no interval can be given"
    )
    assert comparison.records[1].versus_baseline == comparison.versus
    assert comparison.to_json()["latency_ratios_not_interleaved"] == {"1": 2.0}


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
