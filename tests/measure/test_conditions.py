"""Conditions that disturb a measurement are named."""

import os
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from vitopt.measure import conditions
from vitopt.measure.conditions import Gpu, watched


def test_a_busy_machine_is_named() -> None:
    burn = f'{sys.executable} -c "import time; end = time.time() + 20\nwhile time.time() < end: pass"'
    # Started by a shell that has ended, they are nobody's children.
    start = ["sh", "-c", f"{burn} >/dev/null 2>&1 & echo $!"]
    others = [int(subprocess.check_output(start)) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.3)
        with watched(torch.device("cpu")) as warnings:
            time.sleep(1.0)
    finally:
        for other in others:
            os.kill(other, signal.SIGKILL)
    assert len(warnings) == 1
    assert "other processes used" in warnings[0]
    assert "% of the CPU while latency was measured" in warnings[0]


def test_own_work_is_not_counted_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's busy time is made that of this process alone, so the machine's real load does not matter."""
    times = psutil.Process().cpu_times()
    offset = times.user + times.system
    own = lambda: sum(psutil.Process().cpu_times()[:2]) - offset  # noqa: E731
    monkeypatch.setattr(conditions, "_system_busy_seconds", own)
    with watched(torch.device("cpu")) as warnings:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
    assert warnings == []


def test_what_this_process_has_started_works_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    monkeypatch.setattr(conditions, "_system_busy_seconds", busy)
    with watched(torch.device("cpu")) as warnings:
        before = busy()
        subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
        assert busy() - before > 0.1
    assert warnings == []


def fake_nvml(**answers: object) -> SimpleNamespace:
    def answer(name: str):
        def ask(handle: object) -> object:
            if name not in answers:
                raise RuntimeError("not supported")
            return answers[name]

        return ask

    names = (
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
        "nvmlDeviceGetTotalEnergyConsumption",
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
    assert Gpu(fake_nvml(nvmlDeviceGetComputeRunningProcesses=processes), None).disturbances() == expected


def test_lowered_clocks_are_named_by_their_reason() -> None:
    gpu = Gpu(fake_nvml(nvmlDeviceGetCurrentClocksEventReasons=0x4 | 0x20), None)
    assert gpu.disturbances() == [
        "the GPU is at its power limit, so its clocks are lowered",
        "the GPU is too warm, so software has lowered its clocks",
    ]


def test_an_old_driver_is_asked_by_the_old_name() -> None:
    gpu = Gpu(fake_nvml(nvmlDeviceGetCurrentClocksThrottleReasons=0x40), None)
    assert gpu.disturbances() == ["the GPU is too warm, so hardware has lowered its clocks"]


def test_idle_and_application_clocks_are_no_disturbance() -> None:
    assert Gpu(fake_nvml(nvmlDeviceGetCurrentClocksEventReasons=0x1 | 0x2), None).disturbances() == []


def test_energy_is_in_joules_and_unknown_where_not_counted() -> None:
    assert Gpu(fake_nvml(nvmlDeviceGetTotalEnergyConsumption=1500), None).energy_joules() == 1.5
    assert Gpu(fake_nvml(), None).energy_joules() is None


def test_there_is_no_gpu_behind_the_cpu() -> None:
    assert Gpu.open(torch.device("cpu")) is None
