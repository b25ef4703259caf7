"""Models at another resolution: held against what plain transformers computes for the original."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPImageProcessor, ViTImageProcessor

from vitopt.data.images import open_images
from vitopt.data.pixels import Preprocessor, random_pixels
from vitopt.errors import DataError, RecipeError
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.models.families import FAMILIES
from vitopt.optimize.resolution import at_resolution, for_resolution, why_not_resized
from vitopt.recipe import DataSpec, FinetuneSpec
from vitopt.training.finetune import finetune


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if not family.fixed_size])
def test_logits_are_those_of_interpolated_position_embeddings(
    model_type: str, make_family: Callable[..., Checkpoint]
) -> None:
    checkpoint = make_family(model_type)
    model = load_model(checkpoint, dtype=torch.float32)
    # DINOv2 interpolates without being asked.
    ask = {} if model_type.startswith("dinov2") else {"interpolate_pos_encoding": True}
    for side in (16, 48):
        assert why_not_resized(checkpoint.config, side) is None
        pixels = random_pixels(3, (side, side))
        with torch.inference_mode():
            resized = at_resolution(model, side)
            torch.testing.assert_close(resized(pixels).logits, model(pixels, **ask).logits, rtol=0, atol=1e-5)


def test_a_fine_tuned_checkpoint_is_an_ordinary_one_of_its_size(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    images = open_images(DataSpec(source=str(shapes)), "train")
    spec = FinetuneSpec(image_size=16, epochs=0.25, batch_size=8, learning_rate=1e-12, rank=1, precision="fp32")
    finetune(open_checkpoint(str(tiny_checkpoint)), spec, tmp_path / "out", "cpu", images=images)
    small = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert small.config.image_size == 16 and dict(processor.size) == {"height": 16, "width": 16}
    pixels = processor([images.image(index) for index in range(4)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (4, 3, 16, 16)
    whole = AutoModelForImageClassification.from_pretrained(tiny_checkpoint)
    with torch.inference_mode():
        expected = whole(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(small(pixels).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_at_another_size_resumes(method: str, tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    images = open_images(DataSpec(source=str(shapes)), "train")
    spec = FinetuneSpec(method=method, image_size=16, epochs=1, batch_size=8)
    checkpoint = open_checkpoint(str(tiny_checkpoint))

    class Interrupted(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitopt.training.finetune.save_checkpoint", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            finetune(checkpoint, spec, tmp_path / "out", "cpu", images=images)
    report = finetune(checkpoint, spec, tmp_path / "out", "cpu", images=images)
    assert report.resumed_from_step == report.steps == 4
    assert open_checkpoint(str(tmp_path / "out")).image_size == (16, 16)


def test_a_processor_keeps_the_part_of_an_image_that_it_crops() -> None:
    cropping = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56})
    smaller = for_resolution(cropping, 28)
    assert dict(smaller.size) == {"shortest_edge": 32} and dict(smaller.crop_size) == {"height": 28, "width": 28}
    assert Preprocessor(smaller).size == (28, 28) and Preprocessor(cropping).size == (56, 56)
    wide = for_resolution(ViTImageProcessor(size={"height": 32, "width": 48}), 16)
    assert dict(wide.size) == {"height": 16, "width": 16}


@pytest.mark.parametrize(("side", "remedy"), [(20, "16 or 24"), (7, "take 8")])
def test_a_size_that_the_patches_do_not_divide_names_those_that_they_do(
    side: int, remedy: str, tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    images = open_images(DataSpec(source=str(shapes)), "train")
    with pytest.raises(RecipeError, match=rf"`image_size` {side} is not a multiple of .* 8 pixels: .*{remedy}"):
        finetune(open_checkpoint(str(tiny_checkpoint)), FinetuneSpec(image_size=side), tmp_path / "out", images=images)


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.fixed_size])
def test_a_family_made_for_one_size_says_so(model_type: str, make_family: Callable[..., Checkpoint]) -> None:
    reason = why_not_resized(make_family(model_type).config, 64)
    assert reason is not None and FAMILIES[model_type].fixed_size in reason


def test_images_that_are_not_square_cannot_be_resized(make_family: Callable[..., Checkpoint]) -> None:
    config = make_family("vit").config
    config.image_size = [32, 48]
    assert "not square" in str(why_not_resized(config, 16))


def test_pixels_of_ones_own_must_be_of_the_size(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    images = open_images(DataSpec(source=str(shapes)), "train")
    spec, checkpoint = FinetuneSpec(image_size=16), open_checkpoint(str(tiny_checkpoint))
    with pytest.raises(DataError, match=r"32 x 32 .*`image_size` 16"):
        finetune(
            checkpoint, spec, tmp_path / "out", "cpu", images=images, preprocess=lambda image: torch.zeros(3, 32, 32)
        )
