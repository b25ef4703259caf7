"""Results of several folders on one page: compared with the first, as far as they can be."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from vitopt.errors import RecordError
from vitopt.measure.accuracy import adjusted, compare
from vitopt.measure.predictions import Predictions, save_predictions
from vitopt.records import Record, Requirement, save_record
from vitopt.report.results import gather, open_run

ASKED = Requirement(name="max_megabytes", limit=1, measured=2, ci95=(2, 2), decision="failed")


def kept(folder: Path, record: Record, predictions: Predictions | None = None) -> Path:
    """As `evaluate --output` leaves it."""
    folder.mkdir()
    save_record(record, folder)
    if predictions is not None:
        save_predictions(predictions, folder)
    return folder


def test_all_are_compared_with_the_first_whatever_they_were_compared_with_before(
    make: SimpleNamespace, tmp_path: Path
) -> None:
    before, one, two = make.predictions(), make.predictions(wrong=(1, 2)), make.predictions(wrong=range(9))
    elsewhere = {
        "measured_together": "another",
        "baseline": ("z", one),
        "baseline_ms": {1: 80.0},
        "requirements": (ASKED,),
    }
    folders = [
        kept(tmp_path / "a", make.record("a", p50_ms={1: 30.0}, predictions=before), before),
        kept(tmp_path / "b", make.record("b", p50_ms={1: 20.0}, predictions=one, **elsewhere), one),
        kept(tmp_path / "c", make.record("c", p50_ms={1: 15.0}, predictions=two), two),
    ]
    results = gather(folders, tmp_path / "page")
    assert [record.variant.name for record in results.records] == ["a", "b", "c"]
    assert results.baseline is results.records[0] and results.folder == tmp_path / "page"
    expected = adjusted([compare("a", before, one), compare("a", before, two)], 40)
    assert [record.versus_baseline for record in results.records] == [None, *expected]
    assert all(record.requirements == () for record in results.records)
    apart, together = (record.latency[0] for record in results.records[1:])
    assert (apart.speedup_vs_baseline, apart.speedup_ci95) == (pytest.approx(1.5), None)
    assert together.speedup_vs_baseline == pytest.approx(2.0) and together.speedup_ci95 is not None


def test_results_of_one_name_are_told_apart_by_their_folders(make: SimpleNamespace, tmp_path: Path) -> None:
    folders = [kept(tmp_path / name, make.record("vit", p50_ms={1: 3.0})) for name in ("x", "y")]
    assert [r.variant.name for r in gather(folders, tmp_path).records] == [f"vit ({folder})" for folder in folders]
    with pytest.raises(RecordError, match="given twice"):
        gather([folders[0], folders[0]], tmp_path)


def test_other_images_are_refused_by_the_names_of_both(make: SimpleNamespace, tmp_path: Path) -> None:
    few, many = make.predictions(), make.predictions(images=44)
    folders = [
        kept(tmp_path / "few", make.record("a", predictions=few), few),
        kept(tmp_path / "many", make.record("b", predictions=many), many),
    ]
    with pytest.raises(RecordError, match=r"few and .*many do not compare: .*same images"):
        gather(folders, tmp_path / "page")


def test_a_benchmark_beside_an_evaluation_compares_in_speed_alone(make: SimpleNamespace, tmp_path: Path) -> None:
    seen = make.predictions()
    folders = [
        kept(tmp_path / "a", make.record("a", p50_ms={1: 30.0}, predictions=seen), seen),
        make.run(tmp_path / "b", [make.record("b", p50_ms={1: 10.0}), make.record("c", failure="no", latency=())]),
    ]
    results = gather(folders, tmp_path / "page")
    assert [record.versus_baseline for record in results.records] == [None] * 3
    assert results.records[1].latency[0].speedup_vs_baseline == pytest.approx(3.0)
    assert results.records[2].failure == "no"


def test_the_baseline_of_a_benchmark_is_the_one_that_all_others_name_their_speed_over(
    make: SimpleNamespace, tmp_path: Path
) -> None:
    records = [make.record("a", p50_ms={1: 2.0}, baseline_ms={1: 3.0}), make.record("b", p50_ms={1: 3.0})]
    assert open_run(make.run(tmp_path, records)).baseline == records[1]
