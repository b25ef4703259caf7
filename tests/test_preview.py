"""What a recipe will need, against the images that are there and calls that were timed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vitopt import pipeline
from vitopt.data.images import ImageSet, open_images
from vitopt.errors import DataError
from vitopt.measure import forecast
from vitopt.models.checkpoint import open_checkpoint
from vitopt.preview import preview
from vitopt.recipe import DataSpec, Recipe
from vitopt.search.confirmation import divide
from vitopt.search.fastest import candidates

TIMED = {"latency": {"batch_sizes": [1, 4], "iterations": 85, "rounds": 5}}


def recipe(model: Path, data: Path | None, **changes: Any) -> Recipe:
    content = {
        "name": "a",
        "model": str(model),
        "data": None if data is None else str(data),
        "device": "cpu",
        "evaluate": TIMED,
        "variants": [{"name": "fp32", "format": "fp32"}, {"name": "nf4", "format": "nf4"}],
    }
    return Recipe.model_validate(content | changes)


def test_claims_stand_beside_the_images_that_are_there(
    tiny_checkpoint: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    original = ImageSet.image
    monkeypatch.setattr(ImageSet, "image", lambda self, index: decoded.append(index) or original(self, index))
    auto = {"name": "auto", "format": "nf4", "skip": "auto", "auto": {"max_top1_drop": 1, "images": 20}}
    wanted = recipe(
        tiny_checkpoint,
        shapes,
        require={"max_top1_drop": 0.5, "max_p99_ms": 20, "max_megabytes": 9},
        variants=[{"name": "fp32", "format": "fp32"}, auto],
    )
    found = preview(wanted)
    assert [(claim.about, claim.need.requirement, claim.there) for claim in found.claims] == [
        ("every variant", "max_top1_drop", 24),
        ("every variant", "max_p99_ms", 85),
        ("floor of auto", "max_top1_drop", 24),
    ]
    assert found.claims[2].need.least == 381
    assert len(decoded) <= 5  # for the estimate alone; all 24 are counted
    (left_out,) = found.notes
    assert "memory" in left_out and "compiling" not in left_out and "throughput" not in left_out
    assert {stage.name for stage in found.stages} == {
        "sensitivity auto", "evaluate: accuracy", "evaluate: latency", "evaluate: end to end"
    }  # fmt: skip
    # 20 images of the split choose and confirm; three blocks are scored twice each, then lists are tried.
    what = found.stages[0].what
    assert all(
        words in what for words in ("20 images of train", "5 choose", "26 evaluations", "15 confirm", "1 points")
    )


def test_images_that_are_not_there_are_a_note(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = preview(recipe(tiny_checkpoint, tmp_path / "nowhere", require={"max_kl": 1}))
    assert [claim.there for claim in found.claims] == [None]
    assert "nowhere" in found.notes[0]
    assert [stage.name for stage in found.stages] == ["evaluate: latency"]


def test_what_a_run_refuses_for_its_images_is_refused(tiny_checkpoint: Path, shapes: Path) -> None:
    fp32 = {"name": "fp32", "format": "fp32"}
    tested = {"name": "low", "format": "fp32", "adaptive": {"low": 16, "escalation_rate": 0.1, "split": "test"}}
    with pytest.raises(DataError, match="calibration images are also test images"):
        preview(recipe(tiny_checkpoint, shapes, variants=[fp32, tested]))


def test_classes_of_a_model_that_cannot_be_reached_are_a_note(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "seconds_per_image", lambda *_: 0.01)
    found = preview(recipe(Path("google/vit-large-patch16-224"), shapes, require={"max_kl": 1}))
    assert found.claims[0].there == 24
    assert "classes" in found.notes[0] and "google/vit-large-patch16-224" in found.notes[0]


def test_a_model_that_cannot_be_timed_gives_no_estimate(
    tiny_checkpoint: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("out of\nmemory")

    monkeypatch.setattr(forecast, "seconds_per_image", full)
    found = preview(recipe(tiny_checkpoint, shapes))
    assert found.stages == [] and found.notes == ["no estimate of the time: out of memory"]


def test_stages_take_their_images_times_their_passes(tiny_checkpoint: Path, shapes: Path) -> None:
    auto = {"name": "auto", "format": "nf4", "skip": "auto"}
    calibration = open_images(DataSpec(source=str(shapes), limit=30), "train")
    choosing, confirming = map(len, divide(calibration))
    assert (choosing, confirming) == (8, 22)
    variants = [{"name": "fp32", "format": "fp32"}, {"name": "as-bf16", "format": "fp32", "run_as": "bf16"}, auto]
    wanted = recipe(tiny_checkpoint, shapes, finetune={"epochs": 2}, variants=variants)
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    images = {"train": 100, "test": 50, "auto": 30}
    found = forecast.stages(wanted, checkpoint, {"fp32": 0.1, "bf16": 0.04}, 0.01, images)
    assert {stage.name: pytest.approx(stage.seconds) for stage in found} == {
        "finetune": 2 * 100 * (3 * 0.1 + 0.01),
        # Three blocks; each part of the images runs its own passes, as the search divides them.
        "sensitivity auto": choosing * (3 * 0.01 + (3 + 20) * 0.04) + confirming * (0.01 + 3 * 0.04),
        "evaluate: accuracy": 50 * (0.01 + 0.1 + 0.04 + 0.04),
        "evaluate: latency": 5 * 100 * 0.18,
        # 40 calls of one image, and of four images as many as five seconds for each variant allow.
        "evaluate: end to end": 40 * (3 * 0.01 + 0.18) + 3 * 5,
    }


def test_steps_that_variants_share_take_their_time_once(tiny_checkpoint: Path, shapes: Path) -> None:
    first, second = {"finetune": {"epochs": 1}}, {"finetune": {"epochs": 3}}
    variants = [
        {"name": "fp32", "format": "fp32"},
        {"name": "a", "format": "nf4", "steps": [first]},
        {"name": "b", "format": "int8", "steps": [first, second]},
    ]
    wanted = recipe(tiny_checkpoint, shapes, variants=variants)
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    found = forecast.stages(wanted, checkpoint, {"fp32": 0.1, "bf16": 0.04}, 0.01, {"train": 100})
    assert [(stage.name, pytest.approx(stage.seconds)) for stage in found[:-1]] == [
        (f"steps/{name}", epochs * 100 * (3 * 0.1 + 0.01))
        for name, epochs in zip(wanted.variants[2].step_names, (1, 3), strict=True)
    ]


def test_a_choice_of_a_format_takes_the_time_of_its_candidates(tiny_checkpoint: Path, shapes: Path) -> None:
    fastest = {"name": "fastest", "format": "auto", "fastest": {"images": 20, "compile": False, "min_agreement": 10}}
    wanted = recipe(tiny_checkpoint, shapes, variants=[{"name": "fp32", "format": "fp32"}, fastest])
    compared = {"fastest": candidates(torch.device("cpu"), "bf16", compile=False)}
    assert len(compared["fastest"]) == 3
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    found = forecast.stages(wanted, checkpoint, {"fp32": 0.1, "bf16": 0.04}, 0.01, {"fastest": 20}, compared)
    assert found[0].name == "format fastest"
    assert found[0].seconds == pytest.approx(20 * (0.01 + 0.18) + 100 * 0.18)
    assert {stage.name for stage in preview(wanted).stages} == {
        "format fastest", "evaluate: accuracy", "evaluate: latency", "evaluate: end to end"
    }  # fmt: skip
    compiled = wanted.model_copy(update={"evaluate": wanted.evaluate.model_copy(update={"throughput": True})})
    assert "throughput" in forecast.left_out(compiled)


def test_only_what_does_not_stand_takes_time(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "seconds_per_image", lambda *_: 0.1)
    monkeypatch.setattr(forecast, "seconds_to_decode", lambda *_: 0.01)
    monkeypatch.setattr(pipeline, "_write_report", lambda *_: None)
    auto = {"name": "auto", "format": "nf4", "skip": "auto"}
    auto["auto"] = {"max_top1_drop": None, "max_kl_share": 0.9, "images": 8}
    brief = {"latency": {"iterations": 4, "rounds": 2, "warmup_seconds": 0}, "end_to_end": False, "look_alikes": False}
    variants = [{"name": "fp32", "format": "fp32"}, auto]
    wanted = recipe(tiny_checkpoint, shapes, variants=variants, evaluate=brief)
    folder = tmp_path / "run"
    assert not any(stage.stands for stage in preview(wanted, folder).stages)
    pipeline.run(wanted, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    found = preview(wanted, folder).stages
    assert {stage.name for stage in found} == {"sensitivity auto", "evaluate fp32, auto"}
    assert all(stage.stands and stage.seconds == 0 for stage in found)

    more = recipe(tiny_checkpoint, shapes, variants=[*variants, {"name": "int8", "format": "int8"}], evaluate=brief)
    stages = {stage.name: stage for stage in preview(more, folder).stages}
    assert {name for name, stage in stages.items() if stage.stands} == {"sensitivity auto", "evaluate auto"}
    # The new row and the baseline: 24 images and so many calls of each.
    assert stages["evaluate: accuracy"].seconds == pytest.approx(24 * (0.01 + 0.2))
    other = recipe(tiny_checkpoint, shapes, variants=variants, evaluate=brief | {"batch_size": 5})
    assert [stage.name for stage in preview(other, folder).stages if stage.stands] == ["sensitivity auto"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before  # a preview changes nothing


def test_the_time_of_a_call_is_about_that_of_the_model_itself(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    seconds = forecast.seconds_per_image(checkpoint, torch.device("cpu"), torch.float32)
    assert 0 < seconds < 1
