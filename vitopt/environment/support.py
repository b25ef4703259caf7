"""What a device can run, and why not the rest: formats, attention, kernels."""

import functools
import importlib.util
import subprocess
import sysconfig

import torch

from vitopt.environment.devices import DEPENDENT_LAUNCH, compute_capability
from vitopt.errors import UnsupportedError
from vitopt.formats import AMPERE, FORMATS, HOPPER, Format
from vitopt.recipe import ENGINES, Attention, SdpaKernel


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name, such as W&B's, is not a package


def _needs(package: str) -> str | None:
    return None if installed(package) else f"{package} is not installed (pip install {package.replace('_', '-')})"


def capability_below(device: torch.device, least: tuple[int, int]) -> str | None:
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
    return missing or (capability_below(device, facts.capability) if facts.capability else None)


def require_format(format: Format, device: torch.device) -> None:
    """Raise UnsupportedError with the reason and the nearest format that can run, if `format` cannot."""
    if reason := why_not_format(format, device):
        nearest = format
        while why_not_format(nearest, device) is not None:
            nearest = FORMATS[nearest].nearest
        raise UnsupportedError(f"format {format} cannot run on {device}: {reason}; the nearest that can is {nearest}")


def why_not_compile(device: torch.device) -> str | None:
    """Why `torch.compile` cannot make code for `device`, or None when it can."""
    if device.type == "cuda":
        return _needs("triton")
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return _why_compiler_fails(get_cpp_compiler(), sysconfig.get_path("include"))
    except InvalidCxxCompiler:
        return "no C++ compiler is found (install g++, or name one in CXX)"


@functools.cache
def _why_compiler_fails(compiler: str, headers: str) -> str | None:
    """Why a C++ compiler cannot compile what torch gives it, tried on Python's `headers`; None when it can."""
    command = [compiler, "-fopenmp", "-fsyntax-only", f"-I{headers}", "-x", "c++", "-"]
    done = subprocess.run(command, input="#include <Python.h>\n#include <omp.h>\n", capture_output=True, text=True)
    if done.returncode == 0:
        return None
    first = next((line for line in done.stderr.splitlines() if "error" in line), f"it ended with {done.returncode}")
    return f"{compiler} does not compile Python.h and omp.h: {first}"


def why_not_fused_kernels(device: torch.device) -> str | None:
    """Why vitopt's own kernels cannot run on `device`, or None when they can."""
    if device.type != "cuda":
        return f"they are for CUDA devices, not for {device.type}"
    return capability_below(device, AMPERE) or _needs("triton")


def why_not_dependent_launch(device: torch.device) -> str | None:
    """Why the compiler cannot launch a kernel before the one before it has ended, or None when it can."""
    if device.type != "cuda":
        return f"it is for CUDA devices, not for {device.type}"
    import torch._inductor  # slow

    if DEPENDENT_LAUNCH not in torch._inductor.list_options():
        return f"torch {torch.__version__} has no option {DEPENDENT_LAUNCH}"
    return capability_below(device, HOPPER) or _needs("triton")


def why_not_attention(attention: Attention, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an attention implementation cannot run, or None when it can."""
    if attention != "flash_attention_2":
        return None
    if device.type != "cuda":
        return "FlashAttention-2 needs a CUDA device"
    if reason := capability_below(device, AMPERE) or _needs("flash_attn"):
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
    return None if kernel == "efficient" else capability_below(device, AMPERE)


def why_not_engine(engine: str, device: torch.device) -> str | None:
    """Why a runtime other than torch cannot run on `device`, or None when it can."""
    facts = ENGINES[engine]
    if device.type not in facts.devices:
        return f"it runs on {' and '.join(facts.devices)}, not on {device.type}"
    if not installed(facts.package):
        return f"{facts.package} is not installed (pip install 'vitopt[{facts.extra}]')"
    return why_not_compile(device) if facts.torch_model else None


def require_engine(engine: str, device: torch.device) -> None:
    """Raise UnsupportedError with the reason, if a runtime other than torch cannot run."""
    if reason := why_not_engine(engine, device):
        raise UnsupportedError(f"engine {engine} cannot run on {device}: {reason}")
