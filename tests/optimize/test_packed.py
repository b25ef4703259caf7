"""Codes and scales are in the tensors exactly as they were chosen: the library itself unpacks the same weights."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from vitopt.formats import FORMATS, Format
from vitopt.models.checkpoint import load_model, open_checkpoint
from vitopt.optimize.formats import quantization_config
from vitopt.optimize.packed import PACKINGS
from vitopt.optimize.quantize import plan_for
from vitopt.optimize.rounding import Rounded
from vitopt.recipe import VariantSpec


def layer_of(tiny_checkpoint: Path, format: Format) -> torch.nn.Linear:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    plan = plan_for(checkpoint, VariantSpec(name="v", format=format))
    model = load_model(checkpoint, dtype=torch.bfloat16, quantization=quantization_config(plan, torch.bfloat16))
    return model.get_submodule(next(item.layer.module for item in plan.layers if item.layer.logical == "block.1.fc1"))


def any_codes(linear: torch.nn.Linear, format: Format) -> Rounded:
    """Random codes with random scales, as the format can hold them."""
    grid = PACKINGS[format].grid(linear)
    rows, columns = linear.out_features, linear.in_features
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(len(grid.levels), (rows, columns), generator=generator)
    wanted = 0.05 + 0.2 * torch.rand(rows, columns // grid.group, generator=generator)
    scales = torch.cat([grid.holdable(wanted[:, i : i + 1], i) for i in range(wanted.shape[1])], 1)
    return Rounded(grid, codes, scales, torch.zeros_like(scales))


def test_nf4_unpacks_to_the_codes_and_scales_that_were_written(tiny_checkpoint: Path) -> None:
    linear = layer_of(tiny_checkpoint, "nf4")
    chosen = any_codes(linear, "nf4")
    assert (chosen.scales.unique().numel()) > 20
    PACKINGS["nf4"].write(linear, chosen)
    state = linear.weight.quant_state
    state.dtype = torch.float32
    torch.testing.assert_close(dequantize_4bit(linear.weight.data, state), chosen.values(), rtol=1e-6, atol=1e-7)


def test_nf4_scales_of_equal_blocks_are_finite(tiny_checkpoint: Path) -> None:
    linear = layer_of(tiny_checkpoint, "nf4")
    linear.weight.quant_state.state2.absmax.zero_()  # as bitsandbytes leaves it where all blocks span the same
    held = PACKINGS["nf4"].grid(linear).holdable(torch.full((linear.out_features, 1), 0.3), 0)
    assert torch.isfinite(held).all()


def test_w8a8_holds_the_codes_and_scales_that_were_written(tiny_checkpoint: Path) -> None:
    linear = layer_of(tiny_checkpoint, "w8a8")
    chosen = any_codes(linear, "w8a8")
    PACKINGS["w8a8"].write(linear, chosen)
    found = linear.weight.dequantize(torch.float32)
    torch.testing.assert_close(found, chosen.values(), rtol=1e-6, atol=1e-6)


def test_int4_has_the_values_of_torchaos_kernel() -> None:
    from torchao.quantization.quant_primitives import _dequantize_affine_tinygemm

    linear = torch.nn.Linear(128, 16)
    grid = PACKINGS["int4"].grid(linear)
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) + 0.3
    from vitopt.optimize.rounding import compensated

    found = compensated(weight, torch.eye(128), grid)
    expected = _dequantize_affine_tinygemm(
        found.codes.int(), (1, 64), found.scales, found.zeros, torch.int32, 0, 15, output_dtype=torch.float32
    )
    torch.testing.assert_close(found.values(), expected)
    assert torch.equal(found.scales, found.scales.bfloat16().float())
    assert torch.equal(found.zeros, found.zeros.bfloat16().float()) and found.zeros.any()


def test_every_format_that_can_be_calibrated_has_a_packing() -> None:
    assert set(PACKINGS) == {name for name, facts in FORMATS.items() if facts.calibrated}


@pytest.mark.parametrize("format", ["nf4", "w8a8"])
def test_what_the_library_rounded_is_on_the_grid(tiny_checkpoint: Path, format: Format) -> None:
    linear = layer_of(tiny_checkpoint, format)
    grid = PACKINGS[format].grid(linear)
    if format == "nf4":
        weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    else:
        weight = linear.weight.dequantize(torch.float32)
    widest = weight.abs().view(len(weight), -1, grid.group).amax(2)
    scales = torch.cat(
        [grid.holdable(widest[:, i : i + 1] / grid.levels.abs().max(), i) for i in range(len(widest[0]))], 1
    )
    wide = scales.repeat_interleave(grid.group, 1)
    codes = grid.nearest(weight, wide, torch.zeros_like(wide))
    back = Rounded(grid, codes, scales, torch.zeros_like(scales)).values()
    assert (back - weight).abs().max() < 0.03 * weight.abs().max()
