"""Pixels of the example against the preprocessors of transformers."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor

from vitopt.engines.example import example_text, pixels

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


@pytest.mark.parametrize("arguments", [[], ["absent.jpg"]])
def test_an_example_without_a_photo_says_how_it_is_used(arguments, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example_text(["numpy"], "logits = values"))
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.strip() == "usage: python example.py PHOTO"
