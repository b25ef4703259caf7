"""The first recipe that `vitopt init` prints: it loads, plans, and fits the model, the data and the device."""

from pathlib import Path

import pytest
import torch
import yaml

from vitopt.checks import plans
from vitopt.environment import devices, support
from vitopt.errors import CheckpointError, DataError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.recipe_file import load_recipe
from vitopt.starting import starting_recipe


def test_a_first_recipe_for_a_fitting_head_loads_plans_and_trains_nothing(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    text = starting_recipe(str(tiny_checkpoint), str(shapes), "mine")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.name, recipe.model, recipe.data.source) == ("mine", str(tiny_checkpoint), str(shapes))
    assert recipe.finetune is None
    assert text.startswith("# ") and "nothing is fine-tuned" in text.splitlines()[0]
    assert {"fp32", "bf16", "nf4", "int8", "w8a8"} <= {variant.format for variant in recipe.variants}
    assert set(plans(recipe)) == {variant.name for variant in recipe.variants}
    if not torch.cuda.is_available():
        assert "fp8" not in {variant.format for variant in recipe.variants}
        assert "# Left out: fp8 (fp8 arithmetic needs a CUDA device" in text


def test_a_first_recipe_for_other_classes_trains_them(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = starting_recipe(str(tiny_checkpoint), "digits", "mine")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.finetune is not None and recipe.finetune.method == "lora"
    assert "LoRA fine-tunes" in text and "80 %" in text
    assert plans(recipe)
    assert open_checkpoint(recipe.model).config.num_labels == 4


def test_a_first_recipe_needs_a_model_and_images(tiny_checkpoint: Path, shapes: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at /nowhere"):
        starting_recipe("/nowhere", str(shapes), "mine")
    with pytest.raises(DataError, match="no data at /nowhere"):
        starting_recipe(str(tiny_checkpoint), "/nowhere", "mine")


def test_a_starting_recipe_for_a_gpu_has_the_fast_rows(
    tiny_checkpoint: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "resolve_device", lambda requested="auto": torch.device("cuda", 0))
    lacking = {"fp8": "compute capability 8.0 is below 8.9"}
    monkeypatch.setattr(support, "why_not_format", lambda format, device: lacking.get(format))
    monkeypatch.setattr(support, "why_not_attention", lambda attention, device, dtype: None)
    text = starting_recipe(str(tiny_checkpoint), str(shapes), "mine")
    variants = {variant["name"]: variant for variant in yaml.safe_load(text)["variants"]}
    assert list(variants)[:4] == ["fp32", "bf16", "bf16-compiled", "nf4"]
    assert variants["bf16-compiled"] == {"name": "bf16-compiled", "format": "bf16", "compile": True, "fuse_qkv": True}
    assert variants["nf4-as-bf16"]["run_as"] == "bf16"
    assert variants["nf4-fa2"]["attention"] == "flash_attention_2"
    assert "w8a8-compiled" in variants and not any(name.startswith("fp8") for name in variants)
    assert "# Left out: fp8-compiled (compute capability 8.0 is below 8.9)" in text
