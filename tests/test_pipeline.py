"""Whole runs of a small recipe: what they leave on disk, what they skip the second time, how they end early."""

import copy
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import calibration_hashes

from vitopt import inference, pipeline, rows, variants
from vitopt.checks import plans
from vitopt.data.images import open_images
from vitopt.environment import devices, launch, libraries, machine, support
from vitopt.errors import (
    CheckpointError,
    DataError,
    MeasurementError,
    RecipeError,
    RecordError,
    StorageError,
    UnsupportedError,
)
from vitopt.measure import evaluator
from vitopt.measure.predictions import load_predictions
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.ownership import LIST_FILE
from vitopt.pipeline import RunResult
from vitopt.prediction import predict
from vitopt.recipe import DataSpec, Recipe
from vitopt.recipe_file import load_recipe
from vitopt.records import SCHEMA, load_record
from vitopt.report.table import cautions
from vitopt.stages import RunFolder
from vitopt.variants import Settled

VERSIONS = libraries.versions()
NAMES = ("fp32", "nf4-skip", "nf4-fa2", "int8")
CHECKPOINT = {"config.json", "model.safetensors", "preprocessor_config.json"}
LISTED = CHECKPOINT | {LIST_FILE}


@pytest.fixture(scope="module")
def content(tiny_checkpoint: Path, shapes: Path) -> dict[str, Any]:
    return {
        "name": "tiny-run",
        "model": str(tiny_checkpoint),
        "data": str(shapes),
        "device": "cpu",
        "finetune": {"epochs": 2, "batch_size": 8, "rank": 4, "learning_rate": 3e-3},
        "variants": [
            {"name": "fp32", "format": "fp32"},
            {"name": "nf4-skip", "format": "nf4", "skip": ["block.1"]},
            {"name": "nf4-fa2", "format": "nf4", "skip": ["block.1"], "attention": "flash_attention_2"},
            {"name": "int8", "format": "int8"},
        ],
        "baseline": "fp32",
        "evaluate": {"latency": {"iterations": 12, "rounds": 4, "warmup_seconds": 0.05}, "end_to_end": False},
        "export": "nf4-skip",
    }


