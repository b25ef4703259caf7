"""A checkpoint whose int8 is far from its fp32, and images to calibrate on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint

from vitopt.data.images import ImageSet, open_images
from vitopt.engines import package
from vitopt.engines.runtime import Prepared, prepare
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.recipe import DataSpec, VariantSpec


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("engines") / "two-blocks", blocks=2)))


@pytest.fixture(scope="session")
def calibration(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes), limit=8), "train")


@pytest.fixture(scope="session")
def run_with() -> Callable[..., Prepared]:
    def prepared(folder: Path | str | Checkpoint, variant: VariantSpec) -> Prepared:
        opened = folder if isinstance(folder, Checkpoint) else open_checkpoint(str(folder))
        asked = None if variant.name == "elsewhere" else variant
        return prepare(opened, name="x", device=torch.device("cpu"), run=variant.run, asked=asked)

    return prepared


@pytest.fixture(scope="session")
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class FakeEngine:
    """Stands in for a runtime: keeps torch's weights and computes with them."""

    EXAMPLE = "logits = numpy.zeros((1, 4))"

    def __init__(self, checkpoint):
        self.model, self.factor, self.fixed_shapes = package.Logits(load_model(checkpoint)), 1, True

    def why_not(self, format):
        return None

    def write(self, model, size, plan, images, folder):
        self.model = model
        (folder / "model.bin").write_bytes(b"0" * (0 if images is None else len(images)))
        return {"images": 0 if images is None else len(images)}

    def load(self, folder, settings):
        return self

    @torch.inference_mode()
    def __call__(self, pixel_values):
        return self.factor * self.model(torch.from_numpy(pixel_values)).numpy()

    def formats(self, modules):
        return dict.fromkeys(modules, "fp32")


@pytest.fixture
def engine(checkpoint, monkeypatch):
    fake, version = FakeEngine(checkpoint), ["1"]
    monkeypatch.setattr(package, "engine_module", lambda name: fake)
    monkeypatch.setattr("vitopt.engines.runtime.engine_module", lambda name: fake)
    monkeypatch.setattr(package, "installed_version", lambda name: version[0])
    monkeypatch.setattr("vitopt.environment.support.installed", lambda name: True)
    fake.version = version
    return fake
