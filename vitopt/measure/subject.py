"""What can be measured: a model that was prepared to be called."""

from typing import Protocol

import torch

from vitopt.models.checkpoint import Checkpoint
from vitopt.recipe import RunSpec


class Subject(Protocol):
    """`vitopt.optimize.runtime.Runnable` is one; tests use their own."""

    name: str
    checkpoint: Checkpoint
    model: torch.nn.Module
    device: torch.device
    run: RunSpec
    attention_reason: str | None
    kernel_reason: str | None
    compile_reason: str | None
    layers: dict[str, str]

    @property
    def attention_used(self) -> str: ...

    @property
    def compiled(self) -> bool: ...

    @property
    def fused_attentions(self) -> int: ...

    @property
    def stored_format(self) -> str | None: ...

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor: ...

    def kernel_used(self, pixel_values: torch.Tensor) -> str | None: ...

    def graph_bytes(self, shape: torch.Size) -> int: ...

    def alone(self, batch_size: int) -> list[str]: ...
