"""Peak memory of a variant alone."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vitopt.measure.memory import peak_memory
from vitopt.models.checkpoint import open_checkpoint, weight_bytes
from vitopt.optimize.runtime import prepare
from vitopt.recipe import RunSpec

CPU = torch.device("cpu")
GIGABYTE = 10**9


def test_peak_is_that_of_a_process_of_its_own(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = prepare(open_checkpoint(str(tiny_checkpoint)), name="v", device=CPU)
    # Under `accelerate launch` these are set; a process that obeyed them would wait for its siblings.
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    ballast = np.ones(int(1.5 * GIGABYTE), np.uint8)  # would show if the peak were this process's or inherited
    memory = peak_memory(subject, 3)
    assert ballast.nbytes == 1.5 * GIGABYTE
    assert memory is not None
    assert weight_bytes(subject.model) < memory.peak_bytes < 1.5 * GIGABYTE
    assert memory.peak_bytes > 100e6  # torch and transformers alone take more
    assert (memory.kind, memory.batch_size, memory.reserved_bytes) == ("resident_set", 3, None)


def test_random_weights_are_drawn_and_run_in_that_process_as_the_variant_says() -> None:
    run = RunSpec(run_as="w8a8", fuse_qkv=True, compile=True)
    subject = prepare(open_checkpoint("random:vit-tiny-patch16-32"), name="v", device=CPU, run=run)
    memory = peak_memory(subject, 1)
    assert memory is not None and (memory.kind, memory.batch_size) == ("resident_set", 1)
    assert 100e6 < memory.peak_bytes < 1.5 * GIGABYTE


def test_a_process_that_fails_gives_no_figure(tiny_checkpoint: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_checkpoint)
    subject = prepare(open_checkpoint(str(folder)), name="v", device=CPU)
    (folder / "config.json").unlink()
    assert peak_memory(subject, 1) is None
