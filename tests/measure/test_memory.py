"""Peak memory of a variant alone."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vitopt.errors import MeasurementError
from vitopt.measure import memory
from vitopt.measure.memory import peak_memory
from vitopt.models.checkpoint import open_checkpoint, weight_bytes
from vitopt.optimize.runtime import prepare

CPU = torch.device("cpu")
GIGABYTE = 10**9


def test_peak_is_that_of_a_process_of_its_own(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = prepare(open_checkpoint(str(tiny_checkpoint)), name="v", device=CPU)
    # Under `accelerate launch` these are set; a process that obeyed them would wait for its siblings.
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    ballast = np.ones(int(1.5 * GIGABYTE), np.uint8)  # would show if the peak were this process's or inherited
    found = peak_memory(subject, 3)
    assert ballast.nbytes == 1.5 * GIGABYTE
    assert weight_bytes(subject.model) < found.peak_bytes < 1.5 * GIGABYTE
    assert found.peak_bytes > 100e6  # torch and transformers alone take more
    assert (found.kind, found.batch_size, found.reserved_bytes) == ("resident_set", 3, None)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL.*memory"),
        ("import sys; sys.exit(7)", "status 7"),
        ("raise ValueError('no weights')", "failed: ValueError: no weights"),
        ("print('no figure')", "did not report"),
        ("import time; time.sleep(60)", "not done after 0.5 s"),
    ],
)
def test_every_way_to_fail_has_its_words(program: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_TIME_LIMIT_SECONDS", 0.5 if "sleep" in program else 60)
    subject = SimpleNamespace(device=CPU, alone=lambda batch_size: [sys.executable, "-c", program])
    with pytest.raises(MeasurementError, match=reason):
        peak_memory(subject, 1)


def test_a_program_that_is_not_there_is_told() -> None:
    subject = SimpleNamespace(device=CPU, alone=lambda batch_size: ["/no/such/program"])
    with pytest.raises(MeasurementError, match="/no/such/program"):
        peak_memory(subject, 1)


class Allocator:
    """As much of torch.cuda as a peak takes: others hold 900 bytes, a call takes 40 in its own pool."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.allocated = self.peak = 900
        self.pool: Pool | None = None
        for name, value in {
            "MemPool": Pool,
            "use_mem_pool": self.use,
            "synchronize": lambda device: None,
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.allocated),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def use(self, pool: "Pool", device: torch.device) -> Iterator[None]:
        self.pool = pool
        yield
        self.pool = None

    def call(self, pixels: torch.Tensor) -> None:
        assert self.pool is not None, "the call took memory that others have freed"
        self.peak = self.allocated + 40
        self.pool.segments.append({"total_size": 64})


class Pool:
    def __init__(self) -> None:
        self.segments: list[dict[str, int]] = []

    def snapshot(self) -> list[dict[str, int]]:
        return self.segments


@pytest.mark.parametrize("routed", [False, True])
def test_a_peak_on_a_gpu_is_of_this_variant_alone_in_a_pool_of_its_own(
    monkeypatch: pytest.MonkeyPatch, routed: bool
) -> None:
    allocator = Allocator(monkeypatch)

    class Subject:
        device = torch.device("cuda", 1)
        input_size = (4, 4)

        def weight_bytes(self) -> int:
            return 500

        def __call__(self, pixels: torch.Tensor) -> None:
            allocator.call(pixels)

    class Routed(Subject):
        escalated = torch.empty(0)

        def both_passes(self, pixels: torch.Tensor) -> None:
            allocator.call(pixels)

        def __call__(self, pixels: torch.Tensor) -> None:
            pytest.fail("whether random pixels are escalated is luck")

    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    found = peak_memory(Routed() if routed else Subject(), 2)
    assert (found.kind, found.peak_bytes) == ("cuda_allocated", 500 + 40 + 2 * 3 * 4 * 4 * 4)
    assert found.reserved_bytes == 64
