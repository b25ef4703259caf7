"""Throughput and energy: what a device gives when it is kept full."""

import statistics
from collections.abc import Callable

import torch

from vitopt.errors import MeasurementError
from vitopt.measure.conditions import Gpu
from vitopt.measure.failures import is_out_of_memory
from vitopt.measure.latency import Clock, clock_for
from vitopt.records import Throughput

Call = Callable[[], object]

_CALLS = 5
_LARGEST_BATCH = 4096
_SECONDS = 30.0
_SUSTAINED_SECONDS = 5.0  # by then a GPU has met its power limit
_GAIN = 1.02  # a doubling that gains less than this has reached the device's rate
_ENERGY_SECONDS = 2.0  # NVML's counter moves every 20 to 100 ms


def find_throughput(make_call: Callable[[int], Call], clock: Clock, largest: int = _LARGEST_BATCH) -> Throughput:
    """Double the batch until memory, the gain or half a minute runs out, then keep the best one going for 5 s.

    `make_call` gives, for a batch size, what calls the model on so many images. The rate is that of those 5 s.

    Raises:
        MeasurementError: not even one image fits the memory.
    """
    best: Throughput | None = None
    fits, batch_size, started = 0, 1, clock.now()
    while batch_size <= largest and clock.now() - started < _SECONDS:
        try:
            call = make_call(batch_size)
            call()
            median_ms = statistics.median(clock.time(call) for _ in range(_CALLS))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
        fits = batch_size
        rate = 1000 * batch_size / median_ms
        gained = best is None or rate > _GAIN * best.images_per_second
        if best is None or rate > best.images_per_second:
            best = Throughput(batch_size=batch_size, images_per_second=rate, largest_batch_size=fits)
        if not gained and batch_size >= 4 * best.batch_size:
            break
        batch_size *= 2
    if best is None:
        raise MeasurementError("out of memory: not even one image fits")
    calls, seconds = clock.sustained(make_call(best.batch_size), _SUSTAINED_SECONDS)
    rate = calls * best.batch_size / seconds
    return best.model_copy(update={"images_per_second": rate, "largest_batch_size": fits})


def energy_per_image(call: Call, batch_size: int, device: torch.device) -> float | None:
    """Joules per image while the GPU is kept busy, its idle power included; None where NVML does not tell."""
    gpu = Gpu.open(device)
    before = gpu.energy_joules() if gpu else None
    if gpu is None or before is None:
        return None
    calls, _ = clock_for(device).sustained(call, _ENERGY_SECONDS)
    after = gpu.energy_joules()
    gpu.close()
    return None if after is None else (after - before) / (calls * batch_size)
