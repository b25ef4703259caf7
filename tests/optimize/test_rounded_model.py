"""Calibrated rounding from a checkpoint and images to a checkpoint that plain transformers opens."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForImageClassification

from vitopt.data.images import ImageSet, open_images
from vitopt.data.pixels import Preprocessor, batches
from vitopt.errors import DataError, MeasurementError
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import Checkpoint, disk_bytes, load_model, load_processor, open_checkpoint
from vitopt.models.forward import logits
from vitopt.models.origin import load_origin
from vitopt.optimize import rounded_model
from vitopt.optimize.blockwise import round_blocks
from vitopt.optimize.packed import PACKINGS
from vitopt.optimize.quantize import plan_for, quantize
from vitopt.optimize.rounding import Rounded
from vitopt.recipe import DataSpec, RoundingSpec, VariantSpec

LEARNING = {"tuning_steps": 6, "batch_size": 8, "learning_rate": 1e-4}


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "train")


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def made(checkpoint: Checkpoint, images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder, done = tmp_path_factory.mktemp("rounded"), {}

    def make(name: str, **changes: Any) -> Path:
        if name not in done:
            variant = VariantSpec(name=name, **changes)
            quantize(checkpoint, variant, folder / name, "cpu", calibration=images if variant.rounding else None)
            done[name] = folder / name
        return done[name]

    return make


def outputs(folder: Path | Checkpoint, images: ImageSet) -> torch.Tensor:
    opened = folder if isinstance(folder, Checkpoint) else open_checkpoint(str(folder))
    model = (
        load_model(opened, dtype=torch.float32)
        if isinstance(folder, Checkpoint)
        else AutoModelForImageClassification.from_pretrained(folder)
    )
    preprocess = Preprocessor(load_processor(opened))
    with torch.inference_mode():
        return torch.cat([logits(model, b.pixel_values).float() for b in batches(images, preprocess, 16)])


def test_rounded_on_images_the_outputs_stay_nearer_at_the_same_size(
    made: Callable[..., Path], checkpoint: Checkpoint, images: ImageSet, shapes: Path
) -> None:
    test = open_images(DataSpec(source=str(shapes)), "test")
    exact = outputs(checkpoint, test)
    variants = {
        "nearest": made("nearest", format="nf4"),
        "gptq": made("gptq", format="nf4", rounding={"tuning_steps": 0, "search_scales": False}),
        "searched": made("searched", format="nf4", rounding="gptq"),
    }
    error = {name: float((outputs(folder, test) - exact).square().mean()) for name, folder in variants.items()}
    assert error["searched"] < error["gptq"] < error["nearest"]
    assert error["searched"] < 0.5 * error["nearest"]
    sizes = {name: disk_bytes(folder) for name, folder in variants.items()}
    assert max(sizes.values()) - min(sizes.values()) < 64  # digits of offsets in a header


def test_crops_round_beside_the_photos_the_same_ones_in_each_pass(
    made: Callable[..., Path], images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[torch.Tensor] = []

    def noted(function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            given = list(arguments)
            given[place] = list(given[place])
            passes.append(torch.cat(given[place]))
            return function(*given)

        return call

    for name, place in (("token_importance", 2), ("round_blocks", 4)):
        monkeypatch.setattr(rounded_model, name, noted(getattr(rounded_model, name), place))
    made("crops", format="nf4", rounding={"crops": 2})
    first, second = passes
    assert torch.equal(first, second) and len(first) == 3 * len(images)
    photos, crops, others = first.split(len(images))
    assert not torch.equal(photos, crops) and not torch.equal(crops, others)


def test_w8a8_is_rounded_too_and_skipped_layers_stay(made: Callable[..., Path], tiny_checkpoint: Path) -> None:
    nearest = AutoModelForImageClassification.from_pretrained(made("w8a8", format="w8a8", skip=["block.1"]))
    folder = made("w8a8-gptq", format="w8a8", skip=["block.1"], rounding="gptq")
    rounded = AutoModelForImageClassification.from_pretrained(folder)
    first, kept = (f"vit.layers.{block}.mlp.fc1.weight" for block in (0, 1))
    assert not torch.equal(rounded.get_parameter(first).qdata, nearest.get_parameter(first).qdata)
    assert torch.equal(rounded.get_parameter(kept), nearest.get_parameter(kept))


def test_the_file_holds_exactly_the_codes_that_were_chosen(
    checkpoint: Checkpoint, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, Rounded] = {}

    def remember(*args: Any) -> dict[str, Rounded]:
        chosen.update(rounded_model.__dict__["_tune"](*args))
        return chosen

    monkeypatch.setitem(rounded_model.__dict__, "_tune", rounded_model.tune)
    monkeypatch.setattr(rounded_model, "tune", remember)
    variant = VariantSpec(name="v", format="nf4", rounding=LEARNING)
    plan = quantize(checkpoint, variant, tmp_path / "v", "cpu", calibration=images)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "v")
    for item in (item for item in plan.layers if item.format == "nf4"):
        weight = model.get_submodule(item.layer.module).weight
        weight.quant_state.dtype = torch.float32
        found = dequantize_4bit(weight.data, weight.quant_state)
        torch.testing.assert_close(found, chosen[item.layer.logical].values(), rtol=1e-6, atol=1e-7)
    assert len(chosen) == 18


def test_the_same_images_and_settings_give_the_same_file(made: Callable[..., Path]) -> None:
    first, second = (made(name, format="nf4", rounding=LEARNING) for name in ("first", "second"))
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    untuned = made("searched", format="nf4", rounding="gptq")
    assert (first / "model.safetensors").read_bytes() != (untuned / "model.safetensors").read_bytes()


def test_images_and_settings_are_noted(made: Callable[..., Path], images: ImageSet) -> None:
    folder = made("searched", format="nf4", rounding="gptq")
    (use,) = load_uses(folder)
    assert use.purpose == "rounding" and set(use.image_sha256) == set(images.image_hashes)
    step = load_origin(folder).last("quantize")
    assert step is not None and step["rounding"]["tuning_steps"] == 0


def test_without_images_there_is_nothing_to_calibrate_on(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--calibrate"):
        quantize(checkpoint, VariantSpec(name="v", format="nf4", rounding="gptq"), tmp_path / "v", "cpu")
    assert not (tmp_path / "v").exists()


def rounding_of(checkpoint: Checkpoint, pixels: torch.Tensor, broken: str | None = None) -> torch.nn.Module:
    """`round_blocks` on pixels."""
    variant = VariantSpec(name="v", format="w8a8")
    plan = plan_for(checkpoint, variant)
    model = load_model(checkpoint, dtype=torch.float32)
    if broken is not None:
        model.get_submodule(broken).bias.data.fill_(torch.nan)
    layers = [item.layer for item in plan.layers if item.format == "w8a8"]
    grids = {layer.logical: PACKINGS["w8a8"].grid(_Quantized(model.get_submodule(layer.module))) for layer in layers}
    round_blocks(model, checkpoint.config.model_type, layers, grids, [pixels], RoundingSpec())
    return model


class _Quantized:
    def __init__(self, linear: torch.nn.Linear):
        self.in_features, self.weight = linear.in_features, self
        self.qdata = linear.weight


def test_activations_that_are_not_finite_name_the_layer(checkpoint: Checkpoint) -> None:
    with pytest.raises(MeasurementError, match=r"block\.1\.query"):
        rounding_of(checkpoint, torch.randn(2, 3, 32, 32), broken="vit.layers.0.mlp.fc2")


def test_too_few_images_for_all_inputs_are_said(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rounding_of(checkpoint, torch.randn(2, 3, 32, 32))
    assert "block.0.query" in caplog.text and "damping" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rounding_of(checkpoint, torch.randn(12, 3, 32, 32))
    assert not caplog.records
