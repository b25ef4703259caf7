"""A checkpoint whose int8 is far from its fp32, and images to calibrate on."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint

from vitopt.data.images import ImageSet, open_images
from vitopt.engines import note, package
from vitopt.engines.runtime import Prepared, prepare
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.recipe import DataSpec, VariantSpec


@pytest.fixture(scope="session", autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What seals compiled files is not the key of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


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


# No module of these can be imported, wherever the interpreter finds them.
ALONE = """
import runpy, sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def classes_of() -> Callable[..., list[tuple[str, float]]]:
    """What an example prints of a photo where some packages are not installed: classes with their percentages."""

    def run(script: Path, photo: Path, without: str) -> list[tuple[str, float]]:
        done = subprocess.run([sys.executable, "-c", ALONE, without, script, photo], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [(line.split(" %  ")[1], float(line.split(" %")[0])) for line in done.stdout.splitlines()]

    return run


class FakeEngine:
    """Stands in for a runtime: keeps torch's weights and computes with them."""

    MODEL_FILE = "model.bin"
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
    for room in (package, note):
        monkeypatch.setattr(room, "installed_version", lambda name: version[0])
    monkeypatch.setattr("vitopt.environment.support.installed", lambda name: True)
    fake.version = version
    return fake
