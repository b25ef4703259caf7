"""Runs `interpreted.py`, whose kernels are interpreted on the CPU, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")


def test_the_kernels_are_right_in_tritons_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name("interpreted.py")),
    ]
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environ, cwd=Path(__file__).parents[3], timeout=500
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 60 and "skipped" not in done.stdout
