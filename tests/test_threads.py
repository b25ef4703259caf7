"""Threads bound to cores: what is refused, which cores are chosen, and where the live threads really are."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vitopt import threads
from vitopt.environment import devices, machine
from vitopt.errors import RecipeError, UnsupportedError

ROOT = Path(__file__).parents[1]
USABLE = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
CORES = threads.physical_cores(USABLE)
needs_linux = pytest.mark.skipif(not USABLE, reason="the system does not tell which CPUs may be used")
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="needs two physical cores")


def write_siblings(folder: Path, siblings: dict[int, str]) -> Path:
    """A /sys/devices/system/cpu with the `thread_siblings_list` of some CPUs."""
    for cpu, listed in siblings.items():
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{listed}\n")
    return folder


# Which cores


@pytest.mark.parametrize(
    ("siblings", "usable", "cores"),
    [
        ({0: "0", 1: "1"}, {0, 1}, [0, 1]),  # no hyper-threading
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, {0, 1, 2, 3}, [0, 2]),  # neighbours, as on POWER and some AMD
        ({cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}, set(range(8)), [0, 1, 2, 3]),  # as on most servers
        ({cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}, {2, 5, 6, 7}, [2, 5, 7]),  # a container's share
        ({cpu: f"{8 * (cpu // 8)}-{8 * (cpu // 8) + 7}" for cpu in range(24)}, set(range(24)), [0, 8, 16]),  # SMT 8
        ({0: "0,11", 2: "2", 10: "10", 11: "0,11"}, {10, 2, 11, 0}, [0, 2, 10]),  # in order of numbers, not of text
        ({}, {0, 3}, [0, 3]),  # the system says nothing
        ({0: "0,1", 1: ""}, {0, 1}, [0, 1]),
        ({0: "0"}, set(), []),
    ],
)
def test_one_hardware_thread_per_core(
    siblings: dict[int, str], usable: set[int], cores: list[int], tmp_path: Path
) -> None:
    assert threads.physical_cores(usable, write_siblings(tmp_path, siblings)) == cores


# Refusals


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment's own settings, which no refusal may touch."""
    own = {"OMP_NUM_THREADS": "3", "OMP_PROC_BIND": "false", "OMP_PLACES": "sockets", "MKL_NUM_THREADS": "3"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    yield
    assert {name: os.environ.get(name) for name in own} == own


@pytest.mark.usefixtures("settings")
class TestRefusals:
    @pytest.mark.parametrize("count", [0, -1])
    def test_no_threads(self, count: int) -> None:
        with pytest.raises(RecipeError, match=rf"^cannot bind {count} threads; ask for 1 or more$"):
            threads.bind(count)

    @pytest.mark.parametrize(
        ("usable", "there"), [({0}, "1 physical core"), ({0, 4}, "1 physical core"), ({0, 1, 5}, "2 physical cores")]
    )
    def test_more_threads_than_cores(
        self, usable: set[int], there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tree = write_siblings(tmp_path, {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
        cores = threads.physical_cores(usable, tree)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable, raising=False)
        monkeypatch.setattr(threads, "physical_cores", lambda cpus: cores)
        with pytest.raises(UnsupportedError) as refused:
            threads.bind(3)
        assert str(refused.value) == f"cannot bind 3 threads: this process may use {there}, each takes one thread"

    @pytest.mark.parametrize("system", ["Darwin", "Windows"])
    def test_a_system_without_affinity(self, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(platform, "system", lambda: system)
        with pytest.raises(UnsupportedError) as refused:
            threads.bind(1)
        assert str(refused.value) == f"threads cannot be bound to cores on {system}; leave --threads out"
        assert not threads.are_bound(1)

    @needs_linux
    def test_torch_is_imported(self) -> None:
        assert "torch" in sys.modules
        with pytest.raises(UnsupportedError, match=r"^threads can be bound only before torch is imported"):
            threads.bind(1)

    @needs_linux
    def test_several_processes_of_one_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UnsupportedError, match=r"^--threads is for one process: those of this launch"):
            threads.bind(1)


# How they wait


@pytest.fixture
def waiting_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.WAITING:
        monkeypatch.setenv(name, "")  # so that what the test sets is taken away after it
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("waiting_unset")
@pytest.mark.parametrize("own", [None, *threads.WAITING])
def test_threads_wait_shortly_unless_the_user_says_how(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    if own is not None:
        monkeypatch.setenv(own, "7")
    threads.wait_briefly()
    short = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
    assert threads.waiting() == (short if own is None else {own: "7"})


@pytest.mark.usefixtures("waiting_unset")
def test_a_library_that_is_loaded_is_not_told_how_to_wait() -> None:
    assert "torch" in sys.modules
    threads.wait_briefly()
    assert threads.waiting() == {}


@needs_linux
def test_the_library_of_the_live_threads_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.resolve_device("cpu") and "omp" in str(threads.library())
    monkeypatch.setattr(threads, "_MAPS", tmp_path / "nowhere")
    assert threads.library() is None


# The live threads

EXPERIMENT = """
import json, os, subprocess, sys
from vitopt import threads

def allowed():
    lists = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as status:
            lists += [line.split()[1] for line in status if line.startswith("Cpus_allowed_list:")]
    return sorted(lists)

def forked():
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, json.dumps(sorted(os.sched_getaffinity(0))).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(reading, 10_000))

def started():
    own = "import json, os; print(json.dumps(sorted(os.sched_getaffinity(0))))"
    return json.loads(subprocess.run([sys.executable, "-c", own], capture_output=True, check=True).stdout)

count = int(sys.argv[1])
found = {"cpus": threads.bind(count) if count else []}
import torch
found["before"] = threads.are_bound(max(count, 2))
a = torch.randn(1024, 1024)
a @ a
found |= {"threads": torch.get_num_threads(), "allowed": allowed(), "bound": threads.are_bound(max(count, 1))}
found |= {"more": threads.are_bound(count + 1), "forked": forked(), "started": started()}
with threads.unbound():
    found |= {"unbound": started(), "meanwhile": threads.are_bound(max(count, 1))}
found["after"] = allowed()
from vitopt.environment import devices, machine
facts = machine.describe(torch.device("cpu"))
found["facts"] = [facts["torch_threads"], facts["threads_bound"]]
print(json.dumps(found))
"""


def experiment(count: int, **variables: str) -> dict[str, Any]:
    """What a new process sees of itself after binding `count` threads (0: none) and a matrix product."""
    command = [sys.executable, "-c", EXPERIMENT, str(count)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | variables)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@needs_two_cores
def test_two_threads_are_held_on_two_cores() -> None:
    found = experiment(2)
    assert found["cpus"] == CORES[:2] and found["threads"] == 2
    single = [listed for listed in found["allowed"] if listed.isdigit()]
    assert set(single) == {str(cpu) for cpu in CORES[:2]}
    assert found["before"] is False, "the second thread does not exist yet"
    assert found["bound"] is True and found["more"] is False
    assert found["facts"] == [2, True]


@needs_two_cores
def test_helpers_may_leave_the_first_core() -> None:
    found = experiment(2)
    assert found["started"] == CORES[:1], "what OpenMP does to all that its first thread starts"
    assert found["forked"] == found["unbound"] == sorted(USABLE)
    assert found["meanwhile"] is False and found["after"] == found["allowed"]


@needs_two_cores
@pytest.mark.parametrize(
    "variables",
    [
        {"MKL_NUM_THREADS": "1"},
        {"OMP_THREAD_LIMIT": "1"},
        {"OMP_DYNAMIC": "true"},
        {"GOMP_CPU_AFFINITY": "0", "OMP_PROC_BIND": "false", "OMP_PLACES": "sockets", "OMP_NUM_THREADS": "1"},
    ],
)
def test_earlier_settings_do_not_overrule(variables: dict[str, str]) -> None:
    found = experiment(2, **variables)
    assert (found["threads"], found["bound"], found["facts"]) == (2, True, [2, True])


@needs_linux
def test_one_thread() -> None:
    found = experiment(1)
    assert found["cpus"] == CORES[:1] and str(CORES[0]) in found["allowed"]
    assert (found["threads"], found["bound"], found["facts"]) == (1, True, [1, True])


@needs_two_cores
def test_nothing_is_bound_unasked() -> None:
    found = experiment(0, OMP_NUM_THREADS="2")
    assert all(not listed.isdigit() for listed in found["allowed"])
    assert found["bound"] is False and found["facts"] == [2, False]
    assert found["forked"] == found["started"] == found["unbound"] == sorted(USABLE)


@needs_two_cores
def test_asking_too_late_is_seen_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.setenv("OMP_PLACES", "cores")
    assert machine.describe(devices.resolve_device("cpu"))["threads_bound"] is False
