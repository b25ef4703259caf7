"""Pixels of one pass as the other takes them."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from vitopt.adaptive.pixels import pixel_map

CPU = torch.device("cpu")


def prepare(mean: float, deviation: float, order: tuple[int, ...] = (0, 1, 2)):
    def call(image: Image.Image) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[list(order)].float() / 255
        return (pixels - mean) / deviation

    return call


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("first", [prepare(0.4, 0.25), prepare(0.0, 1.0, (2, 1, 0))], ids=["normalised", "BGR"])
def test_other_normalisation_and_order_of_channels_are_found_out(first) -> None:
    second = prepare(0.5, 0.5)
    found = pixel_map(first, second, (32, 32), CPU)(second(photo())[None])
    assert torch.allclose(found[0], first(photo()), atol=1e-4)


def test_the_same_pixels_pass_as_they_are() -> None:
    pixels = prepare(0.5, 0.5)(photo())[None]
    assert pixel_map(prepare(0.5, 0.5), prepare(0.5, 0.5), (32, 32), CPU)(pixels) is pixels


def test_a_lower_resolution_is_antialiased() -> None:
    second = prepare(0.5, 0.5)
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (32, 16))[..., None].repeat(3, axis=2))
    found = pixel_map(second, second, (16, 16), CPU)(second(stripes)[None])
    plain = functional.interpolate(second(stripes)[None], (16, 16), mode="nearest")
    assert found.shape == (1, 3, 16, 16)
    assert found[..., 1:-1].abs().max() < 0.3 < plain.abs().max()  # stripes finer than a pixel turn grey
