"""What this machine can run: devices, formats, attention kernels, library versions, quiet libraries."""

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from vitopt.errors import UnsupportedError
from vitopt.formats import AMPERE, FORMATS, Format
from vitopt.recipe import Attention, SdpaKernel
from vitopt.threads import are_bound

T = TypeVar("T")

logger = logging.getLogger(__name__)

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchao",
    "flash-attn",
    "accelerate",
    "evaluate",
    "datasets",
    "safetensors",
    "torchvision",
    "numpy",
    "pillow",
)
_SHOWS_ONLY = ("cli/", "__main__.py", "progress.py", "report/")

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(requested: str = "auto") -> torch.device:
    """Return the device to run on; `auto` is the first CUDA device, else the CPU.

    Raises:
        UnsupportedError: CUDA was asked for and is not there.
    """
    if requested == "auto":
        requested = "cuda" if torch.cuda.is_available() else "cpu"
        if requested == "cpu" and _driver_version() is not None:
            logger.warning("there is an NVIDIA driver, but this runs on the CPU: %s", _why_no_cuda())
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise UnsupportedError(f"no device {requested!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"device {requested!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UnsupportedError(f"device {requested}: {_why_no_cuda()}; use --device cpu")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UnsupportedError(f"device cuda:{index} is not there: {torch.cuda.device_count()} CUDA device(s)")
        device = torch.device("cuda", index)
    return device


def _why_no_cuda() -> str:
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


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def _needs(package: str) -> str | None:
    return None if installed(package) else f"{package} is not installed (pip install {package.replace('_', '-')})"


def _capability_below(device: torch.device, least: tuple[int, int]) -> str | None:
    capability = compute_capability(device)
    if capability is None or capability >= least:
        return None
    has, wants = (".".join(map(str, version)) for version in (capability, least))
    return f"compute capability {has} is below {wants}"


def why_not_format(format: Format, device: torch.device) -> str | None:
    """Why `format` cannot run on `device`, or None when it can."""
    facts = FORMATS[format]
    if device.type != "cuda" and facts.not_on_cpu:
        return facts.not_on_cpu
    missing = _needs(facts.library) if facts.library else None
    return missing or (_capability_below(device, facts.capability) if facts.capability else None)


def require_format(format: Format, device: torch.device) -> None:
    """Raise UnsupportedError with the reason and the nearest format that can run, if `format` cannot."""
    if reason := why_not_format(format, device):
        nearest = format
        while why_not_format(nearest, device) is not None:
            nearest = FORMATS[nearest].nearest
        raise UnsupportedError(f"format {format} cannot run on {device}: {reason}; the nearest that can is {nearest}")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic, so that bf16 is faster than fp32 and not merely smaller."""
    if device.type == "cuda":
        return _capability_below(device, AMPERE) is None
    flags = Path("/proc/cpuinfo")
    return flags.exists() and bool({"avx512_bf16", "amx_bf16"} & set(flags.read_text(errors="replace").split()))


def why_not_attention(attention: Attention, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an attention implementation cannot run, or None when it can."""
    if attention != "flash_attention_2":
        return None
    if device.type != "cuda":
        return "FlashAttention-2 needs a CUDA device"
    if reason := _capability_below(device, AMPERE) or _needs("flash_attn"):
        return reason
    if dtype not in (torch.float16, torch.bfloat16):
        return "FlashAttention-2 computes in 16 bit only, the model is fp32"
    return None


def why_not_kernel(kernel: SdpaKernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel of scaled dot product attention cannot run, or None when it can."""
    if kernel in ("auto", "math"):
        return None
    if device.type != "cuda":
        return None if kernel == "flash" else f"the {kernel} kernel needs a CUDA device"
    if kernel == "cudnn" and not torch.backends.cudnn.is_available():
        return "torch finds no cuDNN"
    if kernel != "efficient" and dtype not in (torch.float16, torch.bfloat16):
        return f"the {kernel} kernel computes in 16 bit only, the model is fp32"
    return None if kernel == "efficient" else _capability_below(device, AMPERE)


def versions() -> dict[str, str | None]:
    """Installed version of every library whose version changes results; None when absent."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def code_digest() -> str:
    """Hex digest of vitopt's own code, less what only asks and shows: other code may give other results.

    A release is told by its version; between releases only the code itself tells.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(_SHOWS_ONLY):
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """What a result depends on beside its inputs: vitopt, the libraries and, for what is measured, the device."""
    from vitopt import __version__

    found: dict[str, Any] = {"vitopt": __version__, "code": code_digest(), "libraries": versions()}
    if device is not None:
        found |= {"device": str(device), "processor": processor_name(), "gpu": _gpu(device)}
    return found


def threads_bound() -> bool:
    """Whether as many threads as torch computes with are each held on a CPU of their own.

    Read back from the live threads: the environment variables that ask for it can be set too late, or overruled.
    """
    if are_bound(1):
        # OpenMP starts its other threads with the first loop it shares out, which takes more than 32,768 elements.
        torch.ones(2**17, dtype=torch.uint8)
    return are_bound(torch.get_num_threads())


def describe(device: torch.device) -> dict[str, Any]:
    """The environment that every record carries: versions, device, processor, threads."""
    from vitopt import __version__

    return {
        "vitopt": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "threads_bound": threads_bound(),
        "device": str(device),
        "libraries": versions(),
        "gpu": _gpu(device),
    }


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
    }


def diagnose(device: torch.device) -> dict[str, dict[str, Any]]:
    """What `vitopt doctor` prints: the machine, the libraries, and what can run (None) or why it cannot."""
    facts = describe(device)
    libraries = facts.pop("libraries")
    gpu = facts.pop("gpu") or {}
    half = torch.bfloat16
    reasons: dict[str, Any] = {f"format {format}": why_not_format(format, device) for format in get_args(Format)}
    reasons |= {f"attention {name}": why_not_attention(name, device, half) for name in get_args(Attention)}
    kernels = [kernel for kernel in get_args(SdpaKernel) if kernel != "auto"]
    reasons |= {f"sdpa kernel {name}": why_not_kernel(name, device, half) for name in kernels}
    machine = facts | {f"gpu {key}": value for key, value in gpu.items()}
    if device.type == "cpu":
        machine["cuda"] = _why_no_cuda() if not torch.cuda.is_available() else "available, not asked for"
        machine["bf16 arithmetic"] = "yes" if computes_in_bf16(device) else "no: bf16 works but is slow"
    return {"machine": machine, "libraries": libraries, "can_run": reasons}


def processor_name() -> str:
    """Marketing name of the CPU where the system tells it, else its architecture."""
    with_name = Path("/proc/cpuinfo")
    if with_name.exists():
        for line in with_name.read_text(errors="replace").splitlines():
            if line.startswith("model name") and (name := line.partition(":")[2].strip()) != "unknown":
                return name
    return platform.processor() or platform.machine()


def _driver_version() -> str | None:
    version_file = Path("/proc/driver/nvidia/version")
    if not version_file.exists():
        return None
    words = version_file.read_text(errors="replace").split()
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), None)


def quiet_libraries() -> None:
    """Keep the libraries' notices and bars off the terminal; vitopt shows its own."""
    for name in (
        "torchao",
        "bitsandbytes",
        "torch.utils._pytree",
        "torch._inductor",
        "transformers",
        "accelerate",
        "peft",
        "datasets",
        "huggingface_hub",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|torch|torchao|peft)\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._(inductor|functorch|dynamo)\b")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.profiler\b")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's own notices
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # For a transformers that is not imported yet; importing it here would slow every command down.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without its attempt to download CPU kernels, which needs a network."""
    absent = "kernels" not in sys.modules
    if absent:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail at once
    try:
        import bitsandbytes
    finally:
        if absent:
            del sys.modules["kernels"]
    return bitsandbytes


def process_share() -> tuple[int, int]:
    """(rank, processes) under `accelerate launch`, (0, 1) otherwise."""
    state = _distributed_state()
    return (state.process_index, state.num_processes) if state else (0, 1)


def is_main_process() -> bool:
    """Whether this process writes the results."""
    return process_share()[0] == 0


def in_main_process(context: AbstractContextManager[None]) -> AbstractContextManager[None]:
    """`context` in the main process, nothing to enter in the others."""
    return context if is_main_process() else contextlib.nullcontext()


def gather_objects(value: T) -> list[T]:
    """What every process passed, in order of rank; all processes must call it."""
    state = _distributed_state()
    if state is None:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def wait_for_all() -> None:
    """Return when all processes of this launch have come here."""
    if state := _distributed_state():
        state.wait_for_everyone()


@functools.cache
def _distributed_state() -> Any:
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    from accelerate import PartialState

    # Only the main process measures latency, and the others must not give up on it meanwhile.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(hours=6))
