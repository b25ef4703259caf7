"""An image alone against the same image among others."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_checkpoint

from vitopt.data.images import ImageSet, open_images
from vitopt.data.labels import fit_labels
from vitopt.data.pixels import Preprocessor
from vitopt.errors import MeasurementError
from vitopt.measure import accuracy, invariance
from vitopt.measure.invariance import batch_invariance
from vitopt.models.checkpoint import load_model, load_processor, open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import prepare
from vitopt.recipe import DataSpec, VariantSpec
from vitopt.records import BatchInvariance

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def preprocess(tiny_checkpoint: Path) -> Preprocessor:
    return Preprocessor(load_processor(open_checkpoint(str(tiny_checkpoint))))


@pytest.fixture(scope="module")
def images(shapes: Path, tiny_checkpoint: Path) -> ImageSet:
    labels = open_checkpoint(str(tiny_checkpoint)).label_names
    return fit_labels(open_images(DataSpec(source=str(shapes)), "test"), labels)


class StandIn:
    """Adds to each image's brightness so much of its batch's: the class is whether the sum is over a half."""

    name, device = "stand-in", CPU

    def __init__(self, neighbours: float, compiled: bool = False):
        self.neighbours, self.fixed_shapes = neighbours, compiled
        self.sizes: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(pixels))
        own = pixels.mean(dim=(1, 2, 3))
        score = own + self.neighbours * own.mean()
        return torch.stack([torch.zeros_like(score), score], dim=1)


def checked(
    subject: Any, images: ImageSet, preprocess: Preprocessor, batch_size: int = 8, timed_at: tuple[int, ...] = (1,)
) -> BatchInvariance:
    subject.preprocess = preprocess
    outcome = accuracy.predict([subject], images, batch_size=batch_size)
    found = outcome.predictions[subject.name]
    return batch_invariance(subject, images, found, batch_size, timed_at=timed_at)


def test_an_answer_that_depends_on_its_neighbours_is_seen(images: ImageSet, preprocess: Preprocessor) -> None:
    found = checked(StandIn(-1), images, preprocess)
    assert (found.images, found.batch_size) == (24, 8)
    # Alone, an image is as bright as its batch: the sum is 0 for all. The reference is computed by hand.
    bright = np.array([preprocess(images.image(index)).mean().item() for index in range(24)])
    among = bright - bright.reshape(3, 8).mean(axis=1).repeat(8)
    assert found.max_logit_difference == pytest.approx(np.abs(among).max(), abs=1e-5)
    assert found.agreement_percent < 100


def test_one_that_does_not_is_the_same_to_the_bit(images: ImageSet, preprocess: Preprocessor) -> None:
    found = checked(StandIn(0), images, preprocess)
    assert (found.agreement_percent, found.max_logit_difference) == (100, 0)


@pytest.mark.parametrize(("compiled", "timed_at", "alone"), [(False, (8,), 1), (True, (1, 8), 1), (True, (32,), 8)])
def test_a_compiled_variant_is_called_with_shapes_that_it_knows(
    compiled: bool, timed_at: tuple[int, ...], alone: int, images: ImageSet, preprocess: Preprocessor
) -> None:
    subject = StandIn(-1, compiled)
    found = checked(subject, images, preprocess, timed_at=timed_at)
    assert set(subject.sizes[-24:]) == {alone}
    assert found.agreement_percent < 100  # copies of itself are no other neighbours


def test_the_last_images_are_compared_as_well_as_the_first(images: ImageSet, preprocess: Preprocessor) -> None:
    many = images.subset([index % 24 for index in range(300)])
    subject = StandIn(0)
    found = checked(subject, many, preprocess, batch_size=50)
    assert found.images == 64 and found.max_logit_difference == 0


def test_calls_that_are_too_slow_are_not_waited_for(
    images: ImageSet, preprocess: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(0, 1000, 3))  # three seconds a call
    monkeypatch.setattr(invariance, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    with pytest.raises(MeasurementError, match="4 single images took 10 s"):
        checked(StandIn(0), images, preprocess)


def test_what_the_time_allows_is_told(
    images: ImageSet, preprocess: Preprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(invariance, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert checked(StandIn(0), images, preprocess).images == 11


def test_batches_of_one_show_nothing(images: ImageSet, preprocess: Preprocessor) -> None:
    with pytest.raises(MeasurementError, match="one image at a time"):
        checked(StandIn(0), images, preprocess, batch_size=1)


@pytest.mark.parametrize("format", ["w8a8", "int8"])
def test_per_token_scales_keep_an_image_apart_and_llm_int8_does_not(
    format: str, tmp_path: Path, images: ImageSet, preprocess: Preprocessor
) -> None:
    folder = make_checkpoint(tmp_path / "source")
    model = load_model(open_checkpoint(str(folder)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name and name.endswith("weight"):
                parameter.fill_(2)  # so that some images have values above LLM.int8's threshold of 6
    model.save_pretrained(folder)
    quantize(open_checkpoint(str(folder)), VariantSpec(name="v", format=format), tmp_path / "v", "cpu")
    found = checked(prepare(open_checkpoint(str(tmp_path / "v")), name="v", device=CPU), images, preprocess)
    assert math.isfinite(found.max_logit_difference)
    if format == "w8a8":
        assert (found.agreement_percent, found.max_logit_difference) == (100, 0)
    else:
        assert found.max_logit_difference > 0
