"""After rounding: what stays in 16 bit, and the scales, learn to give the exact model's logits. No labels.

Distillation of logits: Hinton et al., arXiv 1503.02531. That norms and biases alone recover much of what four bits
lose: "norm tweaking", arXiv 2309.02784.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from vitopt import progress
from vitopt.errors import MeasurementError
from vitopt.models.forward import logits
from vitopt.models.names import Layer
from vitopt.optimize.rounding import Rounded

_BETAS = (0.9, 0.99)
_WARMUP = 0.1  # share of all steps


class _Coded(nn.Module):
    """A linear layer whose codes are fixed and whose scales learn, as factors of what they were."""

    def __init__(self, linear: nn.Linear, rounded: Rounded):
        super().__init__()
        self.rounded, self.bias = rounded, linear.bias
        self.factors = nn.Parameter(torch.ones_like(rounded.scales))

    def held(self) -> Rounded:
        return replace(self.rounded, scales=self.rounded.scales * self.factors)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.held().values(), self.bias)


def tune(
    model: nn.Module,
    exact: nn.Module,
    layers: Iterable[Layer],
    rounded: Mapping[str, Rounded],
    pixels: Iterable[torch.Tensor],
    steps: int,
    learning_rate: float,
) -> dict[str, Rounded]:
    """Train `model`, whose `layers` are `rounded`, towards the logits of `exact`, one step for each batch of `pixels`.

    Its other parameters change in place, its rounded weights by their scales, which stay such as the format can hold:
    returns logical name -> the same codes with the new scales. `pixels` gives at least `steps` batches.

    Raises:
        MeasurementError: the logits are no finite numbers.
    """
    coded = {layer: _Coded(model.get_submodule(layer.module), rounded[layer.logical]) for layer in layers}
    originals = {layer: model.get_submodule(layer.module) for layer in coded}
    for layer, module in coded.items():
        model.set_submodule(layer.module, module)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate, _BETAS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=_WARMUP, cycle_momentum=False
    )
    device = next(model.parameters()).device
    with torch.enable_grad():
        for _, batch in zip(range(steps), progress.track(pixels, "tuning", steps), strict=False):
            with torch.autocast(device.type, torch.bfloat16):
                with torch.no_grad():
                    wanted = logits(exact, batch.to(device)).float().log_softmax(-1)
                found = logits(model, batch.to(device)).float().log_softmax(-1)
            lost = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
            if not torch.isfinite(lost):
                raise MeasurementError("tuning lost its way: logits are not finite numbers; take fewer steps or none")
            optimizer.zero_grad()
            lost.backward()
            optimizer.step()
            schedule.step()
    return {layer.logical: _stored(model, layer, module, originals[layer]) for layer, module in coded.items()}


@torch.no_grad()
def _stored(model: nn.Module, layer: Layer, coded: _Coded, linear: nn.Linear) -> Rounded:
    """Put the layer back, with scales that its format can hold."""
    held = coded.held()
    scales = [held.grid.holdable(held.scales[:, group, None], group) for group in range(held.scales.shape[1])]
    held = replace(held, scales=torch.cat(scales, 1))
    linear.weight.copy_(held.values())
    model.set_submodule(layer.module, linear)
    return held
