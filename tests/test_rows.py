"""Rows that were measured stand; a new one is measured with the baseline alone, and says that it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vitopt import pipeline, rows
from vitopt.measure.accuracy import adjusted
from vitopt.measure.comparison import compare_stored, paired_speedup
from vitopt.models.checkpoint import open_checkpoint
from vitopt.recipe import Recipe
from vitopt.records import Record, load_record
from vitopt.report.table import cautions
from vitopt.stages import RunFolder
from vitopt.variants import Settled

TIMED = {"latency": {"iterations": 8, "rounds": 4, "warmup_seconds": 0}, "end_to_end": False, "look_alikes": False}
FP32, INT8, NF4 = ({"name": name, "format": name} for name in ("fp32", "int8", "nf4"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The names that are measured together, call by call."""
    calls: list[list[str]] = []
    original = rows.measure

    def noting(candidates: Any, *arguments: Any, **options: Any) -> Any:
        calls.append([candidate.name for candidate in candidates])
        return original(candidates, *arguments, **options)

    monkeypatch.setattr(rows, "measure", noting)
    monkeypatch.setattr(pipeline, "_write_report", lambda *_: None)
    return calls


@pytest.fixture
def run(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> Any:
    def carry_out(*variants: dict[str, Any], **changes: Any) -> tuple[dict[str, Record], list[str]]:
        content = {
            "name": "r", "model": str(tiny_checkpoint), "data": str(shapes), "device": "cpu", "evaluate": TIMED,
            "variants": list(variants),
        }  # fmt: skip
        said: list[str] = []
        result = pipeline.run(Recipe.model_validate(content | changes), tmp_path / "run", said.append)
        return {record.variant.name: record for record in result.records}, said

    return carry_out


def test_a_new_variant_is_measured_with_the_baseline_alone_and_the_other_rows_stay(
    run: Any, measured: list[list[str]], tmp_path: Path
) -> None:
    before, _ = run(FP32, INT8, require={"min_speedup": 0.001})
    after, said = run(FP32, INT8, NF4, require={"min_speedup": 0.001})
    assert measured == [["fp32", "int8"], ["fp32", "nf4"]]
    assert said[-1].startswith("evaluate: fp32, nf4 on 24 images") and "int8 stand" in said[-1]
    kept, new, baseline = after["int8"], after["nf4"], after["fp32"]
    assert kept.latency == before["int8"].latency and kept.created == before["int8"].created
    assert baseline.measured_together == new.measured_together != kept.measured_together
    assert baseline.baseline_of == (kept.measured_together,)
    # The old row's speed-up is that of its own session, with its interval, for the gate and for `compare` alike.
    own = paired_speedup(before["fp32"].latency[0], before["int8"].latency[0])
    assert [one.decision for one in kept.requirements] == ["shown"]
    assert kept.requirements[0].measured == pytest.approx(own.ratio)
    places = tmp_path / "run" / "variants"
    (compared,) = compare_stored(places / "fp32", places / "int8").speed
    assert (compared.ratio, compared.caution) == (pytest.approx(own.ratio), None)
    (apart,) = compare_stored(places / "int8", places / "nf4").speed
    assert apart.interval is None and "not timed together" in str(apart.caution)
    (told,) = [line for line in cautions(list(after.values())) if "not timed together" in line]
    assert "fp32, nf4" in told and "int8" in told and "own session" in told


def test_p_values_allow_for_the_variants_of_all_sessions(run: Any, measured: list[list[str]], tmp_path: Path) -> None:
    alone, _ = run(FP32, INT8)
    assert alone["int8"].versus_baseline.mcnemar_holm_p is None
    together, _ = run(FP32, INT8, NF4)
    compared = [together[name].versus_baseline for name in ("int8", "nf4")]
    assert compared == adjusted(compared, 24) and None not in [one.mcnemar_holm_p for one in compared]
    assert load_record(tmp_path / "run" / "variants" / "int8") == together["int8"]
    assert run(FP32, INT8)[0]["int8"] == alone["int8"]  # and no longer, where the other one has left
    assert len(measured) == 2


def test_rows_that_come_back_stand_against_the_baseline_of_their_session(run: Any, measured: list[list[str]]) -> None:
    first, _ = run(FP32, INT8)
    run(FP32, NF4)
    back, said = run(FP32, INT8, NF4, require={"min_speedup": 0.001})
    assert said[-1] == "evaluate: up to date, skipped" and len(measured) == 2
    assert back["int8"].latency == first["int8"].latency
    assert [one.decision for one in back["int8"].requirements] == ["shown"]


def test_a_variant_that_cannot_be_made_measures_nothing_again(run: Any, measured: list[list[str]]) -> None:
    before, _ = run(FP32, INT8)
    after, said = run(FP32, INT8, {"name": "fp8", "format": "fp8"})
    assert len(measured) == 1 and "fp8" in after["fp8"].failure
    assert said[-1].startswith("evaluate: fp8 failed")
    assert after["fp32"] == before["fp32"]


def fingerprints(model: Path, folder: Path, variants: list[dict[str, Any]], **changes: Any) -> dict[str, str]:
    """Of the rows of a recipe whose images nobody opens, where each `skip: auto` has chosen block.1."""
    content = {"name": "r", "model": str(model), "data": "digits", "device": "cpu", "variants": variants}
    recipe = Recipe.model_validate(content | changes)
    base = open_checkpoint(str(model))
    settled = [Settled(v.skipping(["block.1"]) if v.skips_automatically else v, base) for v in recipe.variants]
    made = dict.fromkeys(variant.name for variant in recipe.variants)
    found = rows.rows_of(RunFolder(folder, print), recipe, None, settled, made)
    return {name: row.fingerprint for name, row in found.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"baseline": "int8"},
        {"evaluate": TIMED | {"batch_size": 5}},
        {"data": {"source": "digits", "limit": 8}},
        {"variants": [FP32 | {"attention": "eager"}, INT8]},
    ],
)
def test_another_baseline_data_or_way_to_measure_measures_all_again(
    change: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    before = fingerprints(tiny_checkpoint, tmp_path, [FP32, INT8])
    other = {"variants": [FP32, INT8]} | change
    after = fingerprints(tiny_checkpoint, tmp_path, **other)
    assert not set(before.values()) & set(after.values())
    more = fingerprints(tiny_checkpoint, tmp_path, [FP32, INT8, NF4])
    assert {name: more[name] for name in before} == before


def test_how_a_skip_list_was_chosen_is_no_part_of_a_row(tiny_checkpoint: Path, tmp_path: Path) -> None:
    few, many, other = (
        fingerprints(
            tiny_checkpoint, tmp_path, [FP32, {"name": "auto", "format": format, "skip": "auto", "auto": auto}]
        )
        for format, auto in (("nf4", {"images": 16}), ("nf4", {"images": 32}), ("int8", {"images": 16}))
    )
    assert few == many and few["auto"] != other["auto"]
