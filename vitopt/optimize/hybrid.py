"""One model in two formats, and every mixture of them: layers change places without copying a weight.

A mixture runs from any block on: all blocks before the first changed layer give what they gave before, so
their output is kept at the block boundary and only the rest runs.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitopt.errors import CheckpointError
from vitopt.models import forward
from vitopt.models.checkpoint import image_size
from vitopt.models.names import Layer


@dataclass(frozen=True)
class Hybrid:
    """The same model twice: `base` runs, `donor` lends layers to it.

    Both are on one device, in evaluation mode, and have the same module names; `blocks` are the full names
    of the transformer blocks in order.
    """

    base: nn.Module
    donor: nn.Module
    blocks: tuple[str, ...]

    @contextmanager
    def lending(self, layers: Iterable[Layer]) -> Iterator[None]:
        """While the block runs, `base` computes `layers` with the donor's modules."""
        names = [layer.module for layer in layers]
        own = {name: self.base.get_submodule(name) for name in names}
        for name in names:
            self.base.set_submodule(name, self.donor.get_submodule(name))
        try:
            yield
        finally:
            for name, module in own.items():
                self.base.set_submodule(name, module)

    @torch.inference_mode()
    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, classes), float32 on the CPU, from images: (batch, 3, height, width)."""
        return _to_host(forward.logits(self.base, pixel_values))

    @torch.inference_mode()
    def block_input(self, pixel_values: torch.Tensor, block: int) -> torch.Tensor:
        """What block `block` of `base` is given for these images: (batch, tokens, width)."""
        hidden: torch.Tensor = self._given(block, pixel_values)[0][0]
        return hidden

    @torch.inference_mode()
    def block_call(self, pixel_values: torch.Tensor, block: int) -> Callable[[nn.Module], object]:
        """A call of a module alone as block `block`, given all that the whole model gives that for these images."""
        args, options = self._given(block, pixel_values)
        return lambda module: module(*args, **options)

    @torch.inference_mode()
    def advance(self, hidden: torch.Tensor, block: int) -> torch.Tensor:
        """The input of the block after `block` of `base`, for the input `hidden` of `block`.

        It is the block's output, but where a family merges patches between two stages.
        """
        advanced: torch.Tensor = self._run_from(block, hidden, stop=block + 1)
        return advanced

    @torch.inference_mode()
    def logits_from(self, hidden: torch.Tensor, block: int) -> torch.Tensor:
        """(batch, classes), float32 on the CPU, from the input `hidden` of block `block` on."""
        return _to_host(self._run_from(block, hidden, stop=None).logits)

    def _given(self, block: int, pixel_values: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def stop(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            raise _Reached((args, options))

        handle = self.base.get_submodule(self.blocks[block]).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            forward.logits(self.base, pixel_values)
        except _Reached as reached:
            given: tuple[tuple[Any, ...], dict[str, Any]] = reached.value
            return given
        finally:
            handle.remove()
        raise CheckpointError(f"{self.blocks[block]} was never called, so its input cannot be kept")

    def _run_from(self, block: int, hidden: torch.Tensor, stop: int | None) -> Any:
        """Run the host's own forward pass with the blocks before `block` passing on what they are given.

        Returns the host's output, or the input of block `stop`.
        """
        others = self._probe.others

        def pass_on(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # Some families' blocks return a tuple: hidden states, then attention weights, which are None here.
            return hidden if others is None else (hidden, *[None] * others)

        # What the embeddings give is thrown away, so the patches need not be computed.
        replaced = {name: _zeros(shape) for name, shape in self._probe.convolutions.items()}
        replaced |= dict.fromkeys(self.blocks[:block], pass_on)
        modules = {name: self.base.get_submodule(name) for name in replaced}
        originals = {name: module.forward for name, module in modules.items()}
        hooks = [self.base.get_submodule(self.blocks[block]).register_forward_pre_hook(_giving(hidden))]
        if stop is not None:
            hooks.append(self.base.get_submodule(self.blocks[stop]).register_forward_pre_hook(_stop_before))
        for name, module in modules.items():
            module.forward = replaced[name]
        try:
            like = hidden[0] if isinstance(hidden, tuple) else hidden  # more than tokens, see `blocks.Carried`
            return self.base(pixel_values=self._placeholder(len(like), like))
        except _Reached as reached:
            return reached.value
        finally:
            for name, module in modules.items():
                module.forward = originals[name]
            for hook in hooks:
                hook.remove()

    @functools.cached_property
    def _probe(self) -> "_Probe":
        """What one call shows: what a block returns, and what convolutions before the blocks give."""
        others: list[int | None] = []
        shapes: dict[str, torch.Size] = {}

        def see_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            others.append(len(output) - 1 if type(output) is tuple else None)

        def see_convolution(name: str) -> Any:
            return lambda module, args, output: shapes.__setitem__(name, output.shape[1:])

        inside = tuple(f"{name}." for name in self.blocks)
        hooks = [self.base.get_submodule(self.blocks[0]).register_forward_hook(see_block)]
        for name, module in self.base.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith(inside):
                hooks.append(module.register_forward_hook(see_convolution(name)))
        forward.logits(self.base, self._placeholder(1, next(self.base.parameters())))
        for hook in hooks:
            hook.remove()
        return _Probe(others[0], shapes)

    def _placeholder(self, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        # One zero, expanded: the pixels are not used, so they take neither memory nor a cast.
        return hidden.new_zeros(()).expand(batch, 3, *image_size(self.base.config))


@dataclass(frozen=True)
class _Probe:
    others: int | None  # values that a block returns beside the hidden states; None where it returns no tuple
    convolutions: dict[str, torch.Size]  # name of a convolution outside the blocks -> shape of its output


def _zeros(shape: torch.Size) -> Any:
    return lambda pixels: pixels.new_zeros(len(pixels), *shape)


class _Reached(Exception):
    """Ends a forward pass early and carries its result out."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


def _giving(hidden: torch.Tensor) -> Any:
    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (hidden, *args[1:])

    return replace


def _stop_before(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Reached(args[0])


def _to_host(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().cpu()


class Boundary:
    """Activations of all batches at one block boundary, in memory up to a limit and in files above it."""

    def __init__(self, folder: Path, memory_bytes: int):
        self._folder, self._limit = folder, memory_bytes
        self._held: dict[int, torch.Tensor] = {}
        self._used = 0
        self._device = torch.device("cpu")

    def __setitem__(self, batch: int, hidden: torch.Tensor) -> None:
        old = self._held.pop(batch, None)
        self._used -= 0 if old is None else old.nbytes
        if self._used + hidden.nbytes <= self._limit:
            self._held[batch] = hidden
            self._used += hidden.nbytes
        else:
            self._device = hidden.device
            save_file({"hidden": hidden.contiguous()}, self._folder / f"boundary-{batch}.safetensors")

    def __getitem__(self, batch: int) -> torch.Tensor:
        if batch in self._held:
            return self._held[batch]
        return load_file(self._folder / f"boundary-{batch}.safetensors", device=str(self._device))["hidden"]
