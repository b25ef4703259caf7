"""The kernels in Triton's interpreter, on the CPU: run by `test_interpreted.py` in a process of its own.

The interpreter takes the place of the compiler for all of a process, and must be chosen before triton is imported.
"""

import os

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import ViTConfig, ViTForImageClassification
from triton.runtime import interpreter

from vitopt.models.names import block_names
from vitopt.optimize.blocks import join_gelu
from vitopt.optimize.fuse import fuse_projections
from vitopt.optimize.kernels.blocks import FusedLinear, fuse_products, fused_layers
from vitopt.optimize.kernels.product import Tile, fused_linear

assert os.environ["TRITON_INTERPRET"] == "1"

EPS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL = Tile(64, 32, 32, 4, 3)


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 values as if they were integers (triton issue 11584)."""
    builder = interpreter.InterpreterBuilder
    multiply, language = builder.create_dot, interpreter.tl

    def create_dot(self: object, a: object, b: object, *others: object) -> object:
        if a.dtype == language.bfloat16:  # type: ignore[attr-defined]
            a, b = (builder.create_fp_ext(self, value, language.float32) for value in (a, b))
        return multiply(self, a, b, *others)

    monkeypatch.setattr(builder, "create_dot", create_dot)


def reference(x, weight, bias=None, normed=False, residual=None, eps=1e-6, gelu="none"):  # type: ignore[no-untyped-def]
    """In float64, by torch."""
    x, weight = x.double(), weight.double()
    if normed:
        x = nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    found = nn.functional.linear(x, weight, None if bias is None else bias.double())
    if gelu != "none":
        found = nn.functional.gelu(found, approximate="tanh" if gelu == "tanh" else "none")
    return found if residual is None else found + residual.double()


def values(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def call(x, weight, bias=None, normed=False, residual=None, eps=1e-6, gelu="none", tile=SMALL):  # type: ignore[no-untyped-def]
    sums = weight.float().sum(1) if normed else None
    return fused_linear(x, weight, bias, sums, residual, eps, gelu, list(tile), False)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "does", [{}, {"normed": True}, {"gelu": "erf"}, {"normed": True, "gelu": "tanh"}, {"residual": True}], ids=str
)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((197, 40, 64), torch.bfloat16), ((1, 72, 96), torch.float32), *(((65, 33, 40), dtype) for dtype in EPS)],
    ids=str,
)
def test_every_epilogue_and_split_is_the_product_in_float64(
    shape: tuple[int, int, int], does: dict[str, object], splits: int, dtype: torch.dtype
) -> None:
    rows, columns, depth = shape
    x, weight = values(rows, depth, dtype=dtype, mean=3.0), values(columns, depth, dtype=dtype, seed=1)
    how = dict(does, bias=values(columns, dtype=dtype, seed=2))
    if "residual" in does:
        how["residual"] = values(rows, columns, dtype=dtype, seed=3)
    found = call(x, weight, **how, tile=SMALL._replace(splits=splits))
    assert found.dtype == dtype
    assert error(found, reference(x, weight, **how)) < EPS[dtype]


def test_splits_are_added_in_one_order_whatever_their_number() -> None:
    x, weight = values(3, 256, mean=1.0), values(40, 256, seed=1)
    whole = call(x, weight, normed=True)
    for splits in (2, 8):
        parts, again = (call(x, weight, normed=True, tile=SMALL._replace(splits=splits)) for _ in range(2))
        assert error(parts, whole.double()) < 1e-6
        torch.testing.assert_close(again, parts, rtol=0, atol=0)


@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("outlier", [None, 0, 5])
def test_a_norm_keeps_its_digits_far_from_zero_and_beside_an_outlier(mean: float, outlier: int | None) -> None:
    x = values(5, 192, mean=mean)
    if outlier is not None:
        x[:, outlier] += 300
    weight = values(40, 192, seed=1)
    # Products of values around 1,000 are rounded to 6e-8 of them; a variance to that of so many squares at most.
    bound = 2e-4 if mean else 192 * 1.2e-7
    assert error(call(x, weight, normed=True), reference(x, weight, normed=True)) < bound


def test_a_row_without_variance_is_nearly_the_bias() -> None:
    bias = values(40, seed=2)
    found = call(torch.full((3, 64), 7.0), values(40, 64, seed=1), bias=bias, normed=True)
    # What is left of 7 - 7 in fp32, a few times 1e-5 over 64 products, over sqrt(1e-6).
    torch.testing.assert_close(found, bias.expand(3, 40), rtol=0, atol=0.05)


def test_rows_may_lie_apart_and_be_of_several_dimensions() -> None:
    wide, weight = values(2, 9, 128), values(24, 64, seed=1)
    x, residual = wide[:, :, :64], values(9, 2, 24, seed=2).transpose(0, 1)
    assert not x.is_contiguous() and not residual.is_contiguous()
    found = call(x, weight, residual=residual)
    assert found.shape == (2, 9, 24) and found.is_contiguous()
    assert error(found, reference(x, weight, residual=residual)) < 1e-6
    assert error(call(wide[:, 0], values(24, 128, seed=1)), reference(wide[:, 0], values(24, 128, seed=1))) < 1e-6


def test_more_tiles_than_a_group_holds_are_each_computed_once() -> None:
    x, weight = values(18 * 16, 32), values(40, 32, seed=1)
    assert error(call(x, weight, tile=Tile(16, 32, 32, 4, 3)), reference(x, weight)) < 1e-6


def test_the_operator_is_one_that_torch_can_trace() -> None:
    x, weight = values(2, 5, 32), values(24, 32, seed=1)
    tile = list(SMALL._replace(depth=16, splits=2))
    for residual, sums in ((None, weight.sum(1)), (values(2, 5, 24, seed=2), None)):
        torch.library.opcheck(fused_linear, (x, weight, None, sums, residual, 1e-6, "erf", tile, False))
    with FakeTensorMode() as mode:
        fake = fused_linear(mode.from_tensor(x), mode.from_tensor(weight), None, None, None, 0.0, "none", tile, False)
    assert fake.shape == (2, 5, 24) and fake.stride() == (120, 24, 1)


def model_of(tanh: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A ViT of two blocks whose norms scale and shift."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96
    )
    model = ViTForImageClassification(config).eval().requires_grad_(False)
    model.config._attn_implementation = "sdpa"
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1) * 0.5)
    if tanh:
        assert join_gelu(model) == 2
    return model.to(dtype)


@pytest.mark.parametrize(("tanh", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_a_model_of_fused_products_gives_the_logits_of_the_plain_one(tanh: bool, dtype: torch.dtype) -> None:
    pixels = values(2, 3, 32, 32, dtype=dtype)
    expected = model_of(tanh, dtype).double()(pixels.double()).logits
    fused = model_of(tanh, dtype)
    fuse_projections(fused)
    assert fuse_products(fused, block_names(fused, "vit")) == 8
    plainly = fused(pixels).logits  # without tiles it is torch that computes
    for layer in fused_layers(fused):
        layer.tiles = {34: SMALL._replace(splits=2 if layer.in_features > 64 else 1)}
    found = fused(pixels).logits
    assert not torch.equal(found, plainly)
    assert error(found, expected) < 8 * EPS[dtype] and error(plainly, expected) < 8 * EPS[dtype]


def test_compiled_code_calls_the_kernels_and_serves_blocks_that_share_it() -> None:
    pixels = values(2, 3, 32, 32)
    fused = model_of()
    fuse_projections(fused)
    fuse_products(fused, names := block_names(fused, "vit"))
    for layer in fused_layers(fused):
        layer.tiles = {34: SMALL}
    eager = fused(pixels).logits
    targets: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        targets.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    for name in names:
        fused.get_submodule(name).compile(fullgraph=True, dynamic=False, backend=backend)
    torch.testing.assert_close(fused(pixels).logits, eager, rtol=0, atol=0)
    assert len(targets) == 1  # one program for both blocks
    assert sum("fused_linear" in target for target in targets[0]) == 4
    assert not any("norm" in target or "gelu" in target for target in targets[0])
    assert all(isinstance(layer, FusedLinear) for layer in fused_layers(fused))
