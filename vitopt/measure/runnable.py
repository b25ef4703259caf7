"""What can be measured: six things are asked of it, and what only some can tell is asked for separately.

A torch module, an engine, two models with a rule between them: whatever has these six is measured, compared and
reported. `vitopt.optimize.runtime.TorchRunnable` is one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import nn

from vitopt.environment.devices import DTYPES
from vitopt.errors import MeasurementError
from vitopt.models.calibration import Use
from vitopt.models.checkpoint import weight_bytes
from vitopt.records import Outputs, Size, Variant


class Preprocess(Protocol):
    """One RGB image to what the model takes: (channels, height, width), float32."""

    def __call__(self, image: Image.Image) -> torch.Tensor: ...


class Runnable(Protocol):
    """Images in, a vector for each out: logits, unless it names other outputs (`NamesOutputs`)."""

    name: str
    device: torch.device

    @property
    def preprocess(self) -> Preprocess: ...

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, channels, height, width) on `device`. Returns (batch, outputs)."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its own fields of `vitopt.records.Record`: at least `variant`; `model`, `layers`, `size` where they exist.

        Asked for after all calls, so it tells what really ran.
        """
        ...


@runtime_checkable
class NamesOutputs(Protocol):
    """Knows what its outputs are, and what they are called where they are of classes or labels."""

    @property
    def outputs(self) -> Outputs: ...

    @property
    def label_names(self) -> Sequence[str] | None: ...


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
    """Can be run in a separate process, whose peak memory is this runnable's."""

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


@runtime_checkable
class Routes(Protocol):
    """Does more for some images than for others, so a call's time depends on its images."""

    @property
    def escalated(self) -> torch.Tensor:
        """(batch,), bool, of the last call: the images that got more."""
        ...

    def both_passes(self, pixel_values: torch.Tensor) -> None:
        """The calls that are made where all images get more: what takes the most memory."""
        ...


def outputs_of(runnable: Runnable) -> Outputs:
    """What its outputs are: a logit for each class, unless it says something else."""
    return runnable.outputs if isinstance(runnable, NamesOutputs) else "classes"


def fixed_shapes(runnable: Runnable) -> bool:
    """Whether batches of other sizes than those known must be filled up."""
    return isinstance(runnable, HasFixedShapes) and runnable.fixed_shapes


def input_size(runnable: Runnable) -> tuple[int, int]:
    """Height and width in pixels of what it takes, read from one image that it prepares unless it knows."""
    if isinstance(runnable, HasInputSize):
        return runnable.input_size
    height, width = runnable.preprocess(Image.new("RGB", (64, 64))).shape[-2:]
    return int(height), int(width)


@dataclass
class Wrapped:
    """A function of pixels, or a torch module on its device in evaluation mode, as a runnable."""

    call: Callable[[torch.Tensor], Any]
    preprocess: Preprocess
    name: str
    device: torch.device
    outputs: Outputs = "classes"
    label_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.call, nn.Module):
            self.call.eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, channels, height, width), on the device. Returns (batch, outputs).

        Raises:
            MeasurementError: what was wrapped returned something else.
        """
        outputs = self.call(pixel_values)
        outputs = getattr(outputs, "logits", outputs)  # as transformers' models return them
        if not isinstance(outputs, torch.Tensor) or outputs.ndim != 2 or len(outputs) != len(pixel_values):
            what = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise MeasurementError(
                f"{self.name} returned {what} for {len(pixel_values)} images; it must return a tensor (images, outputs)"
            )
        return outputs

    def weight_bytes(self) -> int:
        """Bytes of a module's weights; 0 for a function."""
        return weight_bytes(self.call) if isinstance(self.call, nn.Module) else 0

    def describe(self) -> dict[str, Any]:
        """Its variant, named after its number type, and a module's size."""
        if not isinstance(self.call, nn.Module):
            return {"variant": Variant(name=self.name, format="function")}
        dtype = next((parameter.dtype for parameter in self.call.parameters()), torch.float32)
        format = next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))
        size = Size(weight_bytes=self.weight_bytes(), disk_bytes=None)
        return {"variant": Variant(name=self.name, format=format), "size": size}
