"""Conditions that disturb a measurement are named."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vitopt.measure import conditions as module
from vitopt.measure.conditions import Gpu, Poll, summarise, watched


@contextlib.contextmanager
def burning(cpus: list[int]) -> Iterator[None]:
    """A busy process of somebody else's on each of `cpus`."""
    others = []
    for cpu in cpus:
        burn = f"import os, time; os.sched_setaffinity(0, {{{cpu}}}); end = time.time() + 20\n"
        burn += "while time.time() < end: pass"
        # Started by a shell that has ended, they are nobody's children.
        start = ["sh", "-c", f"{sys.executable} -c '{burn}' >/dev/null 2>&1 & echo $!"]
        others.append(int(subprocess.check_output(start)))
    try:
        time.sleep(0.3)
        yield
    finally:
        for other in others:
            os.kill(other, signal.SIGKILL)


def work(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


needs_schedstat = pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="needs Linux's schedstat")


@needs_schedstat
def test_a_core_that_others_work_on_is_named() -> None:
    usable = os.sched_getaffinity(0)
    cpu = min(usable)
    os.sched_setaffinity(0, {cpu})
    try:
        with burning([cpu]), watched(torch.device("cpu")) as conditions:
            work(1.0)
    finally:
        os.sched_setaffinity(0, usable)
    (warning,) = conditions.warnings
    share = re.search(r"waited .* (\d+) % of the time", warning)
    assert share is not None and int(share[1]) >= 30
    assert re.search(r"other processes used \d+ % of the CPU", warning)


@needs_schedstat
def test_others_that_take_no_core_away_are_no_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy all through, on which this process runs whenever it wants to."""
    monkeypatch.setattr(module, "_system_busy_seconds", lambda: time.perf_counter() * (os.cpu_count() or 1))
    monkeypatch.setattr(module, "_threads_seconds", lambda: {"1": (time.perf_counter(), time.perf_counter() / 1000)})
    with watched(torch.device("cpu")) as conditions:
        work(0.05)
    assert conditions.warnings == []


def test_a_system_that_does_not_tell_is_no_disturbance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TASKS", tmp_path / "nowhere")
    with watched(torch.device("cpu")) as conditions:
        pass
    assert conditions.warnings == []


def test_the_others_share_leaves_out_this_process_and_what_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's busy time is made that of this process, so the machine's real load does not matter."""

    def busy() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    monkeypatch.setattr(module, "_system_busy_seconds", busy)
    monkeypatch.setattr(module, "_waited_percent", lambda before, after: 50.0)
    with watched(torch.device("cpu")) as conditions:
        before = busy()
        subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)
        work(0.1)
        assert busy() - before > 0.1
    (warning,) = conditions.warnings
    share = re.search(r"other processes used (\d+) % of the CPU", warning)
    assert share is not None and int(share[1]) <= 5


def fake_nvml(**answers: object) -> SimpleNamespace:
    def answer(name: str):
        def ask(handle: object, *which: object) -> object:
            if name not in answers:
                raise RuntimeError("not supported")
            return answers[name]

        return ask

    names = (
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetTotalEnergyConsumption",
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetClockInfo",
    )
    return SimpleNamespace(nvmlShutdown=lambda: None, **{name: answer(name) for name in names})


def process(pid: int) -> SimpleNamespace:
    return SimpleNamespace(pid=pid)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([process(os.getpid())], []),
        ([process(os.getpid()), process(1)], ["1 other processes hold memory on this GPU"]),
        # In a container the own process has another number: one stranger is taken to be this process.
        ([process(1)], []),
        ([process(1), process(2)], ["2 other processes hold memory on this GPU"]),
    ],
)
def test_other_processes_on_the_gpu(processes: list[SimpleNamespace], expected: list[str]) -> None:
    assert Gpu(fake_nvml(nvmlDeviceGetComputeRunningProcesses=processes), None).strangers() == expected


def test_lowered_clocks_are_named_by_their_reason() -> None:
    gpu = Gpu(fake_nvml(nvmlDeviceGetCurrentClocksEventReasons=0x4 | 0x20), None)
    assert gpu.poll().throttles == (
        "the GPU is at its power limit, so its clocks are lowered",
        "the GPU is too warm, so software has lowered its clocks",
    )


def test_an_old_driver_is_asked_by_the_old_name() -> None:
    gpu = Gpu(fake_nvml(nvmlDeviceGetCurrentClocksThrottleReasons=0x40), None)
    assert gpu.poll().throttles == ("the GPU is too warm, so hardware has lowered its clocks",)


def test_idle_and_application_clocks_are_no_disturbance() -> None:
    assert Gpu(fake_nvml(nvmlDeviceGetCurrentClocksEventReasons=0x1 | 0x2), None).poll().throttles == ()


def test_power_and_clock_are_polled_in_watts_and_megahertz() -> None:
    known = Gpu(fake_nvml(nvmlDeviceGetPowerUsage=612_500, nvmlDeviceGetClockInfo=1755), None).poll()
    assert (known.power_watts, known.clock_mhz) == (612.5, 1755)
    assert Gpu(fake_nvml(), None).poll() == Poll((), None, None)


def test_polls_are_summed_up() -> None:
    load = summarise([Poll(("hot",), 500.0, 1500.0), Poll((), 700.0, 1900.0), Poll(("hot", "power"), None, 1800.0)])
    assert (load.polls, load.mean_power_watts, load.max_power_watts) == (3, 600, 700)
    assert (load.median_clock_mhz, load.min_clock_mhz) == (1800, 1500)
    assert load.throttled == pytest.approx({"hot": 2 / 3, "power": 1 / 3})
    unknown = summarise([Poll((), None, None)])
    assert unknown.mean_power_watts is unknown.min_clock_mhz is None and unknown.throttled == {}


def test_clocks_that_are_lowered_between_start_and_end_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = [0x0, 0x4, 0x4, 0x0]
    gpu = Gpu(fake_nvml(nvmlDeviceGetPowerUsage=700_000), None)
    looked = threading.Event()

    def ask(handle: object) -> int:
        if len(reasons) == 1:
            looked.set()
        return reasons.pop(0) if len(reasons) > 1 else reasons[0]

    gpu._nvml.nvmlDeviceGetCurrentClocksEventReasons = ask
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(Gpu, "open", lambda device: gpu)
    with watched(torch.device("cuda")) as conditions:
        assert looked.wait(10)
    assert conditions.gpu is not None and conditions.gpu.max_power_watts == 700
    assert any(line.startswith("the GPU is at its power limit") for line in conditions.warnings)


def test_energy_is_in_joules_and_unknown_where_not_counted() -> None:
    assert Gpu(fake_nvml(nvmlDeviceGetTotalEnergyConsumption=1500), None).energy_joules() == 1.5
    assert Gpu(fake_nvml(), None).energy_joules() is None


def test_there_is_no_gpu_behind_the_cpu() -> None:
    assert Gpu.open(torch.device("cpu")) is None
