"""Pixels of any type into models of any type."""

from collections.abc import Callable

import pytest
import torch

from vitopt.data.pixels import random_pixels
from vitopt.models.checkpoint import Checkpoint, load_model
from vitopt.models.forward import input_dtype, logits

PIXELS = random_pixels(2, (32, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["vit", "beit", "swin"])  # the first casts by itself
def test_pixels_are_cast_to_the_type_of_the_weights(
    family: str, dtype: torch.dtype, make_family: Callable[..., Checkpoint]
) -> None:
    model = load_model(make_family(family), dtype=dtype)
    assert input_dtype(model) == dtype
    with torch.inference_mode():
        found = logits(model, PIXELS)
        assert found.dtype == dtype
        assert torch.equal(found, model(pixel_values=PIXELS.to(dtype)).logits)
        assert torch.equal(found, logits(model, PIXELS.to(dtype)))


def test_packed_weights_do_not_tell_the_type() -> None:
    model = torch.nn.Module()
    model.packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    model.norm = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    assert input_dtype(model) == torch.bfloat16
