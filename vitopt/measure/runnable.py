"""What can be measured: six things are asked of it, and what only some can tell is asked for separately.

A torch module, an engine, two models with a rule between them: whatever has these six is measured, compared and
reported. `vitopt.optimize.runtime.TorchRunnable` is one.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image

from vitopt.models.calibration import Use


class Preprocess(Protocol):
    """One RGB image to what the model takes: (channels, height, width), float32."""

    def __call__(self, image: Image.Image) -> torch.Tensor: ...


class Runnable(Protocol):
    """Images in, logits out."""

    name: str
    device: torch.device

    @property
    def preprocess(self) -> Preprocess: ...

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, channels, height, width) on `device`. Returns logits (batch, classes)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its own fields of `vitopt.records.Record`: at least `variant`; `model`, `layers`, `size` where they exist.

        Asked for after all calls, so it tells what really ran.
        """
        ...


@runtime_checkable
class HasFixedShapes(Protocol):
    """Runs batch sizes that it was built for; others are filled up to one that it knows."""

    @property
    def fixed_shapes(self) -> bool: ...


@runtime_checkable
class HasInputSize(Protocol):
    """Knows the height and width in pixels of what it takes without preparing an image."""

    @property
    def input_size(self) -> tuple[int, int]: ...


@runtime_checkable
class CountsFlops(Protocol):
    """Knows the arithmetic of one image: matrix products and convolutions, a multiply-add as two."""

    def flops_per_image(self) -> int: ...


@runtime_checkable
class RunsAlone(Protocol):
    """Can be run by a process of its own, whose peak memory is this runnable's."""

    def alone(self, batch_size: int) -> list[str]:
        """Command that prints `{"peak_bytes": …}`."""
        ...


@runtime_checkable
class HoldsGraphs(Protocol):
    """Keeps memory on a GPU between calls beside its weights, by shape of the pixels."""

    def graph_bytes(self, shape: torch.Size) -> int: ...


@runtime_checkable
class ShowsKernel(Protocol):
    """Can tell the attention kernel that a call ran, by profiling one."""

    def kernel_used(self, pixel_values: torch.Tensor) -> str | None: ...


@runtime_checkable
class KeepsWeights(Protocol):
    """Holds weights in the device's memory."""

    def weight_bytes(self) -> int: ...


@runtime_checkable
class HasSeenImages(Protocol):
    """Was trained or calibrated on images, whose hashes are known."""

    def images_seen(self) -> Sequence[Use]: ...


def fixed_shapes(runnable: Runnable) -> bool:
    """Whether batches of other sizes than those known must be filled up."""
    return isinstance(runnable, HasFixedShapes) and runnable.fixed_shapes


def input_size(runnable: Runnable) -> tuple[int, int]:
    """Height and width in pixels of what it takes, read from one image that it prepares unless it knows."""
    if isinstance(runnable, HasInputSize):
        return runnable.input_size
    height, width = runnable.preprocess(Image.new("RGB", (64, 64))).shape[-2:]
    return int(height), int(width)
