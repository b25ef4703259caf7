"""What the linear layers of a live model take over images, and what 8-bit scales of it lose of their outputs."""

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import nn

from vitopt.errors import MeasurementError
from vitopt.layers import QKV
from vitopt.models.forward import logits
from vitopt.models.names import Layer, linear_layers, prefix_tokens
from vitopt.optimize.static import quantized, rounded, scales_of

_SAMPLED_IMAGES = 128  # of which rows are kept, so that a large model's fit into memory
_EVERY = 16  # one patch in so many is such a row


@dataclass
class Inputs:
    """What layers with the same inputs take; of each half of the images apart, so that one can judge the other.

    `weight`: (out features, columns), of all of them. `prefix`: tokens before the patches, each a group of its own.
    `halves`: smallest and largest, (2, groups, columns). `rows`: (images, tokens, columns), of some tokens.
    """

    layers: list[Layer]
    weight: torch.Tensor
    prefix: int
    halves: list[torch.Tensor | None] = field(default_factory=lambda: [None, None])
    rows: list[list[torch.Tensor]] = field(default_factory=lambda: [[], []])

    def add(self, inputs: torch.Tensor, with_rows: bool) -> None:
        """`inputs`: (images or windows, tokens, columns)."""
        for half in range(2):
            some = inputs[half::2].float()
            if len(some) == 0:
                continue
            groups = self._by_group(some)
            found = torch.stack([torch.stack([one.aminmax(dim=0)[end] for one in groups]) for end in range(2)])
            known = self.halves[half]
            self.halves[half] = found if known is None else _union(known, found)
            if with_rows:
                self.rows[half].append(torch.cat([some[:, : self.prefix], some[:, self.prefix :: _EVERY]], dim=1))

    @property
    def ranges(self) -> torch.Tensor:
        """(2, groups, columns): the smallest and the largest input over all images.

        Raises:
            MeasurementError: one is no finite number.
        """
        halves = [known for known in self.halves if known is not None]
        ranges = halves[0] if len(halves) == 1 else _union(*halves)
        if not torch.isfinite(ranges).all():
            raise MeasurementError("inputs of layers are not all finite numbers: the model's 16-bit type overflows")
        return ranges

    def lost(self, format: str, factors_of: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[float]:
        """Share of an output's square that rounding takes where scales of one half of the images serve the other: means
        over the tokens of each group.

        `factors_of`: gives of such ranges by what columns are divided, and the weight's multiplied, before.
        """
        sums = torch.zeros(self.prefix + 1, dtype=torch.float64)
        for half in range(2):
            if not self.rows[half]:
                continue
            other = self.halves[1 - half]  # None where there was one image
            ranges = self.ranges if other is None else other
            factors = torch.ones_like(ranges[0, 0]) if factors_of is None else factors_of(ranges)
            scales = scales_of(ranges[0] / factors, ranges[1] / factors, format)
            values, row_scales = rounded(self.weight * factors, format)
            weight = values.float() * row_scales
            for group, rows in enumerate(self._by_group(torch.cat(self.rows[half]))):
                shift, scale = scales.shift[group], scales.scale[group]
                back = quantized(rows / factors, shift, scale, format).float() * scale + shift
                exact = rows @ self.weight.t()
                error = back @ weight.t() - exact
                shares = error.square().sum(1) / exact.square().sum(1).clamp(min=1e-30)
                sums[group] += shares.mean().item() / sum(map(bool, self.rows))
        return sums.tolist()

    def _by_group(self, inputs: torch.Tensor) -> list[torch.Tensor]:
        """(images, tokens, columns) -> (rows, columns) for each token before the patches, and for all patches."""
        return [*inputs[:, : self.prefix].unbind(1), inputs[:, self.prefix :].flatten(0, 1)]


def collect(model: nn.Module, model_type: str, pixels: Iterable[torch.Tensor]) -> list[Inputs]:
    """What the linear layers of all blocks take over `pixels`, (batch, 3, height, width), in order of execution."""
    shared: dict[str, list[Layer]] = {}
    for layer in linear_layers(model, model_type):
        if not layer.is_head:
            shared.setdefault(re.sub(r"\.(query|key|value)$", f".{QKV}", layer.logical), []).append(layer)
    found, images = [], 0
    with ExitStack() as hooks, torch.inference_mode():
        for layers in shared.values():
            modules = [model.get_submodule(name) for name in dict.fromkeys(layer.module for layer in layers)]
            one = Inputs(layers, torch.cat([module.weight.float() for module in modules]), prefix_tokens(model))
            look = lambda _, given, one=one: one.add(given[0], images < _SAMPLED_IMAGES)  # noqa: E731
            hooks.callback(modules[0].register_forward_pre_hook(look).remove)
            found.append(one)
        for batch in pixels:
            logits(model, batch.to(next(model.parameters()).device))
            images += len(batch)
    return found


def _back(weight: torch.Tensor, format: str) -> torch.Tensor:
    values, scale = rounded(weight, format)
    return values.float() * scale


def _union(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.minimum(one[0], other[0]), torch.maximum(one[1], other[1])])
