"""Peak memory of running one variant.

CUDA: the allocator's own peak. CPU: the peak resident set of a process that does nothing but load the
checkpoint and call it once, because one process cannot tell its variants apart.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from vitopt import environment
from vitopt.data.pixels import random_pixels
from vitopt.measure.subject import Subject
from vitopt.models.checkpoint import load_model, open_checkpoint, weight_bytes
from vitopt.records import Memory

_TIME_LIMIT_SECONDS = 600


def peak_memory(subject: Subject, batch_size: int) -> Memory | None:
    """Peak memory of `subject` at `batch_size`; None where it cannot be measured."""
    if subject.device.type == "cuda":
        return _cuda_peak(subject, batch_size)
    folder = subject.checkpoint.folder
    return None if folder is None else _process_peak(folder, subject.attention_used, batch_size)


def _cuda_peak(subject: Subject, batch_size: int) -> Memory:
    pixels = random_pixels(batch_size, subject.checkpoint.image_size).to(subject.device)
    torch.cuda.synchronize(subject.device)
    torch.cuda.reset_peak_memory_stats(subject.device)
    before = torch.cuda.memory_allocated(subject.device)
    subject(pixels)
    torch.cuda.synchronize(subject.device)
    # Other variants are loaded too: count what this call added, and this variant's own weights.
    added = torch.cuda.max_memory_allocated(subject.device) - before
    return Memory(
        peak_bytes=added + weight_bytes(subject.model) + pixels.numel() * pixels.element_size(),
        reserved_bytes=torch.cuda.max_memory_reserved(subject.device),
        kind="cuda_allocated",
        batch_size=batch_size,
    )


def _process_peak(folder: Path, attention: str, batch_size: int) -> Memory | None:
    command = [sys.executable, "-m", "vitopt.measure.memory", str(folder), attention, str(batch_size)]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_TIME_LIMIT_SECONDS, env=alone
        )
        peak = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    except (subprocess.SubprocessError, ValueError, LookupError):
        return None
    return Memory(peak_bytes=peak, kind="resident_set", batch_size=batch_size)


def _report_own_peak(folder: str, attention: str, batch_size: int) -> None:
    environment.quiet_libraries()
    checkpoint = open_checkpoint(folder)
    model = load_model(checkpoint, attention=attention)
    with torch.inference_mode():
        model(random_pixels(batch_size, checkpoint.image_size))
    sys.stdout.write(json.dumps({"peak_bytes": _own_peak_bytes()}) + "\n")


def _own_peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would carry over the peak of the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return kilobyte * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    _report_own_peak(sys.argv[1], sys.argv[2], int(sys.argv[3]))
