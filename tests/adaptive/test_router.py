"""Images get the second pass where the first is not sure, together, and keep their order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from scipy import stats

from vitopt.adaptive.calibrated import Calibrated, Rule
from vitopt.adaptive.passes import Passes
from vitopt.adaptive.pixels import PixelMap
from vitopt.adaptive.router import Router
from vitopt.adaptive.scores import margin
from vitopt.errors import UnsupportedError
from vitopt.measure.runnable import Routes
from vitopt.models.checkpoint import Checkpoint

CPU = torch.device("cpu")


def router_of(passes: Any, threshold: float | None, proxy: str = "margin", escalated: float = 0.5) -> Router:
    rule = Rule(proxy=proxy, threshold=threshold, temperature=1.0)
    calibrated = Calibrated.model_construct(rule=rule, promise="none", escalated=escalated, own_first=True)
    return Router("routed", passes, calibrated)


@dataclass
class FakePass:
    """Gives each image the sum of its pixels, times a factor; `sizes`: of the batches that it was called with."""

    factor: float
    fixed_shapes: bool = False
    device: torch.device = CPU
    sizes: list[int] = field(default_factory=list)

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        assert not pixel_values.is_inference()  # a compiler would compile for it beside the tensors of callers
        self.sizes.append(len(pixel_values))
        value = self.factor * pixel_values.sum((1, 2, 3))
        return torch.stack([value, torch.zeros_like(value)], dim=1)

    def graph_bytes(self, shape: torch.Size) -> int:
        return shape.numel()


@dataclass
class FakePasses:
    first: FakePass
    second: FakePass
    pixels: PixelMap = field(default_factory=lambda: PixelMap((1, 1)))

    def first_logits(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.first(pixel_values), None


def images(*values: float) -> torch.Tensor:
    """Images whose pixels add up to these values: the margin of the first pass rises with them."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2) / 12


@pytest.mark.parametrize("proxy", ["margin", "class_token"])
def test_each_image_gets_the_logits_of_its_pass(
    passes_of: Callable[..., Passes], small: Checkpoint, proxy: str
) -> None:
    passes = passes_of(small, watched=proxy == "class_token")
    pixels = torch.randn(9, 3, 32, 32, generator=torch.manual_seed(0))
    first, steps = passes.first_logits(pixels)
    sure = margin(first) if steps is None else -steps
    router = router_of(passes, float(sure.median()), proxy)
    logits = router(pixels)
    escalated = sure < sure.median()
    assert escalated.sum() == 4 and torch.equal(router.escalated, escalated)
    assert torch.allclose(logits, torch.where(escalated[:, None], passes.second(pixels), first), atol=1e-5)


@pytest.mark.parametrize(("threshold", "second"), [(None, True), (-1.0, False), (2.0, True)])
def test_all_or_none_may_be_escalated(threshold: float | None, second: bool) -> None:
    passes = FakePasses(FakePass(1), FakePass(10))
    router = router_of(passes, threshold)
    logits = router(images(1, 2, 3))
    assert logits[:, 0].tolist() == pytest.approx([10, 20, 30] if second else [1, 2, 3])
    assert router.escalated.tolist() == [second] * 3
    assert passes.second.sizes == ([3] if second else [])


def test_escalated_images_run_together_in_one_call() -> None:
    passes = FakePasses(FakePass(1), FakePass(10))
    logits = router_of(passes, 0.5)(images(9, 0.1, 8, 0.2, 0.3, 7))
    assert logits[:, 0].tolist() == pytest.approx([9, 1, 8, 2, 3, 7])
    assert (passes.first.sizes, passes.second.sizes) == ([6], [3])


@pytest.mark.parametrize(
    ("device", "share", "likely", "made"),
    [
        ("cpu", 0.0, 0, {1}),
        ("cpu", 0.1, 6, {1, 2, 4}),
        ("meta", 0.1, 6, {1, 2, 4, 8}),
        ("cpu", 0.5, 12, {1, 2, 4, 8}),
        ("meta", 0.5, 12, {1, 2, 4, 8, 14}),
        ("cpu", 1.0, 14, {1, 2, 4, 8, 14}),
    ],
)
def test_where_shapes_are_fixed_likely_sizes_are_made_in_the_first_call_and_no_other_is_called(
    device: str, share: float, likely: int, made: set[int]
) -> None:
    assert likely == stats.binom.ppf(0.999, 14, share)
    passes = FakePasses(FakePass(1, True), FakePass(10, True, torch.device(device)))
    router = router_of(passes, 0.5, escalated=share)
    router(images(*[9.0] * 14))
    assert sorted(passes.second.sizes) == sorted(made)
    for uncertain in range(15):
        passes.second.sizes.clear()
        values = [0.1 + uncertain / 100] * uncertain + [9.0] * (14 - uncertain)
        logits = router(images(*values))
        second = [10 * value for value in values[:uncertain]]
        assert logits[:, 0].tolist() == pytest.approx(second + values[uncertain:])
        called = passes.second.sizes
        assert set(called) <= made and sum(called) >= uncertain
        if device == "cpu":  # an image more takes longer
            assert sum(called) - uncertain <= max(called, default=0) / 8
        elif 0 < uncertain <= likely:
            assert called == [min(size for size in made if size >= uncertain)]


def test_the_most_memory_is_that_of_the_calls_where_no_image_is_sure() -> None:
    passes = FakePasses(FakePass(1, True), FakePass(10, True))
    router = router_of(passes, 0.5, escalated=0.1)
    router(images(*[0.1] * 14))
    called = passes.second.sizes.copy()
    assert called == [1, 2, 4, 4, 4, 4, 2]  # the first three make them
    again = FakePasses(FakePass(1, True), FakePass(10, True))
    router_of(again, 0.5, escalated=0.1).both_passes(images(*[9.0] * 14))
    assert (again.first.sizes, again.second.sizes) == ([14], called)
    assert router.graph_bytes(torch.Size([14, 3, 2, 2])) == 14 * 3 * 1 * 1 + 4 * 3 * 2 * 2
    always = FakePasses(FakePass(1, True), FakePass(10, True))
    router_of(always, None, escalated=1.0).both_passes(images(*[9.0] * 14))
    assert (always.first.sizes, always.second.sizes) == ([], [14])


def test_a_large_batch_whose_images_all_prove_unsure_is_answered() -> None:
    passes = FakePasses(FakePass(1, True), FakePass(10, True))
    logits = router_of(passes, 0.5, escalated=0.0)(images(*[0.25] * 1500))
    assert logits[:, 0].tolist() == pytest.approx([2.5] * 1500) and set(passes.second.sizes) == {1}


def test_it_tells_what_it_is(passes_of: Callable[..., Passes], small: Checkpoint) -> None:
    passes = passes_of(small)
    router = router_of(passes, 0.5)
    assert isinstance(router, Routes)
    told = router.describe()
    assert told["variant"].name == "routed"
    assert (told["model"].image_size, told["routing"].first.image_size) == ((32, 32), (16, 16))
    assert told["size"].weight_bytes == passes.first.weight_bytes() + passes.second.weight_bytes()
    flops = router.flops_per_image()
    assert flops == passes.first.flops_per_image() + round(0.5 * passes.second.flops_per_image())
    with pytest.raises(UnsupportedError, match="preprocess"):
        router.preprocess = lambda image: torch.zeros(3, 32, 32)
