"""What a result depends on, as records, fingerprints and `vitopt doctor` tell it."""

import datetime
import functools
import hashlib
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from vitopt import threads
from vitopt.environment import devices
from vitopt.environment.libraries import versions
from vitopt.formats import Format

_SHOWS_ONLY = ("cli/", "__main__.py", "progress.py", "report/")


@functools.cache
def code_digest() -> str:
    """Hex digest of vitopt's own code, without what only reads options and prints: other code may give other results.

    A release is told by its version; between releases only the code itself tells.
    """
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(_SHOWS_ONLY):
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """What a result depends on beside its inputs: vitopt, the libraries and, for what is measured, the device."""
    from vitopt import __version__

    facts: dict[str, Any] = {"vitopt": __version__, "code": code_digest(), "libraries": versions()}
    if device is not None:
        facts |= {"device": str(device), "processor": devices.processor_name(), "gpu": devices.gpu_facts(device)}
    return facts


def occasion() -> dict[str, Any]:
    """The command and the time, as every record tells them."""
    program = Path(sys.argv[0])  # vitopt, vitopt/__main__.py, or a notebook, whose arguments repeat nothing
    return {
        "command": shlex.join(["vitopt", *sys.argv[1:]]) if "vitopt" in (program.stem, program.parent.name) else None,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def threads_bound() -> bool:
    """Whether as many threads as torch computes with are each held on a CPU of their own.

    Read back from the live threads: the environment variables that ask for it can be set too late, or overruled.
    """
    if threads.are_bound(1):
        # OpenMP starts its other threads with the first loop it shares out, which takes more than 32,768 elements.
        torch.ones(2**17, dtype=torch.uint8)
    return threads.are_bound(torch.get_num_threads())


def describe(device: torch.device) -> dict[str, Any]:
    """The environment that every record carries: versions, device, processor, threads."""
    from vitopt import __version__

    return {
        "vitopt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": devices.processor_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "threads_bound": threads_bound(),
        "openmp": {"library": threads.library(), "waiting": threads.waiting()},
        "device": str(device),
        "libraries": versions(),
        "gpu": devices.gpu_facts(device),
    }


def diagnose(device: torch.device) -> dict[str, dict[str, Any]]:
    """What `vitopt doctor` prints: the machine, the libraries, and what can run (None) or why it cannot."""
    # All else here is also told where torch is installed and pydantic is not.
    from vitopt.environment import support
    from vitopt.recipe import ENGINES, Attention, SdpaKernel

    facts = describe(device)
    libraries = facts.pop("libraries")
    gpu = facts.pop("gpu") or {}
    half = torch.bfloat16
    reasons: dict[str, Any] = {
        f"format {format}": support.why_not_format(format, device) for format in get_args(Format)
    }
    reasons |= {f"attention {name}": support.why_not_attention(name, device, half) for name in get_args(Attention)}
    kernels = [kernel for kernel in get_args(SdpaKernel) if kernel != "auto"]
    reasons |= {f"sdpa kernel {name}": support.why_not_kernel(name, device, half) for name in kernels}
    reasons["torch.compile"] = support.why_not_compile(device)
    reasons |= {f"engine {name}": support.why_not_engine(name, device) for name in ENGINES}
    machine = facts | {f"gpu {key}": value for key, value in gpu.items()}
    if device.type == "cpu":
        machine["cuda"] = devices.why_no_cuda() if not torch.cuda.is_available() else "available, not asked for"
        machine["bf16 arithmetic"] = "yes" if devices.computes_in_bf16(device) else "no: bf16 works but is slow"
    return {"machine": machine, "libraries": libraries, "can_run": reasons}
