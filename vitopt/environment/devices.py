"""The device to run on, and what it is."""

import hashlib
import logging
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from vitopt.errors import UnsupportedError
from vitopt.formats import AMPERE

# What torch's compiler calls programmatic dependent launch among its options.
DEPENDENT_LAUNCH = "triton.enable_pdl"

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(requested: str = "auto") -> torch.device:
    """Return the device to run on, and make it the current one; `auto` is the first CUDA device, else the CPU.

    Raises:
        UnsupportedError: CUDA was asked for and is not there.
    """
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
        if requested == "cpu" and driver_version() is not None:
            logger.warning("there is an NVIDIA driver, but this runs on the CPU: %s", why_no_cuda())
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise UnsupportedError(f"no device {requested!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {requested!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnsupportedError(f"device {requested}: {why_no_cuda()}; use --device cpu")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UnsupportedError(f"device cuda:{index} is not there: {torch.cuda.device_count()} CUDA device(s)")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)  # streams, events and kernels go to the current one unless told otherwise
    return device


def why_no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.device_count()
    reason = next((str(w.message).splitlines()[0].rstrip(".") for w in caught if "driver" in str(w.message)), None)
    return reason or "torch sees no CUDA device (check `nvidia-smi`)"


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device, None on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic, so that bf16 is faster than fp32 and not merely smaller."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    flags = Path("/proc/cpuinfo")
    return flags.exists() and bool({"avx512_bf16", "amx_bf16"} & set(flags.read_text(errors="replace").split()))


def processor_name() -> str:
    """Marketing name of the CPU where the system tells it, else its architecture."""
    with_name = Path("/proc/cpuinfo")
    if with_name.exists():
        for line in with_name.read_text(errors="replace").splitlines():
            if line.startswith("model name") and (name := line.partition(":")[2].strip()) != "unknown":
                return name
    return platform.processor() or platform.machine()


def kind(device: torch.device) -> str:
    """What machine code for `device` runs on: a name that differs wherever it might not."""
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"{torch.cuda.get_device_name(device)} ({capability})"
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines() if Path("/proc/cpuinfo").exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{processor_name()} (instructions {hashlib.sha256(flags.encode()).hexdigest()[:8]})"


def gpu_facts(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def pci_address(device: torch.device) -> str | None:
    """Of a GPU, as NVML knows it; None on the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def driver_version() -> str | None:
    version_file = Path("/proc/driver/nvidia/version")
    if not version_file.exists():
        return None
    words = version_file.read_text(errors="replace").split()
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)
