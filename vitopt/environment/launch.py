"""The processes of a distributed launch: who writes, who waits, who passes what."""

import contextlib
import datetime
import functools
import os
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


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
