"""Errors of a running variant, told in one line."""

import pytest
import torch

from vitopt.errors import MeasurementError
from vitopt.measure.failures import attempt, explain_failure, is_out_of_memory

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nGPU 0"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]


@pytest.mark.parametrize("error", FULL)
def test_full_memory_of_any_device_is_told_with_a_remedy(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert explain_failure(error) == "out of memory at this batch size: use a smaller one"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no kernel image"),
        ValueError("memory"),
        KeyboardInterrupt(),
        RuntimeError("the workspace was not allocated by this stream"),
        RuntimeError("view needs a reallocation of 20 bytes"),
        RuntimeError("Offset increment outside graph capture; the allocator has no such pool"),
        TypeError("alloc() takes no keyword argument"),
        ValueError("CUBLAS_STATUS_ALLOC_FAILED is no file"),
    ],
)
def test_other_errors_are_not_taken_for_full_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_failures_are_explained_in_one_short_line() -> None:
    text = explain_failure(ValueError("x\n" * 1000))
    assert text.startswith("ValueError: x x x") and "\n" not in text and len(text) < 330


def test_an_error_of_vitopt_speaks_for_itself() -> None:
    assert explain_failure(MeasurementError("logits are not finite")) == "logits are not finite"


def test_a_figure_that_cannot_be_had_leaves_its_reason() -> None:
    unmeasured: dict[str, str] = {}

    def fail() -> int:
        raise OSError("no such counter")

    assert attempt("energy", lambda: 3, unmeasured) == 3 and unmeasured == {}
    assert attempt("energy", fail, unmeasured) is None
    assert unmeasured == {"energy": "OSError: no such counter"}


def test_an_interruption_is_no_reason() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("energy", interrupted, {})
