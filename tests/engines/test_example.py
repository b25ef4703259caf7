"""Pixels of the example against the preprocessors of transformers."""

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor

from vitopt.engines.example import pixels

SIZE = {"height": 32, "width": 48}


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size=SIZE, image_mean=[0.5] * 3, image_std=[0.2, 0.3, 0.4]),
        ViTImageProcessor(size=SIZE, resample=3, do_normalize=False),
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    ],
)
@pytest.mark.parametrize("shape", [(90, 141), (141, 90), (32, 32)])
def test_it_prepares_an_image_as_transformers_does(processor, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    wanted = processor(image, return_tensors="np")["pixel_values"]
    assert np.allclose(pixels(image, processor.to_dict()), wanted, atol=1e-5)
