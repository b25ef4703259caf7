"""What can be measured: a model that was prepared to be called."""

from typing import Protocol

import torch

from vitopt.models.checkpoint import Checkpoint
from vitopt.recipe import Attention


class Subject(Protocol):
    """`vitopt.optimize.runtime.Runnable` is one; tests use their own."""

    name: str
    checkpoint: Checkpoint
    model: torch.nn.Module
    device: torch.device
    attention_requested: Attention
    attention_reason: str | None
    compile_requested: bool
    compile_reason: str | None
    layers: dict[str, str]

    @property
    def attention_used(self) -> str: ...

    @property
    def compiled(self) -> bool: ...

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor: ...
