"""A model in a process of its own, which takes pixels from shared memory; what it computes cannot stop the server.

Only numbers of slots and logits go through the pipe: a batch of 32 ViT images is 19 MB, and copying it twice would cost
more than all else that the server does.
"""

import contextlib
import multiprocessing
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitopt.errors import MeasurementError, UnsupportedError, VitoptError
from vitopt.records import Outputs

if TYPE_CHECKING:
    from vitopt.adaptive.runtime import AnyPrepared
    from vitopt.prediction import Pass

_TIMED_CALLS = 5
_SHARED = Path("/dev/shm")  # where Linux keeps shared memory


class ModelLost(Exception):
    """The process of a model ended, so what it was computing has no answer."""


@dataclass(frozen=True)
class Loading:
    """What the process needs: a checkpoint, the fields of a `RunSpec`, a device, and batch sizes to be built."""

    source: str
    run: dict[str, Any]
    device: str
    batch_sizes: tuple[int, ...]
    threads: int | None = None


@dataclass(frozen=True)
class Ready:
    """The model is warm.

    `seconds`: that a batch of each size takes; `fixed_shapes`: whether fewer images are filled up to it. `record`: what
    a record says of the model and of where it runs, as JSON. `outputs`: what they are. `gpu`: its address, if any.
    """

    seconds: dict[int, float]
    fixed_shapes: bool
    record: dict[str, Any]
    outputs: Outputs = "classes"
    gpu: str | None = None


@dataclass(frozen=True)
class Answers:
    """`logits`: (images, outputs), float32; `paths`: which pass answered each, None of a model with one."""

    logits: np.ndarray
    paths: "list[Pass] | None" = None


class Slots:
    """Shared memory for the pixels of so many images, each (3, height, width), float32.

    Raises:
        UnsupportedError: there is not so much.
    """

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        self.shape = (count, 3, *size)
        wanted = 4 * int(np.prod(self.shape))
        # It is given without asking, and a process that writes to what is not there is ended.
        free = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else wanted
        if wanted > free:
            raise UnsupportedError(
                f"--queue {count} takes {wanted / 1e6:,.0f} MB of shared memory, and {_SHARED} has {free / 1e6:,.0f}: "
                "choose a smaller one, or give more (`docker run --shm-size`)"
            )
        self._memory = SharedMemory(create=True, size=wanted)
        self.pixels: np.ndarray = np.ndarray(self.shape, np.float32, self._memory.buf)

    @property
    def name(self) -> str:
        """Of the memory, by which another process finds it."""
        return self._memory.name

    def close(self) -> None:
        """Give the memory back."""
        del self.pixels
        self._memory.close()
        self._memory.unlink()


class ModelProcess:
    """One life of the process; its calls block, so that they belong into a thread."""

    def __init__(self, loading: Loading, slots: Slots) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in any state
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(loading, slots.name, slots.shape, theirs), name="vitopt-model", daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """Number of the process."""
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """A file that can be read once the process has ended."""
        return self._process.sentinel

    def ready(self) -> Ready:
        """Wait until the model is warm.

        Raises:
            VitoptError: it cannot be loaded; the reason in one line.
            ModelLost: the process ended.
        """
        return self._answer()

    def answers(self, slots: Sequence[int], size: int) -> Answers:
        """Those to the images in `slots`, run as a batch of `size`.

        Raises:
            MeasurementError: the model raised an error.
            ModelLost: the process ended.
        """
        try:
            self._connection.send((tuple(slots), size))
        except OSError as error:
            raise ModelLost(str(error)) from error
        return self._answer()

    def stop(self) -> None:
        """End the process, at once."""
        self._connection.close()
        self._process.kill()
        self._process.join()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ModelLost("the process of the model ended") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _work(loading: Loading, memory: str, shape: tuple[int, ...], connection: Connection) -> None:
    """Load the model, then answer until the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group, and the server still answers
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            runnable, ready = _load(loading)
        except VitoptError as error:
            connection.send(error)
            return
        connection.send(ready)
        shared = SharedMemory(memory)
        pixels: np.ndarray = np.ndarray(shape, np.float32, shared.buf)
        while True:
            slots, size = connection.recv()
            try:
                connection.send(_call(runnable, pixels[list(slots)], size))
            except Exception as error:  # a model may raise anything; only this batch fails
                connection.send(MeasurementError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def _load(loading: Loading) -> "tuple[AnyPrepared, Ready]":
    from vitopt.threads import bind, wait_briefly

    if loading.threads is not None:
        bind(loading.threads)
    else:
        wait_briefly()
    from vitopt.environment import devices, libraries, machine

    libraries.quiet_libraries()
    from vitopt.adaptive.runtime import prepare
    from vitopt.data.pixels import random_pixels
    from vitopt.models.checkpoint import open_checkpoint
    from vitopt.recipe import RunSpec
    from vitopt.records import Record

    checkpoint = open_checkpoint(loading.source)
    device = devices.resolve_device(loading.device)
    runnable = prepare(checkpoint, name=loading.source, device=device, run=RunSpec(**loading.run))
    batches = {size: random_pixels(size, runnable.input_size).numpy() for size in loading.batch_sizes}
    for size, images in batches.items():
        _call(runnable, images, size)  # compiles
    times: dict[int, list[float]] = {size: [] for size in batches}
    for _ in range(_TIMED_CALLS):
        for size, images in batches.items():  # in turn: a busy moment of the machine meets all sizes
            start = time.perf_counter()
            _call(runnable, images, size)
            times[size].append(time.perf_counter() - start)
    seconds = {size: float(np.median(of)) for size, of in times.items()}
    record = Record(environment=machine.describe(device), **runnable.describe())
    return runnable, Ready(
        seconds,
        runnable.fixed_shapes,
        record.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        runnable.outputs,
        devices.pci_address(device),
    )


def _call(runnable: "AnyPrepared", pixels: np.ndarray, size: int) -> Answers:
    """Those to `pixels`, (images, 3, height, width)."""
    import torch

    from vitopt.measure.accuracy import padded_call
    from vitopt.prediction import paths_of

    logits = padded_call(runnable, torch.from_numpy(pixels).to(runnable.device), size).float().cpu().numpy()
    return Answers(logits, paths_of(runnable, len(pixels)))
