"""Conditions that disturb a measurement are named."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch

from vitopt.measure import conditions as module
from vitopt.measure.conditions import Gpu, Poll, summarise, watched


def test_a_busy_machine_is_named() -> None:
    burn = f'{sys.executable} -c "import time; end = time.time() + 20\nwhile time.time() < end: pass"'
    # Started by a shell that has ended, they are nobody's children.
    start = ["sh", "-c", f"{burn} >/dev/null 2>&1 & echo $!"]
    others = [int(subprocess.check_output(start)) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.3)
        with watched(torch.device("cpu")) as conditions:
            time.sleep(1.0)
    finally:
        for other in others:
            os.kill(other, signal.SIGKILL)
    warnings = conditions.warnings
    assert len(warnings) == 1 and conditions.gpu is None
    assert "other processes used" in warnings[0]
    assert "% of the CPU while latency was measured" in warnings[0]


def test_own_work_is_not_counted_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's busy time is made that of this process alone, so the machine's real load does not matter."""
    times = psutil.Process().cpu_times()
    offset = times.user + times.system
    own = lambda: sum(psutil.Process().cpu_times()[:2]) - offset  # noqa: E731
    monkeypatch.setattr(module, "_system_busy_seconds", own)
    with watched(torch.device("cpu")) as conditions:
        end = time.perf_counter() + 0.5
        while time.perf_counter() < end:
            pass
    assert conditions.warnings == []


def test_what_this_process_has_started_works_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    monkeypatch.setattr(module, "_system_busy_seconds", busy)
    with watched(torch.device("cpu")) as conditions:
        before = busy()
        subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
        assert busy() - before > 0.1
    assert conditions.warnings == []


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
