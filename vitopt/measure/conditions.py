"""Conditions of a measurement that make its figures deserve less trust: a busy CPU, a shared or throttled GPU."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch

_BUSY_CPU_PERCENT = 15


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[list[str]]:
    """Yield a list that holds, once the block is done, a sentence for every condition that disturbs timing."""
    warnings: list[str] = []
    gpu = Gpu.open(device)
    if gpu is not None:
        warnings += gpu.disturbances()
    before, own_before, started = _system_busy_seconds(), _own_seconds(), time.perf_counter()
    yield warnings
    others = (_system_busy_seconds() - before) - (_own_seconds() - own_before)
    percent = 100 * others / ((time.perf_counter() - started) * (os.cpu_count() or 1))
    if percent > _BUSY_CPU_PERCENT:
        warnings.append(f"other processes used {percent:.0f} % of the CPU while latency was measured")
    if gpu is not None:
        warnings += [line for line in gpu.disturbances() if line not in warnings]
        gpu.close()


def _system_busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _own_seconds() -> float:
    """CPU time of this process and of those it started, such as a compiler's."""
    own = psutil.Process()
    seconds = 0.0
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            times = process.cpu_times()
            seconds += times.user + times.system
            seconds += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return float(seconds)


class Gpu:
    """One GPU as NVML sees it; absent where NVML or its Python binding is."""

    def __init__(self, nvml: Any, handle: Any):
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, device: torch.device) -> "Gpu | None":
        """The GPU behind a torch device, found by its PCI address; None on the CPU or without NVML."""
        if device.type != "cuda":
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
            properties = torch.cuda.get_device_properties(device)
            address = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(address.encode()))
        except Exception:  # no binding, no library, or a driver that will not say: measuring goes on without
            return None

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def disturbances(self) -> list[str]:
        """A sentence for each thing that slows this GPU down at the moment."""
        found = []
        others = [p.pid for p in self._ask("nvmlDeviceGetComputeRunningProcesses", []) if p.pid != os.getpid()]
        # In a container NVML gives the host's process numbers: one process there may be this one.
        if len(others) > (0 if self._sees_own_process() else 1):
            found.append(f"{len(others)} other processes hold memory on this GPU")
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", 0) or self._ask(
            "nvmlDeviceGetCurrentClocksThrottleReasons", 0
        )
        found += [sentence for bit, sentence in _THROTTLES.items() if reasons & bit]
        return found

    def energy_joules(self) -> float | None:
        """Energy since the driver was loaded; None where the GPU does not count it."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption", None)
        return None if millijoules is None else millijoules / 1000

    def _sees_own_process(self) -> bool:
        return any(p.pid == os.getpid() for p in self._ask("nvmlDeviceGetComputeRunningProcesses", []))

    def _ask(self, function: str, otherwise: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle)
        except Exception:  # older drivers and virtual GPUs lack some questions
            return otherwise


# Bits of nvmlClocksEventReasons (NVML API reference).
_THROTTLES = {
    0x4: "the GPU is at its power limit, so its clocks are lowered",
    0x8: "the GPU's hardware has lowered its clocks (power or temperature)",
    0x20: "the GPU is too warm, so software has lowered its clocks",
    0x40: "the GPU is too warm, so hardware has lowered its clocks",
    0x80: "the GPU's power supply has lowered its clocks",
}
