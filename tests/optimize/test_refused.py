"""fp8 products that a device refuses, played by a library that refuses few rows of many columns."""

from pathlib import Path

import pytest
import torch

from vitopt.data.pixels import random_pixels
from vitopt.models.checkpoint import open_checkpoint
from vitopt.optimize.refused import PartlyHalfLinear
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import RunSpec

CPU = torch.device("cpu")
ROWS = 17  # of one image: 16 patches and the class token


@pytest.fixture
def fp8(fp8_on_the_cpu: None, tiny_checkpoint: Path) -> TorchRunnable:
    return prepare(open_checkpoint(str(tiny_checkpoint)), name="mine", device=CPU, run=RunSpec(run_as="fp8"))


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of the products that are refused; the list may be changed."""
    shapes: list[tuple[int, int]] = []
    product = torch._scaled_mm

    def refusing(left: torch.Tensor, right: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        if tuple(left.shape) in shapes:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul(...)`")
        return product(left, right, *args, **options)

    monkeypatch.setattr(torch, "_scaled_mm", refusing)
    return shapes


def test_refused_layers_run_in_16_bit_for_that_batch_alone_and_it_is_said(
    fp8: TorchRunnable, refuse: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = random_pixels(1, (32, 32)), random_pixels(2, (32, 32))
    before = fp8(two)
    refuse.append((ROWS, 128))  # fc2 at batch 1
    found = fp8(one)
    layers = [name for name, module in fp8.model.named_modules() if isinstance(module, PartlyHalfLinear)]
    assert layers == [f"vit.layers.{block}.mlp.fc2" for block in range(3)]
    assert fp8.reasons["format"] == "batch 1: the device refused 3 layers, fc2"
    assert [m for m in caplog.messages if "batch 1" in m and "fc2" in m and "bf16" in m]
    torch.testing.assert_close(fp8(two), before, rtol=0, atol=0)  # in fp8 as before
    # The same as bf16 weights of the same values, for these rows.
    for name in layers:
        host = fp8.model.get_submodule(name)
        inputs = torch.randn(1, ROWS, 128, dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(inputs, host.weight.dequantize(), host.bias)
        torch.testing.assert_close(host(inputs), expected, rtol=0, atol=0)
    assert torch.isfinite(found).all() and "bf16" in str(fp8.describe()["variant"].ran["format"])


def test_what_is_not_refused_stays_as_it_is(fp8: TorchRunnable, refuse: list[tuple[int, int]]) -> None:
    fp8(random_pixels(1, (32, 32)))
    assert "format" not in fp8.reasons and "format" not in fp8.describe()["variant"].ran
    assert not any(isinstance(module, PartlyHalfLinear) for module in fp8.model.modules())


def test_another_error_is_raised(fp8: TorchRunnable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch, "_scaled_mm", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fp8(random_pixels(1, (32, 32)))


def test_a_compiled_block_is_not_compiled_to_find_it_out(fp8: TorchRunnable, refuse: list[tuple[int, int]]) -> None:
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        nonlocal compiled
        compiled += 1
        return graph.forward

    for layer in fp8.model.vit.layers:
        layer.compile(backend=backend)
    refuse.append((ROWS, 128))
    fp8._settle_products(random_pixels(1, (32, 32)).to(torch.bfloat16))
    assert "fc2" in fp8.reasons["format"] and compiled == 0
