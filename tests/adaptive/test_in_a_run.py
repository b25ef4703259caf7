"""Adaptive variants of a run: made once, measured like all others, told in record, table and page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import done, printed, refusal
from conftest import make_checkpoint

from vitopt import api, checks, pipeline
from vitopt.errors import DataError, RecipeError
from vitopt.measure.predictions import load_predictions
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import open_checkpoint
from vitopt.pipeline import RunResult
from vitopt.preview import preview
from vitopt.recipe import Recipe
from vitopt.recipe_file import validate
from vitopt.report.table import cautions, comparison

HALF = {"escalation_rate": 0.5}


def recipe(model: Path, data: Path, *variants: dict[str, Any]) -> Recipe:
    content = {
        "name": "r",
        "model": str(model),
        "data": str(data),
        "device": "cpu",
        "variants": [{"name": "high", "format": "fp32"}, *variants],
        "evaluate": {"latency": {"iterations": 24, "rounds": 4, "warmup_seconds": 0}, "throughput": True},
    }
    return validate(Recipe, content, where="r")


def adaptive(name: str, format: str = "fp32", **spec: Any) -> dict[str, Any]:
    return {"name": name, "format": format, "adaptive": HALF | spec}


@pytest.fixture(scope="module")
def finished(
    tiny_checkpoint: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, RunResult, list[str]]:
    place = tmp_path_factory.mktemp("run")
    draft = make_checkpoint(place / "draft", blocks=1, seed=7)
    variants = [
        adaptive("low", "nf4", low=16),
        adaptive("cascade", "bf16", draft=str(draft)),
        adaptive("narrow", first={"class_token_last": True}, proxy="margin"),
    ]
    asked, said = recipe(tiny_checkpoint, shapes, *variants), list[str]()
    return asked, pipeline.run(asked, place / "run", said.append), said


def test_the_record_tells_both_passes_and_how_many_were_escalated(
    finished: tuple[Recipe, RunResult, list[str]],
) -> None:
    high, low, cascade, narrow = finished[1].records
    assert high.routing is None and not high.latency[0].by_mean
    for record in (low, cascade, narrow):
        routing, kept = record.routing, load_predictions(finished[1].folder / "variants" / record.variant.name)
        assert record.failure is None and routing is not None and kept.escalated is not None
        assert routing.escalated_percent == pytest.approx(100 * kept.escalated.mean())
        assert 0 < routing.escalated_percent < 100 and "50 %" in routing.promise
        row = record.latency[0]
        assert row.by_mean and row.mean_ms == pytest.approx(np.mean(row.samples_ms), rel=1e-3)
        assert row.speedup_vs_baseline == pytest.approx(high.latency[0].mean_ms / row.mean_ms, rel=1e-3)
        assert row.images_per_second == pytest.approx(1000 / row.mean_ms)
        assert record.throughput is not None and record.end_to_end
    assert low.routing is not None and low.model is not None and cascade.routing is not None
    assert (low.routing.first.image_size, low.model.image_size, low.routing.first_format) == ((16, 16), (32, 32), "nf4")
    assert narrow.routing is not None  # no path, which another place does not have
    assert [r.routing.first.source for r in (low, cascade, narrow) if r.routing] == ["first", "first", "."]
    assert narrow.routing.first_ran == {"class_token_last": True}


def test_the_table_shows_escalation_and_means(finished: tuple[Recipe, RunResult, list[str]]) -> None:
    records = finished[1].records
    table = comparison(records, 1)
    place = table.headings.index("escalated %")
    assert [cells[place] == "–" for cells in table.rows] == [True, False, False, False]
    assert "mean ms" in table.headings
    assert any("low, cascade, narrow" in line and "means" in line for line in cautions(records))
    assert finished[1].report is None or "escalated" in finished[1].report.read_text()


def test_a_finished_run_stands_until_the_target_changes(
    finished: tuple[Recipe, RunResult, list[str]],
) -> None:
    asked, result, _ = finished
    said: list[str] = []
    pipeline.run(asked, result.folder, said.append)
    assert all("up to date" in line for line in said if line.startswith(("variant", "evaluate")))
    content = asked.model_dump(mode="json")
    content["variants"][1]["adaptive"]["escalation_rate"] = 0.25
    said.clear()
    pipeline.run(Recipe.model_validate(content), result.folder, said.append)
    again = [line for line in said if line.startswith("variant") and "up to date" not in line]
    assert len(again) == 1 and "variant low" in again[0] and "25 %" in " ".join(said)


def test_the_images_that_chose_the_threshold_are_noted(finished: tuple[Recipe, RunResult, list[str]]) -> None:
    folder = finished[1].folder / "variants" / "low"
    assert [use.purpose for use in load_uses(folder)] == ["threshold"]


def test_commands_take_the_folder_like_a_checkpoint(
    finished: tuple[Recipe, RunResult, list[str]], shapes: Path, tmp_path: Path
) -> None:
    folder = finished[1].folder / "variants" / "low"
    record = printed("evaluate", folder, "--data", f"{shapes}:test", "--iterations", 4, "--rounds", 2)
    assert record["routing"]["escalated_percent"] is not None
    (timed,) = printed("benchmark", folder, "--iterations", 4, "--rounds", 2)
    assert any("random pixels" in line for line in timed["warnings"])
    answers = printed("predict", folder, shapes / "test")
    assert {answer["path"] for answer in answers} == {"first", "second"}
    done("predict", folder, shapes / "test", "--output", tmp_path / "answers.csv")
    heading, *rows = (tmp_path / "answers.csv").read_text().splitlines()
    assert heading.endswith(",error,path")
    assert [row.rpartition(",")[2] for row in rows] == [answer["path"] for answer in answers]
    loaded = api.load(folder, device="cpu").predict(str(next((shapes / "test").rglob("*.png"))))
    assert loaded[0]["path"] in ("first", "second")


def test_calibrate_prints_proxies_and_the_curve(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    arguments = ("adaptive", "calibrate", tiny_checkpoint, "--data", shapes, "--low", 16, "--high", 32)
    told = done(*arguments, "--escalation-rate", 0.25, "--output", tmp_path / "made").stdout
    for word in ("margin", "entropy", "class_token", "Spearman", "lost %", "(taken)"):
        assert word in told
    found = printed(*arguments, "--max-top1-loss", 0.5, "--output", tmp_path / "sure")
    assert found["rule"]["threshold"] is None and "798" in found["promise"]
    assert json.loads((tmp_path / "sure" / "adaptive.json").read_text())["schema"] == "vitopt.adaptive/1"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--low", "20"), "patches of 8"),
        (("--low", "32"), "not below"),
        (("--low", "16", "--high", "64"), "--high 64"),
        ((), "first pass would be the second"),
        (("--low", "16", "--max-top1-loss", "1"), "one of `escalation_rate` and `max_top1_loss`"),
        (("--draft", "./nowhere"), "no checkpoint at ./nowhere"),
        (("--first", "fuse_kqv"), "'fuse_kqv'"),
        (("--first", "autotune"), "compile"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    arguments = ("--data", shapes, "--escalation-rate", 0.5, "--output", tmp_path / "made", *options)
    assert told in refusal("adaptive", "calibrate", tiny_checkpoint, *arguments)
    assert not (tmp_path / "made").exists()


def test_a_recipe_is_refused_before_anything_is_made(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    for spec, told in (({"low": 20}, "patches"), ({"low": 48}, "not below"), ({"draft": "./nowhere"}, "./nowhere")):
        with pytest.raises(RecipeError, match=told):
            checks.plans(recipe(tiny_checkpoint, shapes, adaptive("a", **spec)))
    with pytest.raises(RecipeError, match="adaptive"):
        recipe(tiny_checkpoint, shapes, {"name": "a", "format": "fp32", "adaptive": {"low": 16}})
    tested = recipe(tiny_checkpoint, shapes, adaptive("a", low=16, split="test"))
    assert tested.data is not None
    with pytest.raises(DataError, match="calibration images are also test images"):
        source, images = open_checkpoint(str(tiny_checkpoint)), checks.tested_images(tested, tested.data)
        checks.require_images(tested, source, tested.data, images)
    with pytest.raises(RecipeError, match=r"`adaptive` of a needs `data`"):
        content = tested.model_dump(mode="json", exclude_unset=True)
        validate(Recipe, {key: content[key] for key in ("name", "model", "variants")}, where="r")


def test_a_draft_has_the_classes_that_the_run_trains(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    draft = make_checkpoint(tmp_path / "draft", blocks=1)
    source = make_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["id2label"] = {row: f"other {row}" for row in config["id2label"]}
    config["label2id"] = {name: int(row) for row, name in config["id2label"].items()}
    (source / "config.json").write_text(json.dumps(config))

    def check(draft: Path) -> None:
        content = recipe(source, shapes, adaptive("a", draft=str(draft))).model_dump(mode="json", exclude_unset=True)
        asked = validate(Recipe, content | {"finetune": {"epochs": 1}}, where="r")
        assert asked.data is not None
        checks.plans(asked)
        preview(asked)

    with pytest.raises(DataError, match="draft that was fine-tuned"):
        check(source)
    check(draft)


def test_a_first_pass_shares_its_training_with_a_variant(tiny_checkpoint: Path, shapes: Path) -> None:
    steps = [{"finetune": {"image_size": 16, "epochs": 1}}]
    asked = recipe(
        tiny_checkpoint, shapes, {"name": "low", "format": "bf16", "steps": steps}, adaptive("adaptive", steps=steps)
    )
    _, low, both = asked.variants
    assert [*low.all_steps] == [*both.all_steps] == both.first_step_names and both.step_names == []
    other = recipe(tiny_checkpoint, shapes, adaptive("a", steps=steps, draft=str(tiny_checkpoint))).variants[1]
    assert other.first_step_names != both.first_step_names and other.trains


def test_a_first_pass_cannot_merge_more_tokens_than_it_has(tiny_checkpoint: Path, shapes: Path) -> None:
    for changes in ({"low": 16}, {"steps": [{"finetune": {"image_size": 16}}]}):
        with pytest.raises(RecipeError, match=r"adaptive: .*tokens"):
            checks.plans(recipe(tiny_checkpoint, shapes, adaptive("a", first={"merge_tokens": "3"}, **changes)))
    checks.plans(recipe(tiny_checkpoint, shapes, adaptive("a", first={"merge_tokens": "3"})))
