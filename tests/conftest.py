"""A tiny checkpoint and a tiny image folder, made once; nothing here downloads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that spin while they wait make a tiny model hundreds of times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_stand_in import hub  # noqa: F401  (a fixture)
from PIL import Image

from vitopt.environment import libraries
from vitopt.formats import AMPERE, FORMATS
from vitopt.measure.intervals import Interval
from vitopt.models.calibration import load_uses

libraries.quiet_libraries()

from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from vitopt.data.images import ImageSet, open_images
from vitopt.measure import evaluator, memory
from vitopt.models.architectures import known_architecture
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.models.families import FAMILIES, TIMM
from vitopt.recipe import DataSpec
from vitopt.records import Memory

CLASSES = ("circle", "cross", "square", "stripe")
IMAGE_SIZE = 32


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= AMPERE
    for item in items:
        if item.get_closest_marker("gpu") and not able:  # keywords hold the names of folders too
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device of compute capability 8.0 or higher"))


def make_checkpoint(folder: Path, blocks: int = 3, seed: int = 0, **changes: object) -> Path:
    """A random ViT of 64 wide, 32 x 32 pixels, 4 classes, with weights large enough that formats differ."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=128,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
        **changes,
    )
    model = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(folder)
    return folder


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """One 32 x 32 picture of a class, shifted and tinted at random; a model can learn them."""
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] - IMAGE_SIZE / 2 + rng.integers(-3, 4, (2, 1, 1))
    shape = {
        "circle": rows**2 + columns**2 < 80,
        "cross": (abs(rows) < 3) | (abs(columns) < 3),
        "square": (abs(rows) < 9) & (abs(columns) < 9) & ~((abs(rows) < 6) & (abs(columns) < 6)),
        "stripe": (rows + columns).astype(int) % 8 < 4,
    }[kind]
    colour = rng.integers(120, 256, 3)
    noise = rng.integers(0, 60, (IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray(np.where(shape[..., None], colour, noise).astype(np.uint8))


def make_images(folder: Path, per_class: dict[str, int], seed: int = 0) -> Path:
    """SPLIT/CLASS/NN.png for every split in `per_class`."""
    rng = np.random.default_rng(seed)
    for split, count in per_class.items():
        for kind in CLASSES:
            (folder / split / kind).mkdir(parents=True)
            for index in range(count):
                draw(kind, rng).save(folder / split / kind / f"{index:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """Commands point the root logger at a standard error that is closed when they end, and libraries raise the level of
    whatever handlers there are, pytest's own among them."""
    root = logging.root
    handlers, level = root.handlers[:], root.level
    for handler in handlers:
        handler.setLevel(logging.NOTSET)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def _no_process_for_memory() -> Iterator[None]:
    """On the CPU a process of its own tells what a model needs, which takes seconds; tests of memory.py call it."""

    def fake(runnable: Any, batch_size: int) -> Memory | None:
        if runnable.device.type != "cpu":
            return memory.peak_memory(runnable, batch_size)
        return Memory(peak_bytes=10**9, kind="resident_set", batch_size=batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "peak_memory", fake)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that tests must not change; `copy_of` gives one that they may."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-vit")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with train (8 per class) and test (6 per class) splits that tests must not change."""
    return make_images(tmp_path_factory.mktemp("shapes") / "shapes", {"train": 8, "test": 6})


@pytest.fixture(scope="session")
def tiny(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="session")
def train(shapes: Path) -> ImageSet:
    """The 32 images of `shapes` to train on."""
    return open_images(DataSpec(source=str(shapes)), "train")


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder to where the test may change it."""
    return lambda source: Path(shutil.copytree(source, tmp_path / source.name))


@pytest.fixture
def fp8_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU hold and multiply fp8, which torch can do there and vitopt and torchao offer on a GPU only."""
    from torchao.quantization import quant_api

    monkeypatch.setattr(quant_api, "is_sm_at_least_89", lambda: True)
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularities: None)
    monkeypatch.setitem(FORMATS, "fp8", dataclasses.replace(FORMATS["fp8"], not_on_cpu=None))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real weights and images for development; tests that need them skip where they are absent."""
    path = Path(os.environ.get("VITOPT_SHARED", "../shared"))
    if not (path / "models").is_dir():
        pytest.skip(f"no real weights and images at {path} (set VITOPT_SHARED)")
    return path


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Makes a model of 32 x 32 pixels and the 4 classes, biases and norms random too, so that none is idle.

    `with_teacher` gives DeiT the distillation head. Skips a timm model where timm is not installed.
    """

    def make(model_type: str, *, with_teacher: bool = False, **changes: Any) -> Checkpoint:
        if model_type == TIMM:
            pytest.importorskip("timm")
        name = [*FAMILIES[model_type].classes][with_teacher].replace("SIZE", "micro")
        # Of two stages the first is too narrow for NF4, the second is not.
        grid = "patch4-window4-32" if FAMILIES[model_type].shape == "stages" else "patch8-32"
        labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
        config = known_architecture(f"{name}-{grid}", num_labels=len(CLASSES), **labels, **changes)
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("families") / model_type
        model.save_pretrained(folder)
        if model_type != TIMM:  # whose configuration holds its preprocessing
            ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return open_checkpoint(str(folder))

    return make


def calibration_hashes(folder: Path) -> set[str]:
    """sha256 of every image that the checkpoint in `folder` has seen, for whatever purpose."""
    return {content for use in load_uses(folder) for content in use.image_sha256}


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def limits(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    return interval.low, interval.high
