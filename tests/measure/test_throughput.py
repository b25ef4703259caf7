"""Doubling the batch, on a made-up device whose rate and memory are known."""

from collections.abc import Callable

import pytest
import torch

from vitopt.errors import MeasurementError
from vitopt.measure.latency import Clock
from vitopt.measure.throughput import energy_per_image, find_throughput


class Device(Clock):
    """A clock that only the calls move."""

    def __init__(self, seconds_of: Callable[[int], float], fits: int = 10**9, error: Exception | None = None):
        self.time_now = 0.0
        self.seconds_of, self.fits = seconds_of, fits
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")
        self.sizes: list[int] = []

    def now(self) -> float:
        return self.time_now

    def call(self, size: int) -> Callable[[], None]:
        self.sizes.append(size)

        def run() -> None:
            if size > self.fits:
                raise self.error
            self.time_now += self.seconds_of(size)

        return run


def test_stops_at_the_largest_batch_that_fits() -> None:
    device = Device(lambda size: 0.001 + 0.0001 * size, fits=100)
    found = find_throughput(device.call, device)
    assert device.sizes == [1, 2, 4, 8, 16, 32, 64, 128, 64]  # the best once more, to keep it up
    assert (found.batch_size, found.largest_batch_size) == (64, 64)
    assert found.images_per_second == pytest.approx(64 / (0.001 + 0.0064))


def test_the_rate_is_what_the_device_keeps_up() -> None:
    device = Device(lambda size: 0.0)
    # 1 ms for each image, and half as fast after half a second of work.
    device.seconds_of = lambda size: 0.001 * size * (1 if device.time_now < 0.5 else 2)
    found = find_throughput(device.call, device, largest=1)
    assert found.images_per_second == pytest.approx(500, rel=0.1)
    assert device.time_now > 5


def test_stops_when_doubling_gains_nothing() -> None:
    device = Device(lambda size: 0.001 * max(size, 8))
    found = find_throughput(device.call, device)
    assert found.images_per_second == pytest.approx(1000)
    assert found.batch_size == 8
    assert max(device.sizes) == 32


def test_reports_the_best_batch_not_the_last() -> None:
    device = Device(lambda size: 0.001 * size * (1 if size <= 16 else 1.5) / min(size, 16))
    found = find_throughput(device.call, device)
    assert found.batch_size == 16
    assert found.largest_batch_size > 16


def test_is_bounded_in_time() -> None:
    device = Device(lambda size: 2.0 + 0.01 * size)
    assert find_throughput(device.call, device).largest_batch_size < 32
    assert device.time_now < 60


def test_nothing_fits() -> None:
    device = Device(lambda size: 1.0, fits=0)
    with pytest.raises(MeasurementError, match="not even one image fits"):
        find_throughput(device.call, device)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_of_the_cpu_runs_out_too(error: Exception) -> None:
    device = Device(lambda size: 0.001, fits=4, error=error)
    found = find_throughput(device.call, device)
    assert found.largest_batch_size == 4


def test_other_errors_are_not_taken_for_full_memory() -> None:
    device = Device(lambda size: 0.001, fits=4, error=RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_throughput(device.call, device)


def test_energy_is_unknown_on_the_cpu() -> None:
    assert energy_per_image(lambda: None, 1, torch.device("cpu")) is None
