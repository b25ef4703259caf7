"""Errors that a variant raised while it ran, in words."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a batch did not fit: torch has no class of it for the CPU, nor for cuBLAS."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "alloc" in str(error).lower()


def explain_failure(error: Exception) -> str:
    """One line for an error raised while a variant ran."""
    if is_out_of_memory(error):
        return "out of memory at this batch size: use a smaller one"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
