"""What a unit costs, on a clock that only the layers move."""

from pathlib import Path

import pytest
import torch
from torch import nn

from vitopt.measure.latency import Call, Clock
from vitopt.models.checkpoint import load_model, open_checkpoint
from vitopt.models.names import block_names, linear_layers
from vitopt.optimize.hybrid import Hybrid
from vitopt.search import costs
from vitopt.search.costs import extra_bytes, extra_ms
from vitopt.search.sensitivity import units


class LayerClock(Clock):
    """Time passes in the linear layers of the two models, and where one is put into the place of another."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def time(self, call: Call) -> float:
        before = self.seconds
        call()
        return 1000 * (self.seconds - before)


@pytest.fixture
def timed(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Hybrid:
    """A packed linear takes 3 ms and a 16-bit one 1 ms; to exchange one takes 50 ms."""
    clock = LayerClock()

    def taking(model: nn.Module, milliseconds: float) -> nn.Module:
        def hook(*_: object) -> None:
            clock.seconds += milliseconds / 1000

        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(hook)
        return model

    exchange = nn.Module.set_submodule

    def slow_exchange(self: nn.Module, *args: object, **options: object) -> None:
        clock.seconds += 0.05
        exchange(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.Module, "set_submodule", slow_exchange)
    monkeypatch.setattr(costs, "clock_for", lambda device: clock)
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    packed, exact = taking(load_model(checkpoint), 3), taking(load_model(checkpoint), 1)
    return Hybrid(packed, exact, block_names(packed, "vit"))


@pytest.mark.parametrize(("granularity", "saved"), [("block", 12), ("linear", 2)])
def test_the_time_is_that_of_the_layers_alone_and_saving_is_negative(
    timed: Hybrid, granularity: str, saved: int
) -> None:
    chosen = units(linear_layers(timed.base, "vit"), granularity)  # type: ignore[arg-type]
    pixels = torch.zeros(1, 3, 32, 32)
    before = dict(timed.base.named_modules())
    found = extra_ms(timed, chosen, pixels)
    assert list(found) == [unit.name for unit in chosen]
    assert found == {unit.name: pytest.approx(-saved) for unit in chosen}
    assert dict(timed.base.named_modules()) == before  # both models are as they were


def test_a_second_block_shares_all_weights_but_those_lent(timed: Hybrid) -> None:
    block, other = timed.base.get_submodule(timed.blocks[0]), timed.donor.get_submodule(timed.blocks[0])
    second = costs._with_layers(block, {"mlp.fc1": other.get_submodule("mlp.fc1")})
    assert second.mlp.fc1 is other.mlp.fc1 and block.mlp.fc1 is not other.mlp.fc1
    assert second.mlp.fc2.weight is block.mlp.fc2.weight
    hidden = torch.randn(1, 17, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(second(hidden), block(hidden))  # the two models have the same weights


def test_bytes_are_the_difference_of_the_two_models(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    half, single = load_model(checkpoint, dtype=torch.bfloat16), load_model(checkpoint)
    hybrid = Hybrid(half, single, block_names(half, "vit"))
    unit = units(linear_layers(half, "vit"), "block")[0]
    weights = 4 * 64 * 64 + 2 * 64 * 128
    assert extra_bytes(hybrid, unit) == 2 * (weights + 4 * 64 + 128 + 64)
