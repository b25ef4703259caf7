"""A process that does nothing but load one checkpoint and call it, and prints its peak memory as JSON.

One process cannot tell its variants apart: `python -m vitopt.optimize.alone CHECKPOINT RUN-SPEC-JSON BATCH-SIZE`.
"""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from vitopt.data.pixels import random_pixels
from vitopt.environment import libraries
from vitopt.models.checkpoint import open_checkpoint
from vitopt.optimize.runtime import prepare
from vitopt.recipe import RunSpec


def _own_peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would carry over the peak of the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return kilobyte * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(source: str, run: str, batch_size: str) -> None:
    """Load, call once, print `{"peak_bytes": …}`."""
    libraries.quiet_libraries()
    checkpoint = open_checkpoint(source)
    runnable = prepare(checkpoint, name=source, device=torch.device("cpu"), run=RunSpec.model_validate_json(run))
    print_peak(runnable, int(batch_size), checkpoint.image_size)


def print_peak(call: Callable[[torch.Tensor], object], batch_size: int, size: tuple[int, int]) -> None:
    """Call once with images of `size`, print `{"peak_bytes": …}` of this process."""
    call(random_pixels(batch_size, size))
    sys.stdout.write(json.dumps({"peak_bytes": _own_peak_bytes()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
