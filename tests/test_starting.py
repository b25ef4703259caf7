"""The first recipe that `vitopt init` prints: it loads, plans, and fits the model, the data and the device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
import yaml
from conftest import make_images
from PIL import Image

from vitopt import pipeline, starting
from vitopt.checks import plans
from vitopt.environment import devices, support
from vitopt.errors import CheckpointError, DataError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.preview import Preview
from vitopt.recipe import Recipe
from vitopt.recipe_file import load_recipe
from vitopt.starting import starting_recipe

CPU = torch.device("cpu")
# A compiler on a machine without Python's headers.
NO_HEADERS = """#!/bin/sh
[ "$1" = --version ] && exit
echo "<stdin>:1:10: fatal error: Python.h: No such file" >&2
exit 1
"""
A_COMPILER = support.why_not_compile(CPU) is None


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows whether or not another runtime is installed."""
    monkeypatch.setattr(support, "why_not_engine", lambda engine, device: f"{engine} is not installed")


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the calls that are timed for the estimate."""
    monkeypatch.setattr(starting, "preview", lambda recipe: Preview([], [], []))


def written(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "recipe.yaml", overrides)


def rows(text: str) -> dict[str, dict[str, Any]]:
    return {variant["name"]: variant for variant in yaml.safe_load(text)["variants"]}


def test_a_first_recipe_runs_and_recommends(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "why_not_compile", lambda device: "tests of compilation are elsewhere")
    text = starting_recipe(str(tiny_checkpoint), str(shapes), "mine")
    assert "about 1 min here" in text and "nothing is fine-tuned" in text
    quick = "evaluate.latency.iterations=4", "evaluate.latency.warmup_seconds=0.1", "evaluate.look_alikes=false"
    recipe = written(tmp_path, text, *quick, "require.min_speedup=0.001", "require.max_top1_drop=99")
    result = pipeline.run(recipe, tmp_path / "run")
    assert [record.variant.name for record in result.records] == ["fp32", "bf16", "nf4"]
    assert [record.failure for record in result.records] == [None] * 3
    assert result.recommendation is not None and result.recommendation.ship in ("bf16", "nf4")
    assert result.exported is not None and result.exported.variant.name == result.recommendation.ship


@pytest.mark.skipif(not A_COMPILER, reason="needs a C++ compiler")
@pytest.mark.usefixtures("untimed")
def test_a_first_recipe_compiles_where_a_compiler_is(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "resolve_device", lambda requested="auto": CPU)
    monkeypatch.setattr(devices, "computes_in_bf16", lambda device: True)
    text = starting_recipe(str(tiny_checkpoint), str(shapes), "mine")
    recipe = written(tmp_path, text)
    assert (recipe.name, recipe.model) == ("mine", str(tiny_checkpoint))
    assert recipe.data is not None and recipe.data.source == str(shapes)
    assert recipe.finetune is None and (recipe.baseline, recipe.prefer, recipe.export) == ("fp32", "latency", "best")
    assert set(plans(recipe)) == {"fp32", "bf16", "bf16-compiled", "w8a8-compiled", "nf4", "nf4-as-bf16"}
    assert {row.name for row in recipe.variants if row.compile} == {"bf16-compiled", "w8a8-compiled", "nf4-as-bf16"}
    assert "# Left out: fp8-compiled (fp8 arithmetic needs a CUDA device" in text


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("reason", [None, "no bf16 arithmetic"])
def test_an_engine_that_is_installed_has_its_rows(
    reason: str | None, tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "resolve_device", lambda requested="auto": CPU)
    text = starting_recipe(str(tiny_checkpoint), str(shapes), "mine")
    assert "openvino" not in rows(text) and "# Left out: openvino-int8 (openvino is not installed)" in text
    monkeypatch.setattr(support, "why_not_engine", lambda engine, device: None)
    monkeypatch.setattr(starting, "engine_module", lambda name: SimpleNamespace(why_not=lambda format: reason))
    text = starting_recipe(str(tiny_checkpoint), str(shapes), "mine")
    of_engine = {name: row for name, row in rows(text).items() if row.get("engine") == "openvino"}
    assert of_engine["openvino-int8"]["format"] == "w8a8"
    assert ("openvino-bf16" in of_engine) == (reason is None) and ("no bf16 arithmetic" in text) == bool(reason)
    assert set(plans(written(tmp_path, text))) == set(rows(text))


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("script, reason", [(None, "no C++ compiler"), (NO_HEADERS, "c++ does not compile Python.h")])
def test_what_cannot_be_compiled_is_left_out_with_the_reason(
    script: str | None,
    reason: str,
    tiny_checkpoint: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "resolve_device", lambda requested="auto": CPU)
    monkeypatch.setattr(devices, "computes_in_bf16", lambda device: True)
    compiler = tmp_path / "c++"
    if script:
        compiler.write_text(script)
        compiler.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (str(compiler),)}):
        text = starting_recipe(str(tiny_checkpoint), str(shapes), "mine")
    assert set(rows(text)) == {"fp32", "bf16", "nf4"}
    left_out = next(line for line in text.splitlines() if line.startswith("# Left out: w8a8-compiled"))
    assert reason in left_out


@pytest.mark.usefixtures("untimed")
def test_a_processor_without_bf16_arithmetic_compiles_fp32(
    tiny_checkpoint: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "resolve_device", lambda requested="auto": CPU)
    monkeypatch.setattr(devices, "computes_in_bf16", lambda device: False)
    monkeypatch.setattr(support, "why_not_compile", lambda device: None)
    text = starting_recipe(str(tiny_checkpoint), str(shapes), "mine")
    assert set(rows(text)) == {"fp32", "bf16", "fp32-compiled", "w8a8-compiled", "nf4"}
    assert "# Left out: bf16-compiled (cpu has no bf16 arithmetic)" in text


@pytest.mark.usefixtures("untimed")
def test_a_first_recipe_for_other_classes_trains_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = starting_recipe(str(tiny_checkpoint), "digits", "mine")
    recipe = written(tmp_path, text)
    assert recipe.finetune is not None and recipe.finetune.method == "lora"
    comments = text.replace("\n# ", " ")
    assert "LoRA fine-tunes" in comments and "divided: 804 images test" in comments
    assert plans(recipe)
    assert open_checkpoint(recipe.model).config.num_labels == 4
    # Where 2 % of the images turn right or wrong, 549 likely show 2 points, 881 show 1.5 and 1,785 show 1.
    assert recipe.require.limits == {"max_top1_drop": 2, "min_speedup": 1}
    assert "804 test images" in comments and "1,785" in comments


@pytest.mark.usefixtures("untimed")
def test_too_few_images_are_asked_to_show_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    few = make_images(tmp_path / "few", {"test": 1})
    text = starting_recipe(str(tiny_checkpoint), str(few), "mine")
    assert yaml.safe_load(text)["require"] == {"min_speedup": 1}
    assert "4 test images cannot show" in text


@pytest.mark.usefixtures("untimed")
def test_names_that_yaml_would_misread_stay_names(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a: b # {c}, 'd'"
    odd.symlink_to(shapes)
    text = starting_recipe(str(tiny_checkpoint), str(odd), "1.0")
    recipe = written(tmp_path, text)
    assert recipe.name == "1.0" and recipe.data is not None and recipe.data.source == str(odd)


@pytest.mark.usefixtures("untimed")
def test_a_class_with_odd_characters_stays_within_its_comment(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for kind in ("a\u2028variants: []\x1b", "b"):
        (tmp_path / "odd" / "test" / kind).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "odd" / "test" / kind / "0.png")
    text = starting_recipe(str(tiny_checkpoint), str(tmp_path / "odd"), "mine")
    assert written(tmp_path, text).finetune is not None and "\x1b" not in text


def test_a_first_recipe_needs_a_model_and_images(tiny_checkpoint: Path, shapes: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at /nowhere"):
        starting_recipe("/nowhere", str(shapes), "mine")
    with pytest.raises(DataError, match="no data at /nowhere"):
        starting_recipe(str(tiny_checkpoint), "/nowhere", "mine")


@pytest.mark.usefixtures("untimed")
def test_a_starting_recipe_for_a_gpu_has_the_fast_rows(
    tiny_checkpoint: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "resolve_device", lambda requested="auto": torch.device("cuda", 0))
    monkeypatch.setattr(devices, "computes_in_bf16", lambda device: True)
    lacking = {"fp8": "compute capability 8.0 is below 8.9"}
    monkeypatch.setattr(support, "why_not_format", lambda format, device: lacking.get(format))
    monkeypatch.setattr(support, "why_not_compile", lambda device: None)
    text = starting_recipe(str(tiny_checkpoint), str(shapes), "mine")
    variants = rows(text)
    assert list(variants)[:3] == ["fp32", "bf16", "bf16-compiled"]
    assert variants["bf16-compiled"] == {"name": "bf16-compiled", "format": "bf16", "compile": True, "fuse_qkv": True}
    assert variants["nf4-as-bf16"]["run_as"] == "bf16"
    assert "w8a8-compiled" in variants and not any(name.startswith("fp8") for name in variants)
    assert "# Left out: fp8-compiled (compute capability 8.0 is below 8.9)" in text
    assert yaml.safe_load(text)["evaluate"]["latency"]["batch_sizes"] == [1, 32]
