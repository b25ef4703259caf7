"""8-bit products that a device refuses, played by a library that refuses some rows as cuBLAS and torch do."""

from pathlib import Path

import pytest
import torch

from vitopt.data.pixels import random_pixels
from vitopt.models.checkpoint import open_checkpoint
from vitopt.optimize import refused
from vitopt.optimize.quantize import quantize
from vitopt.optimize.refused import FittingLinear
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import RunSpec, VariantSpec

CPU = torch.device("cpu")
ROWS = 17  # of one image: 16 patches and the class token


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is the device whose libraries refuse shapes."""
    monkeypatch.setattr(refused, "DEVICES", ("cpu",))


@pytest.fixture
def fp8(fp8_on_the_cpu: None, tiny_checkpoint: Path) -> TorchRunnable:
    return prepare(open_checkpoint(str(tiny_checkpoint)), name="mine", device=CPU, run=RunSpec(run_as="fp8"))


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Columns -> up to how many rows of them are refused; it may be changed."""
    shapes: dict[int, int] = {}
    product = torch._scaled_mm

    def refusing(left: torch.Tensor, right: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        if left.shape[0] <= shapes.get(left.shape[1], 0):
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul(...)`")
        return product(left, right, *args, **options)

    monkeypatch.setattr(torch, "_scaled_mm", refusing)
    return shapes


def fitting(runnable: TorchRunnable) -> list[str]:
    return [name for name, module in runnable.model.named_modules() if isinstance(module, FittingLinear)]


def test_layers_refused_whatever_their_rows_run_in_16_bit_for_that_batch_alone_and_it_is_said(
    fp8: TorchRunnable, refuse: dict[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = random_pixels(1, (32, 32)), random_pixels(2, (32, 32))
    before = fp8(two)
    refuse[128] = 1000  # fc2
    found = fp8(one)
    layers = fitting(fp8)
    assert layers == [f"vit.layers.{block}.mlp.fc2" for block in range(3)]
    assert fp8.reasons["format"] == "batch 1: the device refused 3 layers, fc2, which run in bf16"
    assert [m for m in caplog.messages if "batch 1" in m and "fc2" in m and "bf16" in m]
    refuse.clear()
    torch.testing.assert_close(fp8(two), before, rtol=0, atol=0)  # in fp8 as before
    # The same as bf16 weights of the same values, for these rows.
    for name in layers:
        host = fp8.model.get_submodule(name)
        inputs = torch.randn(1, ROWS, 128, dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(inputs, host.weight.dequantize(), host.bias)
        torch.testing.assert_close(host(inputs), expected, rtol=0, atol=0)
    assert torch.isfinite(found).all() and "fp8" in str(fp8.describe()["variant"].ran["format"])


def test_rows_of_zeros_fill_up_what_is_refused_for_few_rows_alone_and_change_no_answer(
    fp8: TorchRunnable, refuse: dict[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    one = random_pixels(1, (32, 32))
    expected = fp8(one)
    fp8._settled.clear()
    refuse[128] = 256  # as on an H100
    torch.testing.assert_close(fp8(one), expected, rtol=0, atol=0)
    assert len(fitting(fp8)) == 3 and fp8.model.get_submodule(fitting(fp8)[0]).padded_rows == {ROWS: 272}
    assert "zeros" in fp8.reasons["format"] and "fc2" in fp8.reasons["format"]
    assert "format" not in fp8.describe()["variant"].ran  # it is fp8 throughout


def test_int8_products_of_the_class_token_alone_get_the_rows_that_cuda_wants(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="w8a8", format="w8a8"), tmp_path / "w8a8", "cpu")
    opened, pixels = open_checkpoint(str(tmp_path / "w8a8")), random_pixels(1, (32, 32))
    run = RunSpec(class_token_last=True)
    expected = prepare(opened, name="mine", device=CPU, run=run)(pixels)
    product = torch._int_mm

    def refusing(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.shape[0] <= 16:
            raise RuntimeError(f"self.size(0) needs to be greater than 16, but got {left.shape[0]}")
        return product(left, right)

    monkeypatch.setattr(torch, "_int_mm", refusing)
    runnable = prepare(opened, name="mine", device=CPU, run=run)
    torch.testing.assert_close(runnable(pixels), expected, rtol=0, atol=0)
    # Of the last block all but keys and values.
    assert [name.rpartition(".")[2] for name in fitting(runnable)] == ["q_proj", "o_proj", "fc1", "fc2"]
    assert all(runnable.model.get_submodule(name).padded_rows == {1: 32} for name in fitting(runnable))
    assert "4 layers" in runnable.reasons["format"]


def test_an_eager_product_that_hides_its_refusal_is_found_all_the_same(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchao multiplies in fp32 where CUDA refuses; code compiled for the same rows would fail.
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="w8a8", format="w8a8"), tmp_path / "w8a8", "cpu")
    product, asked = torch._int_mm, list[int]()

    def refusing(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        asked.append(left.shape[0])
        if left.shape[0] <= 16 and not left.any():  # asked by what looks for it, while torchao gets its answer
            raise RuntimeError("self.size(0) needs to be greater than 16, but got 1")
        return product(left, right)

    monkeypatch.setattr(torch, "_int_mm", refusing)
    opened = open_checkpoint(str(tmp_path / "w8a8"))
    runnable = prepare(opened, name="mine", device=CPU, run=RunSpec(class_token_last=True))
    runnable(random_pixels(1, (32, 32)))
    assert len(fitting(runnable)) == 4 and 32 in asked


def test_a_layer_meets_several_batches_each_in_its_way(fp8: TorchRunnable, refuse: dict[int, int]) -> None:
    refuse[128] = 1000
    fp8(random_pixels(1, (32, 32)))
    refuse[128] = 256
    fp8(random_pixels(2, (32, 32)))
    (layer, *_) = [fp8.model.get_submodule(name) for name in fitting(fp8)]
    assert (layer.half_rows, layer.padded_rows) == ({ROWS}, {2 * ROWS: 272})
    assert fp8.reasons["format"].count("batch") == 2


def test_what_is_not_refused_stays_as_it_is(fp8: TorchRunnable, refuse: dict[int, int]) -> None:
    fp8(random_pixels(1, (32, 32)))
    assert "format" not in fp8.reasons and "format" not in fp8.describe()["variant"].ran
    assert not any(isinstance(module, FittingLinear) for module in fp8.model.modules())


def test_a_refused_product_keeps_no_checkpoint_from_being_written(
    fp8_on_the_cpu: None, refuse: dict[int, int], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    refuse[128] = 1000
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="fp8", format="fp8"), tmp_path / "fp8", "cpu")
    assert (tmp_path / "fp8" / "config.json").is_file()


def test_another_error_is_raised(fp8: TorchRunnable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch, "_scaled_mm", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fp8(random_pixels(1, (32, 32)))


def test_a_compiled_block_is_not_compiled_to_find_it_out(fp8: TorchRunnable, refuse: dict[int, int]) -> None:
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        nonlocal compiled
        compiled += 1
        return graph.forward

    for layer in fp8.model.vit.layers:
        layer.compile(backend=backend)
    refuse[128] = 1000
    fp8._settle_products(random_pixels(1, (32, 32)).to(torch.bfloat16))
    assert "fc2" in fp8.reasons["format"] and compiled == 0
