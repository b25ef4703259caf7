"""Peak memory of a variant alone."""

import sys
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
        ("print('no figure')", "did not say"),
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
