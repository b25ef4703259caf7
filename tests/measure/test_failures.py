"""Errors of a running variant, told in one line."""

import pytest
import torch

from vitopt.measure.failures import explain_failure, is_out_of_memory

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nGPU 0"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", FULL)
def test_full_memory_of_any_device_is_told_with_a_remedy(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert explain_failure(error) == "out of memory at this batch size: use a smaller one"


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), ValueError("memory"), KeyboardInterrupt()])
def test_other_errors_are_not_taken_for_full_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_failures_are_explained_in_one_short_line() -> None:
    text = explain_failure(ValueError("x\n" * 1000))
    assert text.startswith("ValueError: x x x") and "\n" not in text and len(text) < 330
