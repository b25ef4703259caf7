"""Two passes of tiny random models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint

from vitopt.adaptive.make import at_size
from vitopt.adaptive.passes import Passes, prepare_passes
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.recipe import RunSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def small(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny checkpoint for 16 x 16 pixels instead of 32 x 32."""
    return at_size(open_checkpoint(str(tiny_checkpoint)), 16, tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="session")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Another model of the same classes, of one block."""
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("draft") / "draft", blocks=1, seed=7)))


@pytest.fixture(scope="session")
def passes_of(tiny_checkpoint: Path) -> Callable[..., Passes]:
    """Prepares the tiny checkpoint as the second pass of another."""

    def make(first: Checkpoint, run: RunSpec | None = None, watched: bool = False) -> Passes:
        second, run = open_checkpoint(str(tiny_checkpoint)), run or RunSpec()
        return prepare_passes(first, second, name="tiny", device=CPU, run_first=run, run=run, watched=watched)

    return make
