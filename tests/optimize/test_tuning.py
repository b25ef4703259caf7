"""Tuning after a coarse rounding: the logits come nearer, the codes stay."""

import copy
from pathlib import Path

import pytest
import torch

from vitopt.errors import MeasurementError
from vitopt.models.checkpoint import load_model, open_checkpoint
from vitopt.models.forward import logits
from vitopt.models.names import linear_layers
from vitopt.optimize.rounding import Grid, Rounded, compensated
from vitopt.optimize.tuning import tune

STEPS = 30


def as_held(scales: torch.Tensor, group: int) -> torch.Tensor:
    return (scales * 1024).round() / 1024


@torch.no_grad()
def divergence(exact: torch.nn.Module, model: torch.nn.Module, pixels: torch.Tensor) -> float:
    wanted, found = (logits(each, pixels).log_softmax(-1) for each in (exact, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_logits_come_nearer_with_the_same_codes_and_scales_that_can_be_held(tiny_checkpoint: Path) -> None:
    exact = load_model(open_checkpoint(str(tiny_checkpoint)))
    model = copy.deepcopy(exact)
    layers = [layer for layer in linear_layers(model, "vit") if not layer.is_head]
    rounded: dict[str, Rounded] = {}
    with torch.no_grad():
        for layer in layers:
            linear = model.get_submodule(layer.module)
            grid = Grid(torch.arange(-2.0, 2.0), 32, as_held)
            rounded[layer.logical] = compensated(linear.weight, torch.eye(linear.in_features), grid)
            linear.weight.copy_(rounded[layer.logical].values())
    pixels = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = divergence(exact, model, pixels)
    tuned = tune(model, exact, layers, rounded, [pixels] * STEPS, STEPS, 3e-3)
    assert divergence(exact, model, pixels) < 0.5 * before
    for layer in layers:
        was, found = rounded[layer.logical], tuned[layer.logical]
        assert torch.equal(found.codes, was.codes) and not torch.equal(found.scales, was.scales)
        assert torch.equal(found.scales, as_held(found.scales, 0))
        linear = model.get_submodule(layer.module)
        assert isinstance(linear, torch.nn.Linear) and torch.equal(linear.weight, found.values())


def test_logits_that_are_not_finite_are_an_error(tiny_checkpoint: Path) -> None:
    exact = load_model(open_checkpoint(str(tiny_checkpoint)))
    with pytest.raises(MeasurementError, match="tuning"):
        tune(copy.deepcopy(exact), exact, [], {}, [torch.full((1, 3, 32, 32), torch.nan)], 1, 1e-3)
