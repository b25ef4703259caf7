"""Factors that move from activations into weights: the same function, in float64 and for each family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from vitopt.data.images import ImageSet, open_images
from vitopt.data.pixels import random_pixels
from vitopt.errors import CheckpointError, DataError, UnsupportedError
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.models.families import FAMILIES
from vitopt.models.names import linear_layers
from vitopt.optimize.inputs import collect
from vitopt.optimize.quantize import quantize
from vitopt.optimize.smooth import even_out, smooth
from vitopt.recipe import DataSpec, VariantSpec
from vitopt.steps import SmoothSpec


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "train")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_function_stays_and_columns_become_alike(
    model_type: str, make_family: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_family(model_type)).double()
    pixels = random_pixels(4, (32, 32)).double()
    monkeypatch.setattr("vitopt.models.forward.input_dtype", lambda model: torch.float64)
    with torch.inference_mode():
        weights = {name: one.clone() for name, one in model.state_dict().items()}
        before = model(pixels).logits
        made = even_out(model, model_type, [pixels])
        torch.testing.assert_close(model(pixels).logits, before, rtol=1e-6, atol=1e-6)
    kinds = {"output"} if FAMILIES[model_type].norms is None else {"query", "key", "value", "qkv", "output", "fc1"}
    for layer in linear_layers(model, model_type):
        kind = layer.logical.rpartition(".")[2]
        columns = model.get_submodule(layer.module).weight.detach() / weights[f"{layer.module}.weight"]
        moved = kind in kinds if kind not in ("value", "qkv") else None  # whose rows change too
        if moved is not None:
            assert (not torch.allclose(columns, torch.ones_like(columns))) == moved, layer.logical
    assert 0 < made.folded < made.inputs


def test_ranges_of_columns_are_closer_to_each_other(tiny_checkpoint: Path) -> None:
    model, pixels = load_model(open_checkpoint(str(tiny_checkpoint))), [random_pixels(8, (32, 32))]
    model.vit.layers[0].layernorm_after.weight.data[:4] *= 20

    def spread() -> float:
        (fc1,) = (one for one in collect(model, "vit", pixels) if one.layers[0].logical == "block.0.fc1")
        ranges = (fc1.ranges[1] - fc1.ranges[0])[-1]
        return float(ranges.max() / ranges.median())

    before = spread()
    even_out(model, "vit", pixels)
    assert spread() < before / 3


def test_plain_transformers_gives_the_same_answers(tiny_checkpoint: Path, images: ImageSet, tmp_path: Path) -> None:
    opened, pixels = open_checkpoint(str(tiny_checkpoint)), random_pixels(4, (32, 32))
    made = smooth(opened, SmoothSpec(), tmp_path / "smooth", "cpu", images=images)
    assert made.summary() == "evened out 9 of 12 inputs of layers"
    (use,) = load_uses(tmp_path / "smooth")
    assert use.purpose == "smoothing" and use.image_sha256 == images.image_hashes
    quantize(open_checkpoint(str(tmp_path / "smooth")), VariantSpec(name="w", format="w8a8"), tmp_path / "w8a8", "cpu")
    with torch.inference_mode():
        before, after, eight = (
            AutoModelForImageClassification.from_pretrained(path).eval()(pixels.to(kind)).logits.float()
            for path, kind in (
                (tiny_checkpoint, torch.float32),
                (tmp_path / "smooth", torch.float32),
                (tmp_path / "w8a8", torch.bfloat16),
            )
        )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert float((eight - before).norm() / before.norm()) < 0.1


def test_what_cannot_be_smoothed_is_refused(tiny_checkpoint: Path, images: ImageSet, tmp_path: Path) -> None:
    opened, output = open_checkpoint(str(tiny_checkpoint)), tmp_path / "smooth"
    with pytest.raises(DataError, match="calibration images"):
        smooth(opened, SmoothSpec(), output, "cpu")
    quantize(opened, VariantSpec(name="n", format="nf4"), tmp_path / "nf4", "cpu")
    with pytest.raises(CheckpointError, match="quantized already"):
        smooth(open_checkpoint(str(tmp_path / "nf4")), SmoothSpec(), output, "cpu", images=images)
    assert not output.exists()


def test_a_fold_that_changes_answers_leaves_nothing(
    tiny_checkpoint: Path, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of a family whose first LayerNorm were not the one before attention.
    monkeypatch.setattr("vitopt.optimize.smooth._norms", lambda model_type: ("layernorm_after", "layernorm_before"))
    with pytest.raises(UnsupportedError, match="answers would change"):
        smooth(open_checkpoint(str(tiny_checkpoint)), SmoothSpec(), tmp_path / "smooth", "cpu", images=images)
    assert not (tmp_path / "smooth").exists()
