"""Compilation for fixed batch sizes.

On a GPU one block is compiled and serves all (they differ in their weights alone, which are its inputs), then the
whole forward pass is captured as a CUDA graph for each batch size: compilation takes the time of one block, and a
call costs one launch and the copy of its pixels, which casts them. On the CPU the whole model is compiled with its
weights frozen in, so that they are packed once for the processor's matrix kernels.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch._inductor.config
from torch import nn

from vitopt.environment.devices import DEPENDENT_LAUNCH

_CALLS_BEFORE_CAPTURE = 3
_MANY_SHAPES = 256


class Path(nn.Module):
    """All of a call, from pixels of any floating-point type to logits: the cast, and the model."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format):
        super().__init__()
        self.model, self.dtype, self.layout = model, dtype, layout

    def cast(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels as the model takes them."""
        return pixel_values.to(self.dtype, memory_format=self.layout)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width). Returns logits (batch, classes)."""
        logits: torch.Tensor = self.model(pixel_values=self.cast(pixel_values)).logits
        return logits


class Compiled(Protocol):
    """A model that was compiled for some shapes and compiles itself for each new one that it is called with."""

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width). Returns logits (batch, classes)."""

    def knows(self, shape: torch.Size) -> bool:
        """Whether a call with pixels of this shape compiles nothing."""

    def peak_bytes(self, shape: torch.Size) -> int:
        """Memory that is set aside for pixels of this shape beside the weights."""

    def undo(self) -> None:
        """Leave the model as it was before."""


def compiled(
    path: Path,
    blocks: Sequence[nn.Module],
    device: torch.device,
    *,
    autotune: bool = False,
    whole: bool = False,
    dependent: bool = False,
) -> Compiled:
    """`path`, to be compiled at each shape's first call; on a GPU `whole`, or one of its `blocks` for all."""
    if device.type == "cuda":
        return GraphedModel(path, () if whole else blocks, autotune, dependent)
    return FrozenModel(path, autotune)


def compiler_options(autotune: bool, dependent: bool) -> dict[str, bool] | None:
    """torch.compile's options; unlike its global settings they tell the code of one variant from that of another."""
    tried = torch._inductor.list_mode_options("max-autotune-no-cudagraphs") if autotune else {}
    return {**tried, DEPENDENT_LAUNCH: True} if dependent else tried or None


@contextlib.contextmanager
def compiling(autotune: bool) -> Iterator[None]:
    """The compiler's settings while one of these models compiles; afterwards they are as they were."""
    # Variants share the code of their classes. The compiler stops at eight versions of one code and then runs it
    # eagerly without a word; a word is wanted, and many variants times many batch sizes are not too many.
    limits = torch._dynamo.config.patch(
        recompile_limit=_MANY_SHAPES,
        accumulated_recompile_limit=4 * _MANY_SHAPES,
        fail_on_recompile_limit_hit=True,
    )
    with limits, _quiet_autotuning() if autotune else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _quiet_autotuning() -> Iterator[None]:
    """Keep the time of every kernel that is tried off the terminal."""
    from torch._inductor import select_algorithm  # slow to import

    printed = select_algorithm.PRINT_AUTOTUNE
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        with torch._inductor.config.patch(max_autotune_report_choices_stats=False):
            yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = printed


class FrozenModel:
    """A model on the CPU, compiled whole with its weights as constants."""

    def __init__(self, path: Path, autotune: bool):
        self._path = path
        self._compiled = torch.compile(path, dynamic=False)
        self._autotune = autotune
        self._shapes: set[torch.Size] = set()

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `Compiled`."""
        pixel_values = pixel_values.float()  # nearly always it is; other types would be compiled for anew
        if self.knows(pixel_values.shape):
            return self._compiled(pixel_values=pixel_values)
        if not self._shapes:
            self._path(pixel_values)  # bitsandbytes packs its weights anew in the first call
        # Freezing is not among the options of torch.compile that reach all parts of the compiler.
        freezing = torch._inductor.config.patch(freezing=True, max_autotune=self._autotune)
        with freezing, compiling(self._autotune):
            logits = self._compiled(pixel_values=pixel_values)
        self._shapes.add(pixel_values.shape)
        return logits

    def knows(self, shape: torch.Size) -> bool:
        """As `Compiled`."""
        return shape in self._shapes

    def peak_bytes(self, shape: torch.Size) -> int:
        """Nothing is set aside between calls."""
        return 0

    def undo(self) -> None:
        """The model itself was not changed."""


@dataclass
class _Captured:
    """A forward pass as a CUDA graph: fill `pixels`, replay, read `logits`."""

    graph: torch.cuda.CUDAGraph
    pixels: torch.Tensor
    logits: torch.Tensor
    peak_bytes: int


class Graphs:
    """Calls on a GPU that replay a CUDA graph, captured for each shape of pixels that comes.

    `call`: pixels as `cast` gives them -> logits. `preparing`: what surrounds the first calls, which may compile.
    Graphs share one memory pool: they are replayed one after another, and no output outlives its call.
    """

    def __init__(
        self,
        call: Callable[[torch.Tensor], torch.Tensor],
        cast: Callable[[torch.Tensor], torch.Tensor],
        preparing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        self._call, self._cast, self._preparing = call, cast, preparing
        self._captured: dict[torch.Size, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """As `Compiled`."""
        captured = self._captured.get(pixel_values.shape)
        if captured is None:
            captured = self._captured[pixel_values.shape] = self._capture(pixel_values)
        captured.pixels.copy_(pixel_values, non_blocking=True)  # casts
        captured.graph.replay()
        return captured.logits.clone()

    def knows(self, shape: torch.Size) -> bool:
        """As `Compiled`."""
        return shape in self._captured

    def peak_bytes(self, shape: torch.Size) -> int:
        """As `Compiled`; 0 for a shape that was never captured."""
        captured = self._captured.get(shape)
        return captured.peak_bytes if captured else 0

    def _capture(self, pixel_values: torch.Tensor) -> _Captured:
        device = pixel_values.device
        pixels = self._cast(pixel_values).clone()
        current = torch.cuda.current_stream(device)
        # One stream for all captures of this model: libraries keep a workspace for each that they meet.
        side = self._stream = self._stream or torch.cuda.Stream(device)
        # Compilation, autotuning and those workspaces must be done before: a capture allows none of them.
        side.wait_stream(current)
        with torch.cuda.stream(side), self._preparing():
            for _ in range(_CALLS_BEFORE_CAPTURE):
                self._call(pixels)
        current.wait_stream(side)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that reads images into pinned memory, may go on using the device.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local")
        try:
            with torch.compiler.set_stance("fail_on_recompile"), capture:
                logits = self._call(pixels)
        finally:
            torch.cuda.set_stream(current)  # a capture that broke off has not gone back to it
        peak = torch.cuda.max_memory_allocated(device) - before
        return _Captured(graph, pixels, logits, peak)


class GraphedModel(Graphs):
    """A model on a GPU whose calls replay a CUDA graph.

    One of `blocks` is compiled for all of them; without any it is the whole model, and what ends a block can share a
    kernel with what begins the next.
    """

    def __init__(self, path: Path, blocks: Sequence[nn.Module], autotune: bool, dependent: bool = False):
        self._blocks = blocks
        options = compiler_options(autotune, dependent)
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False, options=options)
        model = path.model if blocks else torch.compile(path.model, dynamic=False, options=options)
        super().__init__(lambda pixels: model(pixel_values=pixels).logits, path.cast, lambda: compiling(autotune))

    def undo(self) -> None:
        """As `Compiled`."""
        for block in self._blocks:
            block._compiled_call_impl = None
