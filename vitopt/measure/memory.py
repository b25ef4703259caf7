"""Peak memory of running one variant.

CUDA: the allocator's own peak. CPU: the peak resident set of a process that does nothing but load the
checkpoint and call it once, because one process cannot tell its variants apart.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence

import torch

from vitopt import threads
from vitopt.data.pixels import random_pixels
from vitopt.errors import MeasurementError
from vitopt.measure.runnable import HoldsGraphs, KeepsWeights, Routes, Runnable, RunsAlone, input_size
from vitopt.records import Memory

_TIME_LIMIT_SECONDS = 600


def peak_memory(runnable: Runnable, batch_size: int) -> Memory:
    """Peak memory of `runnable` at `batch_size`.

    On the CPU it is that of the model as it runs without a compiler, whose own memory would hide the model's.

    Raises:
        MeasurementError: on the CPU, the process that runs the model alone failed, or there is none.
    """
    if runnable.device.type == "cuda":
        return _cuda_peak(runnable, batch_size)
    if not isinstance(runnable, RunsAlone):
        raise MeasurementError("it cannot be run in a separate process")
    return _process_peak(runnable.alone(batch_size), batch_size)


def _cuda_peak(runnable: Runnable, batch_size: int) -> Memory:
    device = runnable.device
    pixels = random_pixels(batch_size, input_size(runnable)).to(device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call: Callable[[torch.Tensor], object] = runnable.both_passes if isinstance(runnable, Routes) else runnable
    # A pool of its own: what other variants have freed neither serves this call nor counts for it.
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool, device):
        call(pixels)
        torch.cuda.synchronize(device)
    reserved = sum(segment["total_size"] for segment in pool.snapshot())
    # Other variants are loaded too: count what this call added, and this variant's own weights. A replayed graph
    # adds nothing, its memory has been set aside when it was captured.
    graphs = runnable.graph_bytes(pixels.shape) if isinstance(runnable, HoldsGraphs) else 0
    added = max(torch.cuda.max_memory_allocated(device) - before, graphs)
    weights = runnable.weight_bytes() if isinstance(runnable, KeepsWeights) else 0
    return Memory(
        peak_bytes=added + weights + pixels.numel() * pixels.element_size(),
        reserved_bytes=reserved,
        kind="cuda_allocated",
        batch_size=batch_size,
    )


def _process_peak(command: Sequence[str], batch_size: int) -> Memory:
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        with threads.unbound():  # it binds its own
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT_SECONDS, env=alone)
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"a separate process was not done after {_TIME_LIMIT_SECONDS} s") from error
    except OSError as error:
        raise MeasurementError(f"a separate process could not be started: {error}") from error
    if done.returncode != 0:
        raise MeasurementError(f"a separate process {_ending(done)}")
    try:
        peak = json.loads(done.stdout.splitlines()[-1])["peak_bytes"]
    except (ValueError, LookupError, TypeError) as error:
        raise MeasurementError("a separate process did not report its memory") from error
    return Memory(peak_bytes=peak, kind="resident_set", batch_size=batch_size)


def _ending(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended that failed: its last words, or the signal that ended it."""
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"was ended by {name}" + (": the memory may have run out" if name == "SIGKILL" else "")
    words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"failed: {words[-1][:300]}" if words else f"failed with status {done.returncode}"
