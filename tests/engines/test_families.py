"""Every family in the engine that converts the model itself: it answers as torch does, or is refused by name."""

from importlib.util import find_spec

import pytest
import torch

from vitopt.models.checkpoint import load_model
from vitopt.models.families import FAMILIES, TIMM
from vitopt.recipe import VariantSpec

OPENVINO = VariantSpec(name="elsewhere", format="fp32", engine="openvino")


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != TIMM or find_spec("timm")])
def test_openvino_answers_as_torch_does(model_type, make_family, run_with):
    pytest.importorskip("openvino")
    checkpoint = make_family(model_type)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = load_model(checkpoint, dtype=torch.float32)(pixel_values=pixels).logits
    runnable = run_with(checkpoint, OPENVINO)
    found = torch.cat([runnable(pixels[:1]), runnable(pixels[1:])])
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4
    assert set(runnable.describe()["layers"].values()) == {"fp32"}