def changed(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return copy.deepcopy(content) | changes


def run(content: dict[str, Any], folder: Path) -> tuple[RunResult, list[str]]:
    said: list[str] = []
    return pipeline.run(Recipe.model_validate(content), folder, said.append), said


@pytest.fixture(scope="module")
def finished(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[str]]:
    """A complete run that tests must not change; `again` gives a copy."""
    return run(content, tmp_path_factory.mktemp("runs") / "tiny-run")


@pytest.fixture
def again(finished: tuple[RunResult, list[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[0].folder, tmp_path / "tiny-run"))


def times(folder: Path) -> dict[str, int]:
    """When each file of checkpoints, records and predictions was written."""
    files = [path for stage in ("finetune", "variants") for path in (folder / stage).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files if path.name != "README.md"}


def written_again(before: dict[str, int], folder: Path) -> set[str]:
    """Folders in which a file of a checkpoint was written again."""
    after = times(folder)
    return {
        str(Path(name).parent) for name in after if Path(name).name in CHECKPOINT and before.get(name) != after[name]
    }


def hidden(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != LIST_FILE)


def test_a_run_leaves_what_the_design_says(finished: tuple[RunResult, list[str]]) -> None:
    folder = finished[0].folder
    assert {"recipe.yaml", "environment.json", "report.html", "report.md", "finetune", "variants", "export"} <= {
        path.name for path in folder.iterdir()
    }
    beside = {"calibration.json", "origin.json"}
    assert {path.name for path in (folder / "finetune").iterdir()} == LISTED | beside | {"training.json"}
    assert {path.name for path in (folder / "variants").iterdir()} == set(NAMES)
    for name in NAMES:
        held = {path.name for path in (folder / "variants" / name).iterdir()}
        assert held == LISTED | beside | {"record.json", "predictions.parquet", "README.md"}
    assert hidden(folder) == []


def test_the_recipe_beside_the_results_is_the_resolved_one(
    finished: tuple[RunResult, list[str]], content: dict[str, Any]
) -> None:
    folder = finished[0].folder
    assert load_recipe(folder / "recipe.yaml") == Recipe.model_validate(content)
    assert json.loads((folder / "environment.json").read_text())["libraries"]["torch"] == torch.__version__


def test_the_result_says_what_was_done(finished: tuple[RunResult, list[str]], shapes: Path) -> None:
    result, said = finished
    assert said[0] == f"finetune: lora on 32 images of {shapes}"
    assert re.fullmatch(r"finetune: 8 steps in \d+ s", said[1])
    assert said[2:] == [
        "variant fp32: 19 fp32",
        "variant nf4-skip: 12 nf4, 7 bf16",
        "variant nf4-fa2: the same weights as nf4-skip",
        "variant int8: 18 int8, 1 bf16",
        f"evaluate: 4 variants on 24 images of {shapes}",
    ]
    assert result.report == result.folder / "report.html" and result.export == result.folder / "export"


def test_records_are_complete_and_those_on_disk(finished: tuple[RunResult, list[str]]) -> None:
    result = finished[0]
    assert [record.variant.name for record in result.records] == list(NAMES)
    for record in result.records:
        assert load_record(result.folder / "variants" / record.variant.name) == record
        assert record.failure is None
        assert record.accuracy.images == 24 and record.dataset.split == "test"
        assert record.latency[0].iterations == 12
        assert record.size.disk_bytes > 0 and record.memory is not None
        assert (record.versus_baseline is None) == (record.variant.name == "fp32")
    plans = {record.variant.name: record.layer_plan for record in result.records}
    assert plans["fp32"] == {"fp32": 19} and plans["int8"] == {"int8": 18, "bf16": 1}
    assert plans["nf4-skip"] == plans["nf4-fa2"] == {"nf4": 12, "bf16": 7}


def test_the_fallback_of_flash_attention_is_recorded(finished: tuple[RunResult, list[str]]) -> None:
    variant = finished[0].records[2].variant
    assert (variant.asked["attention"], variant.ran["attention"]) == ("flash_attention_2", "sdpa")
    assert variant.reasons.get("attention") == "FlashAttention-2 needs a CUDA device"
    assert "flash_attention_2" in (finished[0].folder / "report.md").read_text()


def test_variants_of_one_checkpoint_share_its_weights_and_its_predictions(
    finished: tuple[RunResult, list[str]],
) -> None:
    variants = finished[0].folder / "variants"
    one, other = (load_predictions(variants / name) for name in ("nf4-skip", "nf4-fa2"))
    np.testing.assert_array_equal(one.logits, other.logits)
    assert (variants / "nf4-skip" / "model.safetensors").samefile(variants / "nf4-fa2" / "model.safetensors")
    assert not (variants / "nf4-skip" / "record.json").samefile(variants / "nf4-fa2" / "record.json")


def test_running_again_does_nothing_again(content: dict[str, Any], again: Path, finished: Any) -> None:
    before = times(again)
    result, said = run(content, again)
    assert said == [
        "finetune: up to date, skipped",
        *(f"variant {name}: up to date, skipped" for name in NAMES),
        "evaluate: up to date, skipped",
    ]
    assert times(again) == before
    assert result.records == finished[0].records


def test_another_skip_list_makes_that_variant_again_and_measures_it(content: dict[str, Any], again: Path) -> None:
    before = times(again)
    other = changed(content)
    other["variants"][2]["skip"] = ["block.2", "fc2"]
    result, said = run(other, again)
    assert said == [
        "finetune: up to date, skipped",
        "variant fp32: up to date, skipped",
        "variant nf4-skip: up to date, skipped",
        "variant nf4-fa2: 10 nf4, 9 bf16",
        "variant int8: up to date, skipped",
        said[-1],
    ]
    assert said[-1].startswith("evaluate: fp32, nf4-fa2 on 24 images") and "nf4-skip, int8 stand" in said[-1]
    assert written_again(before, again) == {"variants/nf4-fa2"}
    assert result.records[2].layer_plan == {"nf4": 10, "bf16": 9}


@pytest.mark.parametrize(
    ("change", "remade"),
    [
        ({"evaluate": {"latency": {"iterations": 8, "rounds": 2, "warmup_seconds": 0}, "end_to_end": False}}, set()),
        ({"baseline": "int8"}, set()),
        ({"seed": 1}, {"finetune", *(f"variants/{name}" for name in NAMES)}),
        (
            {"finetune": {"epochs": 1, "batch_size": 8, "targets": ["query"]}},
            {"finetune", *(f"variants/{name}" for name in NAMES)},
        ),
    ],
)
def test_what_depends_on_a_change_is_done_again_and_nothing_else(
    change: dict[str, Any], remade: set[str], content: dict[str, Any], again: Path
) -> None:
    before = times(again)
    result, said = run(changed(content, **change), again)
    assert written_again(before, again) == remade
    assert said[-1].startswith("evaluate: 4 variants")
    assert all(record.failure is None for record in result.records)


OTHER_GPU = {"name": "another GPU"}


def settled(recipe: Recipe) -> list[Settled]:
    base = open_checkpoint(recipe.model)
    return [Settled(variant, base) for variant in recipe.variants]


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr("vitopt.__version__", "99"),
        lambda patch: patch.setattr(machine, "code_digest", lambda: "other code"),
        lambda patch: patch.setattr(devices, "processor_name", lambda: "another processor"),
        lambda patch: patch.setattr(devices, "gpu_facts", lambda device: OTHER_GPU),
        lambda patch: patch.setattr(devices, "resolve_device", lambda name: torch.device("meta")),
        lambda patch: patch.setattr(machine, "threads_bound", lambda: "otherwise"),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 99),
        *(
            lambda patch, name=name: patch.setattr(machine, "versions", lambda: VERSIONS | {name: "99"})
            for name in VERSIONS
        ),
    ],
)
def test_figures_stand_only_where_and_with_what_they_were_measured(
    change: Callable[[pytest.MonkeyPatch], None],
    content: dict[str, Any],
    tmp_path: Path,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Recipe.model_validate(content)
    images = open_images(DataSpec(source=str(shapes)), None)

    def fingerprints() -> list[str]:
        made = dict.fromkeys(NAMES)
        found = rows.rows_of(RunFolder(tmp_path, print), recipe, images, settled(recipe), made)
        return [row.fingerprint for row in found.values()]

    before = fingerprints()
    assert fingerprints() == before
    change(monkeypatch)
    assert not set(fingerprints()) & set(before)


@pytest.mark.parametrize("main", [True, False])
def test_one_process_writes_and_tells_of_a_variant_that_failed(
    main: bool, content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.model_validate(changed(content, variants=content["variants"][:1], export=None))
    row = evaluator.failed("fp32", recipe.variants[0], "not here", torch.device("cpu"))
    monkeypatch.setattr(rows, "measure", lambda *_, **__: [row])
    monkeypatch.setattr(launch, "is_main_process", lambda: main)
    said: list[str] = []
    run_folder = RunFolder(tmp_path, said.append)
    with nullcontext() if main else pytest.raises(RecordError):  # the main process has written nothing here
        rows.measured_rows(run_folder, recipe, None, settled(recipe), {"fp32": "not here"})
    assert (tmp_path / "variants" / "fp32" / "record.json").exists() == main
    assert said[1:] == (["evaluate: fp32 failed: not here"] if main else [])


def test_other_test_images_are_measured_again(content: dict[str, Any], again: Path, shapes: Path) -> None:
    before = times(again)
    result, _ = run(changed(content, data={"source": str(shapes), "limit": 8}), again)
    assert written_again(before, again) == set()
    assert [record.accuracy.images for record in result.records] == [8] * 4
    assert [row.images for row in result.records[0].accuracy.classes] == [2] * 4


def test_changed_training_images_train_again(
    content: dict[str, Any], again: Path, shapes: Path, copy_of: Callable[[Path], Path]
) -> None:
    other = copy_of(shapes)
    (other / "train" / "cross" / "00.png").unlink()
    _, said = run(changed(content, data=str(other)), again)
    assert said[0].startswith("finetune: lora on 31 images")


@pytest.mark.parametrize(
    ("product", "remade"),
    [
        ("variants/int8", {"variants/int8"}),
        ("variants/nf4-skip", set()),  # nf4-fa2 holds the same weights, which are linked
        ("variants/int8/config.json", {"variants/int8"}),
        ("variants/int8/record.json", set()),
        ("finetune", {"finetune"}),  # the same inputs give the same weights, so the variants stand
    ],
)
def test_a_deleted_product_is_made_again(product: str, remade: set[str], content: dict[str, Any], again: Path) -> None:
    before = times(again)
    path = again / product
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    result, said = run(content, again)
    assert path.exists() and written_again(before, again) == remade
    assert [record.failure for record in result.records] == [None] * 4
    assert ("evaluate: up to date, skipped" in said) == (product == "finetune")


@pytest.mark.parametrize("folder", ["variants/int8", "finetune"])
def test_deleted_weights_are_made_again(folder: str, content: dict[str, Any], again: Path) -> None:
    (again / folder / "model.safetensors").unlink()
    run(content, again)
    assert (again / folder / "model.safetensors").is_file()


def test_deleted_twins_are_made_again(content: dict[str, Any], again: Path) -> None:
    for name in ("nf4-skip", "nf4-fa2"):
        shutil.rmtree(again / "variants" / name)
    result, _ = run(content, again)
    assert [record.failure for record in result.records] == [None] * 4


@pytest.mark.parametrize(
    ("name", "spoil", "stage"),
    [
        ("finetune/model.safetensors", "damaged", "finetune"),
        ("variants/int8/model.safetensors", "damaged", "variant int8"),
        ("variants/int8/preprocessor_config.json", "missing", "variant int8"),
        ("variants/int8/predictions.parquet", "damaged", "evaluate int8"),
    ],
)
def test_a_product_that_is_not_whole_is_made_again_and_said(
    name: str, spoil: str, stage: str, content: dict[str, Any], again: Path
) -> None:
    path = again / name
    size = path.stat().st_size
    path.unlink() if spoil == "missing" else os.truncate(path, size // 2)
    result, said = run(content, again)
    assert f"{stage}: again, because {name} is {spoil}" in said
    assert all(f"{other}: up to date, skipped" in said for other in ("finetune", "variant fp32") if other != stage)
    assert [record.failure for record in result.records] == [None] * 4
    assert path.is_file() and (path.suffix != ".safetensors" or path.stat().st_size == size)


def test_cut_weights_are_never_exported(content: dict[str, Any], again: Path) -> None:
    exported, made = again / "export" / "model.safetensors", again / "variants" / "nf4-skip" / "model.safetensors"
    size = made.stat().st_size
    exported.unlink()
    os.link(made, exported)  # as the run leaves it: to cut one is to cut both
    os.truncate(exported, 1000)
    _, said = run(content, again)
    assert "variant nf4-skip: again, because variants/nf4-skip/model.safetensors is damaged" in said
    assert exported.stat().st_size == made.stat().st_size == size
    exported.unlink()
    exported.write_bytes(b"cut")
    assert run(content, again)[1][-1] == "evaluate: up to date, skipped"
    assert exported.samefile(made) and made.stat().st_size == size


@pytest.mark.parametrize("change", ["corrupt", "older schema"])
def test_a_record_that_cannot_be_read_is_measured_again(change: str, content: dict[str, Any], again: Path) -> None:
    path = again / "variants" / "int8" / "record.json"
    text = path.read_text()
    # of the same length, so that only reading it can tell
    path.write_text("x" + text[1:] if change == "corrupt" else text.replace(SCHEMA, SCHEMA[:-1] + "0"))
    result, said = run(content, again)
    (line,) = [line for line in said if line.startswith("evaluate int8: again, because ")]
    assert str(path) in line and "measure again" in line
    assert load_record(path) == result.records[3] and result.report is not None


def test_a_broken_record_of_a_variant_that_left_the_recipe_is_nobodys_business(
    content: dict[str, Any], again: Path
) -> None:
    (again / "variants" / "int8" / "record.json").write_text("{")
    result, _ = run(changed(content, variants=content["variants"][:3]), again)
    assert [record.variant.name for record in result.records] == list(NAMES[:3]) and result.report is not None


def test_a_skip_list_that_cannot_be_read_is_chosen_again(content: dict[str, Any], tmp_path: Path) -> None:
    first, _ = run(with_auto(content), tmp_path / "run")
    path = tmp_path / "run" / "sensitivity" / "auto.json"
    path.write_text("x" + path.read_text()[1:])
    second, said = run(with_auto(content), tmp_path / "run")
    assert said[0].startswith("sensitivity auto: again, because ") and str(path) in said[0]
    assert second.records[1].variant.skip == first.records[1].variant.skip


def test_a_recipe_that_says_the_same_keeps_its_comments(content: dict[str, Any], again: Path) -> None:
    path = again / "recipe.yaml"
    path.write_text(f"# why I did this\n{path.read_text()}")
    assert run(content, again)[1][-1] == "evaluate: up to date, skipped"
    assert path.read_text().startswith("# why I did this\n")
    run(changed(content, variants=content["variants"][:3]), again)
    assert len(load_recipe(path).variants) == 3


def test_notes_beside_products_are_kept_and_inside_refused_before_the_work(
    content: dict[str, Any], again: Path, no_training: None
) -> None:
    (again / "notes.txt").write_text("mine")
    assert run(content, again)[1][-1] == "evaluate: up to date, skipped"
    assert (again / "notes.txt").read_text() == "mine"
    for place in ("finetune", "variants/int8", "export"):
        (again / place / "notes.txt").write_text("mine")
        with pytest.raises(StorageError, match=rf"{again / place} holds notes.txt"):
            run(changed(content, seed=1), again)
        assert (again / place / "notes.txt").read_text() == "mine"
        (again / place / "notes.txt").unlink()


def test_a_file_of_the_user_in_a_variant_that_can_no_longer_be_made_is_kept(
    content: dict[str, Any], again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any, **__: Any) -> None:
        (again / "variants" / "int8" / "notes.txt").write_text("mine")  # while the run is going on
        raise UnsupportedError("not here")

    monkeypatch.setattr(variants, "make", cannot)
    other = changed(content)
    other["variants"][3]["skip"] = ["block.2"]
    with pytest.raises(StorageError, match=r"int8 holds notes.txt"):
        run(other, again)
    assert (again / "variants" / "int8" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("broken", ["", "[1, 2]", '{"finetune": "x", "variant fp'])
def test_a_broken_list_of_stages_costs_time_and_nothing_else(broken: str, content: dict[str, Any], again: Path) -> None:
    (again / pipeline.STAGES_FILE).write_text(broken)
    plain = changed(content, variants=content["variants"][:1], export=None)
    plain.pop("finetune")
    result, said = run(plain, again)
    assert said[0] == "variant fp32: 19 fp32" and result.records[0].failure is None


def with_fp8(content: dict[str, Any]) -> dict[str, Any]:
    plain = changed(content)
    plain.pop("finetune")
    fp8 = {"name": "fp8", "format": "fp8", "attention": "eager"}
    return plain | {"variants": [plain["variants"][0], fp8, plain["variants"][3]], "export": "int8"}


@pytest.fixture(scope="module")
def with_failure(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[str]]:
    return run(with_fp8(content), tmp_path_factory.mktemp("runs") / "with-fp8")


def test_a_variant_that_cannot_run_here_has_a_row_and_the_others_finish(
    with_failure: tuple[RunResult, list[str]],
) -> None:
    result, said = with_failure
    reason = result.records[1].failure
    assert reason is not None and reason.startswith("format fp8 cannot run on cpu:")
    assert reason.endswith("the nearest that can is w8a8")
    assert [record.failure for record in (result.records[0], result.records[2])] == [None, None]
    assert result.records[2].versus_baseline is not None
    assert f"variant fp8: {reason}" in said
    assert [path.name for path in (result.folder / "variants" / "fp8").iterdir()] == ["record.json"]
    assert "fp8 cannot run on cpu" in (result.folder / "report.md").read_text()
    assert result.export is not None and (result.export / "model.safetensors").is_file()
    assert hidden(result.folder) == []


def test_a_failed_variant_does_not_keep_the_others_from_standing(
    content: dict[str, Any], with_failure: tuple[RunResult, list[str]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(with_failure[0].folder, tmp_path / "run"))
    before = times(folder)
    result, said = run(with_fp8(content), folder)
    assert said[-1] == "evaluate: up to date, skipped"
    assert times(folder) == before
    assert result.records == with_failure[0].records


@pytest.mark.parametrize(("require", "exported"), [({"max_megabytes": 1000}, True), ({"max_megabytes": 0.001}, False)])
def test_the_recommended_variant_is_exported(
    content: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, require: dict[str, Any], exported: bool
) -> None:
    brief = changed(content, variants=content["variants"][:2], require=require, prefer="size", finetune=None)
    result, said = run(brief | {"export": "best"}, tmp_path / "run")
    assert result.recommendation is not None and (result.recommendation.ship is not None) is exported
    written = json.loads((result.folder / "recommendation.json").read_text())
    assert written["ship"] == result.recommendation.ship and written["line"] == result.recommendation.line
    assert result.recommendation.line[1:] in (result.folder / "report.md").read_text()
    assert (result.folder / "export").is_dir() is exported
    if exported:
        exported_plan = json.loads((result.export / "record.json").read_text())["variant"]["name"]
        assert exported_plan == result.recommendation.ship
        name = brief["variants"][1]["name"]
        run(brief | {"export": name, "require": {"max_megabytes": 0.001}}, tmp_path / "run")
        assert any(name in line and "weights at most 0.001 MB" in line for line in caplog.messages)
    else:
        assert any(line.startswith("export: left out") for line in said)


def test_a_variant_that_fails_cannot_be_exported(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot export fp8: format fp8 cannot run on cpu"):
        run(with_fp8(content) | {"export": "fp8"}, tmp_path / "run")
    # the rest of the run is there all the same
    assert (tmp_path / "run" / "report.html").is_file()
    assert load_record(tmp_path / "run" / "variants" / "int8").failure is None


def test_no_variant_that_can_run_is_an_error(content: dict[str, Any], tmp_path: Path) -> None:
    only = with_fp8(content)
    only |= {"variants": [only["variants"][1]], "baseline": None, "export": None}
    with pytest.raises(UnsupportedError, match=r"no variant can run here: fp8: format fp8 cannot run on cpu"):
        run(only, tmp_path / "run")


def test_an_interruption_keeps_what_was_complete(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitopt.optimize import quantize as module

    save = module.save_checkpoint

    def interrupted(model: Any, processor: Any, folder: Path) -> None:
        save(model, processor, folder)
        if "int8" in folder.name:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(content, folder)
    assert hidden(folder) == []
    assert {path.name for path in (folder / "variants").iterdir()} == {"fp32", "nf4-skip", "nf4-fa2"}
    result, said = run(content, folder)
    assert said[:4] == [
        "finetune: up to date, skipped",
        *(f"variant {name}: up to date, skipped" for name in ("fp32", "nf4-skip", "nf4-fa2")),
    ]
    assert [record.failure for record in result.records] == [None] * 4


def test_an_interruption_while_measuring_keeps_the_checkpoints(
    content: dict[str, Any], again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = times(again)
    other = changed(content, evaluate=content["evaluate"] | {"batch_size": 5})
    with monkeypatch.context() as patch:
        patch.setattr(rows, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(other, again)
    assert times(again) == before and hidden(again) == []
    _, said = run(other, again)
    assert said[-1].startswith("evaluate: 4 variants")


# Runs the code of a model card with nothing but transformers.
PLAIN = """
import sys
sys.modules["kernels"] = None  # bitsandbytes would ask the network for CPU kernels
exec(sys.stdin.read())
assert not [name for name in sys.modules if name.split(".")[0] == "vitopt"], "vitopt was imported"
"""


def test_the_export_has_a_card_whose_code_runs_without_vitopt(
    finished: tuple[RunResult, list[str]], shapes: Path, tmp_path: Path
) -> None:
    result = finished[0]
    assert {path.name for path in result.export.iterdir()} >= CHECKPOINT | {"README.md", "record.json"}
    card = (result.export / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-classification"
    for name in NAMES:
        assert f"| {name} |" in card
    assert "12 nf4" in card and "7 bf16" in card and "bitsandbytes" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "FOLDER" in code and "vitopt" not in code

    image = shapes / "test" / "cross" / "00.png"
    shutil.copy(image, tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN],
        input=code.replace("FOLDER", str(result.export)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=dict(os.environ, HF_HUB_OFFLINE="1"),
    )
    assert done.returncode == 0, done.stderr
    guesses = {guess["label"]: guess["score"] for guess in eval(done.stdout)}
    (ours,) = predict(str(result.export), [image], top=4, device="cpu")
    assert guesses == pytest.approx({c["label"]: c["percent"] / 100 for c in ours["classes"]}, abs=5e-3)


def test_no_card_and_no_origin_holds_a_local_path(finished: tuple[RunResult, list[str]], shapes: Path) -> None:
    folder = finished[0].folder
    files = [*folder.rglob("README.md"), *folder.rglob("origin.json")]
    assert len(files) == 2 * len(NAMES) + 3
    for file in files:
        assert str(folder) not in file.read_text() and str(shapes.parent) not in file.read_text()


def test_cards_that_were_edited_stay(content: dict[str, Any], again: Path) -> None:
    cards = [again / "variants" / "nf4-skip" / "README.md", again / "export" / "README.md"]
    for card in cards:
        text = card.read_text()
        card.unlink()  # as editors do: they are links to one file
        card.write_text(f"{text}\nWritten by hand in {card.parent.name}.\n")
    others = [one | {"skip": ["block.2"]} if "skip" in one else one for one in content["variants"]]
    for asked in (content["variants"], others):
        run(changed(content, variants=asked), again)
        for card in cards:
            assert card.read_text().endswith(f"Written by hand in {card.parent.name}.\n")
    assert "block.2" in (again / "variants" / "nf4-skip" / "origin.json").read_text()


def test_the_card_of_each_variant_is_about_that_variant(finished: tuple[RunResult, list[str]]) -> None:
    for name in NAMES:
        card = (finished[0].folder / "variants" / name / "README.md").read_text()
        assert f"# {name}\n" in card


def test_a_variant_that_left_the_recipe_leaves_the_report(content: dict[str, Any], again: Path) -> None:
    result, _ = run(changed(content, variants=content["variants"][:3]), again)
    assert [record.variant.name for record in result.records] == list(NAMES[:3])
    assert "int8" not in (again / "report.md").read_text()


def test_images_that_train_and_test_are_warned_of(
    content: dict[str, Any], shapes: Path, copy_of: Callable[[Path], Path], tmp_path: Path, caplog: Any
) -> None:
    folder = copy_of(shapes)
    for name in ("00.png", "01.png"):
        shutil.copy(folder / "train" / "circle" / name, folder / "test" / "circle" / f"again-{name}")
    one = changed(content, data=str(folder), variants=content["variants"][:1], export=None)
    with caplog.at_level(logging.WARNING):
        result, _ = run(one, tmp_path / "run")
    assert "2 test images are also training images; accuracy will look better than it is" in caplog.messages
    record = result.records[0]
    assert record.dataset is not None
    overlap = next(overlap for overlap in record.dataset.overlaps if overlap.where == "training")
    assert overlap.same == 2 and overlap.examples[0] == "circle/again-00.png is circle/00.png"
    (warning,) = [line for line in record.warnings if "training images" in line]
    assert warning in cautions(result.records)
    assert "are training images of this checkpoint" in (tmp_path / "run" / "report.md").read_text()
    assert "are training images of this checkpoint" in (tmp_path / "run" / "report.html").read_text()


def test_data_without_splits_is_divided_once(content: dict[str, Any], shapes: Path, tmp_path: Path) -> None:
    one = changed(content, data=str(shapes / "train"), variants=content["variants"][:1], export=None)
    result, said = run(one, tmp_path / "run")
    # 8 images of each class: a fifth of them, rounded down, tests
    assert said[0].startswith("finetune: lora on 28 images")
    assert result.records[0].dataset.split == "test" and result.records[0].accuracy.images == 4


# What can be refused is refused before the first long stage.


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitopt.training import finetune as training

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("the training was started")

    monkeypatch.setattr(training, "finetune", started)


def test_all_wrong_patterns_are_told_at_once_before_anything_runs(
    content: dict[str, Any], tmp_path: Path, no_training: None
) -> None:
    wrong = changed(content)
    wrong["finetune"]["targets"] = ["query", "dense"]
    wrong["variants"][1]["skip"] = ["block.21"]
    wrong["variants"][3]["layers"] = {"encoder.layer.0": "bf16"}
    with pytest.raises(RecipeError) as caught:
        run(wrong, tmp_path / "run")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("variant nf4-skip: pattern 'block.21' matches no layer")
    assert lines[1].startswith("variant int8: pattern 'encoder.layer.0' matches no layer")
    assert lines[2].startswith("finetune.targets: pattern 'dense' matches no layer")
    assert all("block.0 to block.2" in line for line in lines)
    assert not (tmp_path / "run").exists()


def test_formats_that_cannot_be_mixed_are_refused_before_the_training(
    content: dict[str, Any], tmp_path: Path, no_training: None
) -> None:
    wrong = changed(content)
    wrong["variants"][1]["layers"] = {"block.0.fc1": "w8a8"}
    with pytest.raises(RecipeError, match="formats nf4 and w8a8 cannot be mixed in one checkpoint"):
        run(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_formats_that_cannot_be_mixed_are_told_with_the_other_mistakes(content: dict[str, Any]) -> None:
    wrong = changed(content)
    wrong["variants"][1]["layers"] = {"block.0.fc1": "w8a8"}
    wrong["variants"][3]["skip"] = ["block.9"]
    with pytest.raises(RecipeError) as caught:
        plans(Recipe.model_validate(wrong))
    first, second = str(caught.value).splitlines()
    assert first.startswith("variant nf4-skip: formats nf4 and w8a8 cannot be mixed")
    assert second.startswith("variant int8: pattern 'block.9' matches no layer")


def test_labels_that_do_not_fit_are_refused_before_anything_is_written(
    content: dict[str, Any], shapes: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copy_of(shapes)
    (folder / "test" / "cross").rename(folder / "test" / "plus")
    plain = changed(content, data=str(folder))
    plain.pop("finetune")
    with pytest.raises(
        DataError, match=r"has the class 'plus', which the model's head does not know \(4 classes: circle"
    ):
        run(plain, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_test_classes_that_are_not_trained_are_refused_before_the_training(
    content: dict[str, Any], shapes: Path, copy_of: Callable[[Path], Path], tmp_path: Path, no_training: None
) -> None:
    folder = copy_of(shapes)
    (folder / "test" / "cross").rename(folder / "test" / "plus")
    with pytest.raises(DataError, match="has the class 'plus'"):
        run(changed(content, data=str(folder)), tmp_path / "run")


def test_strict_attention_is_refused_before_the_training(
    content: dict[str, Any], tmp_path: Path, no_training: None
) -> None:
    with pytest.raises(UnsupportedError, match="flash_attention_2 cannot run: FlashAttention-2 needs a CUDA device"):
        run(changed(content, strict=True), tmp_path / "run")


def test_a_strict_kernel_is_refused_before_the_training(
    content: dict[str, Any], tmp_path: Path, no_training: None
) -> None:
    wanted = {"name": "fast", "format": "bf16", "sdpa_kernel": "cudnn"}
    strict = changed(content, strict=True, variants=[content["variants"][0], wanted], export=None)
    with pytest.raises(UnsupportedError, match="fast: sdpa kernel cudnn cannot run: the cudnn kernel needs a CUDA dev"):
        run(strict, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_strict_refuses_attention_that_cannot_run(content: dict[str, Any], again: Path) -> None:
    with pytest.raises(UnsupportedError, match="nf4-fa2: flash_attention_2 cannot run: FlashAttention-2 needs a CUDA"):
        run(changed(content, strict=True, baseline="int8"), again)


def test_missing_data_is_refused_before_anything_is_written(
    content: dict[str, Any], tmp_path: Path, no_training: None
) -> None:
    with pytest.raises(DataError, match=r"no data at /nowhere: the folder does not exist"):
        run(changed(content, data="/nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_refused_before_anything_is_written(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at /nowhere: the folder does not exist"):
        run(changed(content, model="/nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Plans, measuring, predictions


def test_plans_need_shapes_only(content: dict[str, Any]) -> None:
    large = changed(content, model="random:vit-large-patch16-224")
    large["variants"][1]["skip"] = ["block.21"]
    large["finetune"]["targets"] = ["block.0-23.query"]
    found = plans(Recipe.model_validate(large | {"data": "/nowhere"}))
    assert list(found) == list(NAMES)
    assert found["nf4-skip"].counts() == {"nf4": 138, "bf16": 7}
    assert found["int8"].counts() == {"int8": 144, "bf16": 1}


def test_models_with_other_classes_are_not_measured_together(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path]
) -> None:
    from vitopt.data.images import open_images
    from vitopt.recipe import DataSpec, EvaluateSpec

    def together(one: Path, other: Path) -> None:
        images = open_images(DataSpec(source=str(shapes)), "test")
        inference.measure(
            [inference.Candidate("a", str(one)), inference.Candidate("b", str(other))],
            EvaluateSpec(),
            images=images,
            device="cpu",
        )

    other = copy_of(tiny_checkpoint)
    config = json.loads((other / "config.json").read_text())
    names = ["round", "cross", "square", "stripe"]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"have different classes, so they cannot be compared"):
        together(tiny_checkpoint, other)


def test_classes_of_other_names_are_trained_again(
    content: dict[str, Any], shapes: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copy_of(shapes)
    one = changed(content, data=str(folder), variants=content["variants"][:1], export=None)
    run(one, tmp_path / "run")
    for split in ("train", "test"):
        (folder / split / "stripe").rename(folder / split / "stripes")  # the same images in the same order
    result, said = run(one, tmp_path / "run")
    assert "finetune: up to date, skipped" not in said
    assert open_checkpoint(str(result.folder / "finetune")).label_names[3] == "stripes"


def test_random_weights_may_guess_and_a_model_of_theirs_may_not(tmp_path: Path) -> None:
    content = {
        "name": "guess",
        "model": "random:vit-tiny-patch16-32",
        "data": {"source": "digits", "labels": "index", "limit": 40},
        "device": "cpu",
        "variants": [{"name": "fp32", "format": "fp32"}],
        "evaluate": {"latency": {"iterations": 2, "rounds": 2, "warmup_seconds": 0}, "end_to_end": False},
    }
    result, _ = run(content, tmp_path / "run")
    assert any("no better than guessing" in line for line in result.records[0].warnings)
    saved = str(result.folder / "variants" / "fp32")
    with pytest.raises(MeasurementError, match=r"^fp32 is right on \d of 40 images, no better than guessing"):
        run(content | {"model": saved}, tmp_path / "again")
    speed = run(content | {"model": saved, "data": None}, tmp_path / "speed")[0]
    assert speed.records[0].latency and speed.records[0].accuracy is None


# Skip lists that are chosen


def with_auto(content: dict[str, Any], **auto: Any) -> dict[str, Any]:
    plain = changed(content)
    plain.pop("finetune")
    settings = {"max_top1_drop": None, "max_kl_share": 0.9, "images": 16} | auto
    chosen = {"name": "auto", "format": "nf4", "skip": "auto", "auto": settings}
    return plain | {"variants": [plain["variants"][0], chosen], "export": "auto"}


def test_a_skip_list_is_chosen_on_training_images_and_stands(content: dict[str, Any], tmp_path: Path) -> None:
    result, said = run(with_auto(content), tmp_path / "run")
    assert "sensitivity auto: nf4 on 16 calibration images" in said
    record = result.records[1]
    assert record.variant.skip and "auto" not in record.variant.skip
    assert [(one.name, one.decision) for one in record.requirements] == [("auto.max_kl_share", "undecided")]
    assert f"sensitivity auto: keeps {', '.join(record.variant.skip)} in 16 bit" in said
    kept = {name for name, format in record.layers.items() if format == "bf16"} - {"classifier"}
    assert {name.rsplit(".", 1)[0] for name in kept} == set(record.variant.skip)
    assert (tmp_path / "run" / "sensitivity" / "auto.json").is_file()
    assert "Which layers must stay in 16 bit" in (tmp_path / "run" / "report.html").read_text()
    _, again = run(with_auto(content), tmp_path / "run")
    assert "sensitivity auto: up to date, skipped" in again and "evaluate: up to date, skipped" in again


def test_a_chosen_variant_keeps_the_hashes_of_its_calibration_images(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = with_auto(content)
    chosen = recipe["variants"][1]
    recipe["variants"] = [*recipe["variants"], chosen | {"name": "again", "attention": "eager"}]
    _, said = run(recipe, tmp_path / "run")
    assert "sensitivity again: the same as of auto" in said
    images = open_images(DataSpec(source=recipe["data"], limit=16), "train")
    folders = [tmp_path / "run" / "variants" / name for name in ("auto", "again")] + [tmp_path / "run" / "export"]
    assert [calibration_hashes(folder) for folder in folders] == [set(images.image_hashes)] * 3
    assert "variant again: the same weights as auto" in said
    first = tmp_path / "run" / "variants" / recipe["variants"][0]["name"]
    assert calibration_hashes(first) == set()


@pytest.mark.parametrize(("floor", "decision", "word"), [(99.0, "shown", "met"), (0.001, "undecided", "not shown")])
def test_a_floor_is_judged_on_the_tested_images(
    content: dict[str, Any], tmp_path: Path, floor: float, decision: str, word: str
) -> None:
    result, _ = run(with_auto(content, max_top1_drop=floor, max_kl_share=None), tmp_path / "run")
    reference, chosen = result.records
    assert reference.requirements == ()
    assert [(one.name, one.decision) for one in chosen.requirements] == [("auto.max_top1_drop", decision)]
    assert load_record(tmp_path / "run" / "variants" / "auto").requirements == chosen.requirements
    required = f"floor of skip: auto: loss of top-1 at most {floor:g} points"
    lines = [line for line in (result.folder / "report.md").read_text().splitlines() if required in line]
    assert any(word in line for line in lines)


def test_calibration_images_are_never_test_images(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibration images are also test images"):
        run(with_auto(content, split="test"), tmp_path / "run")


def test_a_plan_without_weights_leaves_an_automatic_skip_list_open(content: dict[str, Any]) -> None:
    plan = plans(Recipe.model_validate(with_auto(content)))["auto"]
    assert plan.counts() == {"nf4": 18, "bf16": 1}


# Speed, size and memory alone


@pytest.fixture(scope="module")
def without_data() -> dict[str, Any]:
    """A recipe for random weights, and nothing to look at."""
    return {
        "name": "speed",
        "model": "random:vit-tiny-patch16-32",
        "device": "cpu",
        "variants": [
            {"name": "fp32", "format": "fp32"},
            {"name": "nf4", "format": "nf4", "skip": ["block.1"]},
            {"name": "nf4-as-bf16", "format": "nf4", "skip": ["block.1"], "run_as": "bf16", "fuse_qkv": True},
            {"name": "math", "format": "fp32", "sdpa_kernel": "math"},
        ],
        "evaluate": {"latency": {"iterations": 4, "rounds": 2, "warmup_seconds": 0}},
    }


@pytest.fixture(scope="module")
def timed(without_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[str]]:
    return run(without_data, tmp_path_factory.mktemp("runs") / "speed")


def test_without_data_speed_and_size_are_measured_alone(timed: tuple[RunResult, list[str]]) -> None:
    result, said = timed
    assert said == [
        "variant fp32: 73 fp32",
        "variant nf4: 66 nf4, 7 bf16",
        "variant nf4-as-bf16: the same weights as nf4",
        "variant math: the same weights as fp32",
        "evaluate: 4 variants on random pixels",
    ]
    for record in result.records:
        assert record.failure is None and load_record(result.folder / "variants" / record.variant.name) == record
        assert [row.iterations for row in record.latency] == [4]
        assert (record.latency[0].speedup_vs_baseline is None) == (record.variant.name == "fp32")
        assert record.size.disk_bytes > 0 and record.memory is not None
        assert record.accuracy is record.versus_baseline is record.dataset is None and record.end_to_end == ()
    assert not list(result.folder.rglob("predictions.parquet"))
    assert not (result.folder / "finetune").exists()
    assert load_recipe(result.folder / "recipe.yaml").data is None


def test_ways_to_run_are_in_the_records_of_a_run(timed: tuple[RunResult, list[str]]) -> None:
    packed, expanded, plain = timed[0].records[1:]
    assert packed.layer_plan == {"nf4": 66, "bf16": 7} and packed.variant.stored_format is None
    assert expanded.layer_plan == {"bf16": 73}
    assert (expanded.variant.format, expanded.variant.stored_format) == ("bf16", "nf4")
    assert (expanded.variant.ran["fuse_qkv"], packed.variant.ran["fuse_qkv"]) == (True, False)
    assert expanded.size.disk_bytes == packed.size.disk_bytes
    assert expanded.size.weight_bytes > packed.size.weight_bytes
    assert (plain.variant.asked["sdpa_kernel"], plain.variant.ran.get("sdpa_kernel")) == ("math", "math")


def test_without_data_the_report_is_written_all_the_same(timed: tuple[RunResult, list[str]]) -> None:
    result = timed[0]
    page, summary = (result.folder / name for name in ("report.html", "report.md"))
    assert result.report == page and page.stat().st_size > 10_000
    assert all(name in summary.read_text() for name in ("fp32", "nf4", "nf4-as-bf16"))
    assert (result.folder / "variants" / "nf4" / "README.md").is_file()


def test_without_data_a_run_stands_too(
    without_data: dict[str, Any], timed: tuple[RunResult, list[str]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(timed[0].folder, tmp_path / "speed"))
    before = times(folder)
    result, said = run(without_data, folder)
    assert said[-1] == "evaluate: up to date, skipped" and times(folder) == before
    assert result.records == timed[0].records


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        (("jinja2", "matplotlib", "pyarrow"), "jinja2 and matplotlib and pyarrow"),
        (("matplotlib",), "matplotlib"),
    ],
)
def test_without_the_packages_of_the_report_it_is_left_out_in_one_line(
    absent: tuple[str, ...],
    named: str,
    without_data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = support.installed
    monkeypatch.setattr(support, "installed", lambda name: name not in absent and installed(name))
    one = changed(without_data, variants=without_data["variants"][:1])
    result, said = run(one, tmp_path / "run")
    folder = tmp_path / "run"
    assert [line for line in said if line.startswith("report")] == [
        f"report: left out, {named} not installed; `vitopt report {folder}` writes it"
    ]
    assert load_record(folder / "variants" / "fp32") == result.records[0]
    assert result.report is None
    assert not (folder / "report.html").exists() and not (folder / "report.md").exists()
    assert {path.name for path in (folder / "variants" / "fp32").iterdir()} == LISTED | {"record.json", "origin.json"}


def test_a_variant_that_overflows_fails_alone(
    content: dict[str, Any], copy_of: Callable[[Path], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_checkpoint)
    model = load_model(open_checkpoint(str(folder)))
    with torch.no_grad():
        model.vit.layers[0].mlp.fc2.weight.mul_(3e5)
    model.save_pretrained(folder)
    variants = [{"name": format, "format": format} for format in ("fp32", "fp16")]
    bare = changed(content, model=str(folder), variants=variants, finetune=None, export=None)
    result, _ = run(bare, tmp_path / "run")
    assert result.records[0].failure is None
    assert "overflow fp16" in str(result.records[1].failure)
    assert not (tmp_path / "run" / "variants" / "fp16" / "model.safetensors").exists()


def test_a_model_that_cannot_be_trained_is_refused_with_the_plan(
    content: dict[str, Any], make_family: Callable[..., Checkpoint]
) -> None:
    with_teacher = make_family("deit", with_teacher=True)
    with pytest.raises(RecipeError, match=r"finetune: .*WithTeacher for inference only"):
        plans(Recipe.model_validate(changed(content, model=with_teacher.source)))


def test_strict_refuses_an_attention_that_the_family_lacks(
    content: dict[str, Any], make_family: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    strict = changed(content, model=make_family("swinv2").source, strict=True)
    with pytest.raises(UnsupportedError, match=r"fp32: sdpa cannot run: .*Swinv2.*drop --strict to use eager"):
        run(strict, tmp_path / "run")
    assert not (tmp_path / "run" / "finetune").exists()


def test_an_interrupted_evaluation_keeps_what_was_measured_and_counts_as_undone(
    content: dict[str, Any], again: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: load_record(again / "variants" / name) for name in NAMES}

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluator, "peak_memory", interrupted)
    latency = {"iterations": 8, "rounds": 2, "warmup_seconds": 0}
    other = changed(content, evaluate={"latency": latency, "end_to_end": False})
    with pytest.raises(KeyboardInterrupt):
        run(other, again)
    for name in NAMES:
        record = load_record(again / "variants" / name)
        assert record.measured_together != before[name].measured_together
        assert record.accuracy == before[name].accuracy and record.latency[0].iterations == 8
    # Neither recipe may take these records for its own.
    noted = json.loads((again / "stages.json").read_text())
    assert noted and not any(name.startswith("evaluate") for name in noted)


def test_what_a_recipe_requires_is_decided_for_every_variant_and_told_everywhere(
    content: dict[str, Any], again: Path
) -> None:
    before = {name: load_record(again / "variants" / name) for name in NAMES}
    assert all(record.requirements == () for record in before.values())
    require = {"max_top1_drop": 0.5, "max_megabytes": 99, "max_kl": 100}
    result, said = run(changed(content, require=require), again)
    assert "evaluate: up to date, skipped" in said  # what is required changes no measurement
    decided = {
        record.variant.name: {one.name: one.decision for one in record.requirements} for record in result.records
    }
    few = {"max_top1_drop": "undecided", "max_kl": "undecided", "max_megabytes": "shown"}  # 24 images show nothing
    assert decided == {"fp32": {}} | dict.fromkeys(NAMES[1:], few)
    stored = [load_record(again / "variants" / name) for name in NAMES]
    assert stored == result.records
    report = (again / "report.md").read_text()
    assert "| required |" in report.replace("  ", " ") and "not shown" in report
    assert "loss of top-1 at most 0.5 points" in report
    assert "loss of top-1 at most 0.5 points" in (again / "report.html").read_text()
    run(content, again)  # without them, nothing is decided
    assert [load_record(again / "variants" / name) for name in NAMES] == list(before.values())
