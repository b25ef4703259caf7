"""OpenMP's threads: how long they spin while they wait, and one per physical core, each held there.

A thread that waits for the others of its team spins, so that it goes on at once. Beside another busy process the
others may have no core to finish on, because it is spun on: a training step on two shared cores took 2.8 times as long
as with a short spin. On a core of its own a thread wakes within microseconds.

A thread that the system moves finds cold caches, and two threads on the two hardware threads of one core share its
arithmetic units. OpenMP places threads itself (OpenMP 4.5, sections 4.2, 4.4, 4.5: `OMP_NUM_THREADS`,
`OMP_PROC_BIND`, `OMP_PLACES`), but its library reads these variables once, when torch loads it. So nothing here
imports torch.

OpenMP also holds the thread that loaded it, and what that thread starts inherits one single CPU: `unbound` is for
whoever starts helpers.
"""

import contextlib
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from vitopt.errors import RecipeError, UnsupportedError

_TOPOLOGY = Path("/sys/devices/system/cpu")
_TASKS = Path("/proc/self/task")
_MAPS = Path("/proc/self/maps")
# Each of these overrules or lowers the number of threads or where they go; MKL's number even becomes torch's.
_CONTRADICTING = ("MKL_NUM_THREADS", "OMP_DYNAMIC", "OMP_THREAD_LIMIT", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")

# Each of these says how long threads spin; libgomp reads the first two, Intel's and LLVM's libraries the last.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# 1,000 turns of a loop (libgomp's default on cores that it takes for its own is 300,000) and 1 ms (default 200 ms).
_SHORT = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}

# What this process might use before `bind`; None while nothing is bound.
_usable: set[int] | None = None


def wait_briefly() -> None:
    """Let OpenMP's threads, which torch starts later, spin only shortly while they wait.

    Changes `os.environ`, which subprocesses inherit; nothing where the user has said how threads wait, or where torch
    is imported already and would not be told.
    """
    if "torch" not in sys.modules and not waiting():
        os.environ.update(_SHORT)


def waiting() -> dict[str, str]:
    """What this process's environment says about how threads wait; empty for the library's own default."""
    return {name: os.environ[name] for name in WAITING if name in os.environ}


def library() -> str | None:
    """File name of the OpenMP library that this process has loaded, None where none is or the system does not tell."""
    with contextlib.suppress(OSError):
        for line in _MAPS.read_text(errors="replace").splitlines():
            name = line.rpartition("/")[2]
            if name.startswith(("libgomp", "libiomp", "libomp")):
                return name
    return None


def bind(count: int) -> list[int]:
    """Let torch, imported later, compute with `count` threads, each on a physical core of its own.

    Changes `os.environ`, which subprocesses inherit; settings of the same variables are overwritten.

    Returns:
        The numbers of the CPUs, one per thread, lowest first.

    Raises:
        RecipeError: `count` is below 1.
        UnsupportedError: the system does not tell which CPUs may be used, there are fewer physical cores than
            `count`, several processes of one launch would bind to the same cores, or torch is imported already.
    """
    global _usable
    if count < 1:
        raise RecipeError(f"cannot bind {count} threads; ask for 1 or more")
    if not hasattr(os, "sched_getaffinity"):
        raise UnsupportedError(f"threads cannot be bound to cores on {platform.system()}; leave --threads out")
    usable = os.sched_getaffinity(0)
    cores = physical_cores(usable)
    if count > len(cores):
        there = "1 physical core" if len(cores) == 1 else f"{len(cores)} physical cores"
        raise UnsupportedError(f"cannot bind {count} threads: this process may use {there}, each takes one thread")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UnsupportedError("--threads is for one process: those of this launch would all bind to the same cores")
    if "torch" in sys.modules:
        raise UnsupportedError("threads can be bound only before torch is imported; bind them first in a new process")
    chosen = cores[:count]
    for name in _CONTRADICTING:
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ["OMP_PROC_BIND"] = "close"
    os.environ["OMP_PLACES"] = ",".join(f"{{{cpu}}}" for cpu in chosen)
    if _usable is None:
        # torch.utils.data's worker processes decode images; on the first thread's core they would only disturb it.
        os.register_at_fork(after_in_child=_release)
    _usable = usable
    return chosen


def physical_cores(cpus: Iterable[int], topology: Path = _TOPOLOGY) -> list[int]:
    """The lowest of `cpus` on each physical core; a CPU that the system says nothing about is a core of its own."""
    cores: dict[str, int] = {}
    for cpu in sorted(cpus):
        try:
            # All hardware threads of one core show the same list.
            siblings = (topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            siblings = ""
        cores.setdefault(siblings or str(cpu), cpu)
    return list(cores.values())


def are_bound(count: int) -> bool:
    """Whether the calling thread and at least `count` - 1 others of this process are each held on a CPU of its own.

    Read from the live threads, so a pool of threads has to be started before; false where the system does not tell.
    """
    if not hasattr(os, "sched_getaffinity") or not _TASKS.is_dir() or len(os.sched_getaffinity(0)) > 1:
        return False
    held = set()
    for task in _TASKS.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            held.add(frozenset(os.sched_getaffinity(int(task.name))))
    return sum(len(cpus) == 1 for cpus in held) >= count


@contextlib.contextmanager
def unbound() -> Iterator[None]:
    """Threads and processes started within may run on every CPU that this process had before `bind`."""
    if _usable is None:
        yield
        return
    bound = os.sched_getaffinity(0)
    _release()
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def _release() -> None:
    if _usable is not None:
        os.sched_setaffinity(0, _usable)
