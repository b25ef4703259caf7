"""Errors that a variant raised while it ran, in words."""

from collections.abc import Callable
from typing import TypeVar

import torch

from vitopt.errors import VitoptError

T = TypeVar("T")

# Where memory is full and torch raises a plain RuntimeError: its allocator on the CPU (two words for two systems),
# the CUDA driver, cuBLAS and cuDNN.
_FULL = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a batch did not fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def explain_failure(error: Exception) -> str:
    """One line for an error raised while a variant ran."""
    if is_out_of_memory(error):
        return "out of memory at this batch size: use a smaller one"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, VitoptError) else f"{type(error).__name__}: {text}"


def attempt(figure: str, measure: Callable[[], T], unmeasured: dict[str, str]) -> T | None:
    """What `measure` gives; None where it raises, with the reason under the figure's name in `unmeasured`."""
    try:
        return measure()
    except Exception as error:  # an error of any type loses this figure, not the record
        unmeasured[figure] = explain_failure(error)
        return None
