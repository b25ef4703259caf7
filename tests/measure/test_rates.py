"""Rates of a device and what a model needs of them, against counts by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from vitopt.measure import rates
from vitopt.measure.latency import Clock
from vitopt.measure.rates import copy_rate, floor_ms, gemm_rate, roofline, utilisation_percent
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.models.families import FAMILIES
from vitopt.models.forward import flops_per_image
from vitopt.records import Roofline

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_and_forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rates, "_GEMM_SIDE", {"cpu": 64})
    monkeypatch.setattr(rates, "_COPY_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(rates, "_WARM_SECONDS", 0.0)
    for rate in (gemm_rate, copy_rate):
        rate.cache_clear()
    yield
    for rate in (gemm_rate, copy_rate):  # rates of small sizes must serve no other test
        rate.cache_clear()


def vit_flops(width: int, blocks: int, inner: int, patch: int, side: int, classes: int) -> int:
    """Of one image through a plain ViT, from its shapes: a matrix product of m x k by k x n takes 2 m k n."""
    patches = (side // patch) ** 2
    tokens = patches + 1
    embedding = 2 * patches * (3 * patch**2) * width
    projections = 4 * 2 * tokens * width * width
    attention = 2 * 2 * tokens * tokens * width  # over all heads, scores and their sum of values
    mlp = 2 * 2 * tokens * width * inner
    return embedding + blocks * (projections + attention + mlp) + 2 * width * classes


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vit-large-patch16-224", (1024, 24, 4096, 16, 224, 1000)),
        ("vit-base-patch32-384", (768, 12, 3072, 32, 384, 1000)),
        ("vit-tiny-patch16-32", (192, 12, 768, 16, 32, 1000)),
    ],
)
def test_flops_of_a_vit_are_those_of_its_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert flops_per_image(open_checkpoint(f"random:{name}")) == vit_flops(*shape)


def test_a_large_vit_takes_123_billion_flops() -> None:
    assert vit_flops(1024, 24, 4096, 16, 224, 1000) == pytest.approx(123e9, rel=0.005)


class Watched:
    """Counts what a running model multiplies, by its layers and its calls of attention."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
        self.flops = 0
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(self.count_layer)
        attend = nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", self.counting(attend))

    def count_layer(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self.flops += 2 * output.numel() * module.weight[0].numel()

    def counting(self, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            self.flops += 2 * 2 * query.numel() * key.shape[-2]
            return attend(query, key, *args, **options)

        return counted


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_flops_of_every_family_are_those_that_its_layers_do(
    family: str, make_family: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_family(family)
    found = flops_per_image(checkpoint)
    model = load_model(checkpoint)
    watched = Watched(model, monkeypatch)
    with torch.no_grad():
        model(pixel_values=torch.zeros(1, 3, 32, 32))
    # SigLIP's pooling attention multiplies without calling layers: one query, 16 tokens, 64 wide. Swin v2's attention
    # too: two blocks of 64 tokens that each look at 16, 32 wide, and two of 16 tokens, 64 wide.
    uncounted = {
        "siglip": 2 * 64 * 64 * (1 + 16 + 16 + 1) + 2 * 2 * 16 * 64,
        "swinv2": 2 * (2 * 2 * 64 * 16 * 32) + 2 * (2 * 2 * 16 * 16 * 64),
    }
    assert watched.flops > 0
    assert found == watched.flops + uncounted.get(family, 0)


def test_the_floor_is_the_slower_of_arithmetic_and_reading() -> None:
    device = Roofline(gemm_format="bf16", gemm_flops_per_second=1e12, copy_bytes_per_second=1e11)
    # 10 images of 5e9 FLOP at 1e12 per second; 1e9 bytes at 1e11 per second
    assert floor_ms(10, 5 * 10**9, 10**9, device) == pytest.approx(50)
    assert floor_ms(1, 5 * 10**9, 10**9, device) == pytest.approx(10)
    assert floor_ms(2, 5 * 10**9, 10**9, device) == pytest.approx(10)


def test_utilisation_is_the_share_of_the_arithmetic_rate() -> None:
    device = Roofline(gemm_format="bf16", gemm_flops_per_second=1e12, copy_bytes_per_second=1e11)
    assert utilisation_percent(10, 5 * 10**9, 100, device) == pytest.approx(50)
    assert utilisation_percent(1, 5 * 10**9, 10, device) == pytest.approx(50)
    # At the floor of the arithmetic it is all of it.
    assert utilisation_percent(4, 10**9, floor_ms(4, 10**9, 0, device), device) == pytest.approx(100)


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16", "int8"])
def test_every_format_that_the_cpu_computes_in_has_a_rate(format: str) -> None:
    assert all(0 < rate < 1e15 for rate in gemm_rate(format, CPU))


def test_copies_have_a_rate() -> None:
    assert 0 < copy_rate(CPU) < 1e13


def test_rates_are_those_of_a_queue_on_an_idle_device_and_on_one_that_has_worked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Throttling(Clock):
        """A clock whose device slows down by half after a second of work; each call takes 4 ms before."""

        def __init__(self) -> None:
            self.worked = 0.0

        def queued(self, call: Callable[[], object], count: int) -> float:
            call()
            self.worked += 0.004 * count
            return 4.0 if self.worked < 1 else 8.0

        def sustained(self, call: Callable[[], object], seconds: float) -> tuple[int, float]:
            self.worked += seconds
            return 1, seconds

    device = Throttling()
    monkeypatch.setattr(rates, "clock_for", lambda _: device)
    monkeypatch.setattr(rates, "_WARM_SECONDS", 1.0)
    assert gemm_rate("fp32", CPU) == pytest.approx((2 * 64**3 / 0.004, 2 * 64**3 / 0.008))
    assert gemm_rate("fp32", CPU) is gemm_rate("fp32", CPU)  # measured once
    device.worked = 0.0
    assert copy_rate(CPU) == pytest.approx(2 * 2**16 / 0.004)  # read and written


def test_the_floor_is_that_of_the_faster_state_of_the_device() -> None:
    device = Roofline(
        gemm_format="bf16", gemm_flops_per_second=1e12, gemm_flops_per_second_cold=2e12, copy_bytes_per_second=1e11
    )
    assert floor_ms(10, 5 * 10**9, 0, device) == pytest.approx(25)
    assert utilisation_percent(10, 5 * 10**9, 100, device) == pytest.approx(50)


@pytest.mark.parametrize(
    ("format", "computes_in"),
    [
        ("fp32", "fp32"),
        ("fp16", "fp16"),
        ("bf16", "bf16"),
        ("nf4", "bf16"),
        ("int4", "bf16"),
        ("int8", "int8"),
        ("w8a8", "int8"),
    ],
)
def test_the_rates_are_those_of_the_format_that_a_variant_computes_in(format: str, computes_in: str) -> None:
    found = roofline(format, CPU)
    assert found.gemm_format == computes_in
    assert (found.gemm_flops_per_second_cold, found.gemm_flops_per_second) == gemm_rate(computes_in, CPU)
    assert found.copy_bytes_per_second == copy_rate(CPU)
