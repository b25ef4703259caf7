"""Conditions of a measurement that make its figures deserve less trust: a busy CPU, a shared or throttled GPU.

That other processes are busy is no harm while there are cores for all; that this process's threads were ready to run
and got no core is. It slows all calls alike, so the samples' spread (`latency_rows`) need not show it.
"""

import contextlib
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from vitopt.environment import devices
from vitopt.records import GpuLoad

_WAITED_PERCENT = 10  # of what threads wanted to run; where nothing disturbs them it is below 1
_TASKS = Path("/proc/self/task")
_POLL_SECONDS = 0.25


@dataclass
class Conditions:
    """What was seen while latency was measured: a sentence for each disturbance, and on a GPU its clocks and power."""

    warnings: list[str] = field(default_factory=list)
    gpu: GpuLoad | None = None


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[Conditions]:
    """Yield what is known, once the block is done, about conditions that disturb timing."""
    conditions = Conditions()
    gpu = Gpu.open(device)
    if gpu is not None:
        conditions.warnings += gpu.strangers()
    before, own_before, started = _system_busy_seconds(), _own_seconds(), time.perf_counter()
    threads = _threads_seconds()
    with _polled(gpu) as polls:
        yield conditions
    waited = _waited_percent(threads, _threads_seconds())
    if waited > _WAITED_PERCENT:
        others = max(0.0, _system_busy_seconds() - before - (_own_seconds() - own_before))
        percent = 100 * others / ((time.perf_counter() - started) * (os.cpu_count() or 1))
        conditions.warnings.append(
            f"calls waited for the CPU in {waited:.0f} % of the time in which they could have run: "
            f"other processes used {percent:.0f} % of the CPU, so these latencies are too long"
        )
    if gpu is not None:
        conditions.gpu = summarise(polls)
        conditions.warnings += [line for line in gpu.strangers() if line not in conditions.warnings]
        conditions.warnings += [
            f"{reason} (in {100 * share:.0f} % of {len(polls)} looks while latency was measured)"
            for reason, share in conditions.gpu.throttled.items()
        ]
        gpu.close()


@contextlib.contextmanager
def _polled(gpu: "Gpu | None") -> Iterator[list["Poll"]]:
    """Look at the GPU again and again while the block runs: clocks fall under load and recover when it ends."""
    polls: list[Poll] = []
    if gpu is None:
        yield polls
        return
    done = threading.Event()

    def look() -> None:
        while True:
            polls.append(gpu.poll())
            if done.wait(_POLL_SECONDS):
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield polls
    finally:
        done.set()
        watcher.join()


@dataclass(frozen=True)
class Poll:
    """A GPU at one moment; None for what its driver does not tell."""

    throttles: tuple[str, ...]
    power_watts: float | None
    clock_mhz: float | None


def summarise(polls: Sequence[Poll]) -> GpuLoad:
    """Means over looks at a GPU, and the share of them in which its clocks were lowered, by reason."""
    watts = [poll.power_watts for poll in polls if poll.power_watts is not None]
    clocks = [poll.clock_mhz for poll in polls if poll.clock_mhz is not None]
    counts = Counter(reason for poll in polls for reason in poll.throttles)
    return GpuLoad(
        polls=len(polls),
        mean_power_watts=statistics.fmean(watts) if watts else None,
        max_power_watts=max(watts, default=None),
        median_clock_mhz=statistics.median(clocks) if clocks else None,
        min_clock_mhz=min(clocks, default=None),
        throttled={reason: count / len(polls) for reason, count in counts.items()},
    )


def _threads_seconds() -> dict[str, tuple[float, float]]:
    """Seconds that each thread of this process ran, and that it was ready and waited for a CPU.

    Empty where the system does not tell. Source: Linux, Documentation/scheduler/sched-stats.rst.
    """
    seconds = {}
    with contextlib.suppress(OSError):
        for task in _TASKS.iterdir():
            with contextlib.suppress(OSError, ValueError):  # it has ended meanwhile, or the kernel keeps no such count
                ran, waited = (task / "schedstat").read_text().split()[:2]
                seconds[task.name] = int(ran) / 1e9, int(waited) / 1e9
    return seconds


def _waited_percent(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]) -> float:
    """Share of the time since `before` that threads waited, of what they ran and waited."""
    begun = [before.get(name, (0.0, 0.0)) for name in after]
    ran, waited = (sum(now[i] - then[i] for now, then in zip(after.values(), begun, strict=True)) for i in (0, 1))
    return 100 * waited / (ran + waited) if waited > 0 else 0.0


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
        """The GPU behind a torch device; None on the CPU or without NVML."""
        address = devices.pci_address(device)
        return cls.at(address) if address else None

    @classmethod
    def at(cls, address: str) -> "Gpu | None":
        """The GPU at a PCI address, which need not be one of this process; None without NVML."""
        try:
            import pynvml

            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(address.encode()))
        except Exception:  # no binding, no library, or a driver that does not tell: measuring goes on without
            return None

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def strangers(self) -> list[str]:
        """A sentence if other processes hold memory on this GPU."""
        others = [p.pid for p in self._ask("nvmlDeviceGetComputeRunningProcesses", default=[]) if p.pid != os.getpid()]
        # In a container NVML gives the host's process numbers: one process there may be this one.
        if len(others) > (0 if self._sees_own_process() else 1):
            return [f"{len(others)} other processes hold memory on this GPU"]
        return []

    def poll(self) -> Poll:
        """Why its clocks are lowered at the moment, its power and the clock of its multiprocessors."""
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", default=0) or self._ask(
            "nvmlDeviceGetCurrentClocksThrottleReasons", default=0
        )
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return Poll(
            throttles=tuple(sentence for bit, sentence in _THROTTLES.items() if reasons & bit),
            power_watts=None if milliwatts is None else milliwatts / 1000,
            clock_mhz=self._ask("nvmlDeviceGetClockInfo", _SM_CLOCK),
        )

    def energy_joules(self) -> float | None:
        """Energy since the driver was loaded; None where the GPU does not count it."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def busy_percent(self) -> float | None:
        """Share of the last moments in which anything ran on it; None where the driver does not tell."""
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        return None if rates is None else float(rates.gpu)

    def _sees_own_process(self) -> bool:
        return any(p.pid == os.getpid() for p in self._ask("nvmlDeviceGetComputeRunningProcesses", default=[]))

    def _ask(self, function: str, *arguments: int, default: Any = None) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except Exception:  # older drivers and virtual GPUs lack some questions
            return default


_SM_CLOCK = 1  # NVML_CLOCK_SM

# Bits of nvmlClocksEventReasons (NVML API reference).
_THROTTLES = {
    0x4: "the GPU is at its power limit, so its clocks are lowered",
    0x8: "the GPU's hardware has lowered its clocks (power or temperature)",
    0x20: "the GPU is too warm, so software has lowered its clocks",
    0x40: "the GPU is too warm, so hardware has lowered its clocks",
    0x80: "the GPU's power supply has lowered its clocks",
}
