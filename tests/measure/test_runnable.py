"""Anything with the members of the protocol is measured like a checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitopt.data.images import ImageSet, open_images
from vitopt.measure import evaluator, memory
from vitopt.measure.evaluator import evaluate
from vitopt.measure.runnable import input_size
from vitopt.recipe import DataSpec, EvaluateSpec
from vitopt.records import Variant
from vitopt.report.table import row

SPEC = EvaluateSpec(latency={"iterations": 6, "rounds": 3, "warmup_seconds": 0})


class Plain:
    """A function of pixels, and nothing else."""

    device = torch.device("cpu")

    def __init__(self, name: str, size: int):
        self.name, self.size, self.seen = name, size, []

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((self.size, self.size)), np.float32)).permute(2, 0, 1)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen.append(pixels)
        colours = pixels.mean((2, 3))
        return torch.cat([colours, colours.mean(1, keepdim=True)], dim=1)

    def describe(self) -> dict[str, object]:
        return {"variant": Variant(name=self.name, format="colours", ran={"engine": "numpy"})}


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "test")


def test_a_plain_function_is_measured_compared_and_reported(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator, "peak_memory", memory.peak_memory)
    one, other = (
        measured.record
        for measured in evaluate([Plain("a", 32), Plain("b", 32)], SPEC, images=images, baseline="a", untrained=True)
    )
    assert one.failure is None and other.versus_baseline.agreement_percent == 100
    assert other.latency[0].speedup_ci95 is not None and other.end_to_end[0].total_p50_ms > 0
    assert other.unmeasured == {"memory": "it cannot be run in a separate process"}
    assert (other.model, other.size, other.layers) == (None, None, {})
    cells = row(other)
    assert cells[:3] == ["b", "colours", "numpy"] and cells[3] == f"{other.accuracy.top1_percent:.1f}"


def test_each_sees_the_images_as_its_own_preprocessor_makes_them(images: ImageSet) -> None:
    small, large = Plain("small", 16), Plain("large", 32)
    records = [one.record for one in evaluate([small, large], SPEC, images=images, baseline="large", untrained=True)]
    assert {pixels.shape[-1] for pixels in small.seen} == {16} and {pixels.shape[-1] for pixels in large.seen} == {32}
    assert records[0].versus_baseline is not None  # paired by image, not by pixels
    assert (input_size(small), input_size(large)) == ((16, 16), (32, 32))


@pytest.mark.parametrize("inputs", ["random", "data"])
def test_calls_are_timed_on_noise_or_on_the_images(inputs: str, images: ImageSet) -> None:
    spec = SPEC.model_copy(update={"end_to_end": False, "latency": SPEC.latency.model_copy(update={"inputs": inputs})})
    plain = Plain("a", 8)
    evaluate([plain], spec, images=images, untrained=True)
    real = [torch.equal(pixels[0], plain.preprocess(images.image(1))) for pixels in plain.seen if len(pixels) == 1]
    negative = [bool((pixels < 0).any()) for pixels in plain.seen]
    assert any(real) and any(negative) == (inputs == "random")
