"""The tensors in which bitsandbytes and torchao hold 4- and 8-bit weights: the values they can hold, and writing codes.

A library's own quantized layer is filled anew, so that it stays what plain transformers saves and opens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitopt.formats import Format
from vitopt.optimize.rounding import Grid, Rounded

_GROUP = 64
_TILE_COLUMNS, _INNER_TILES = 1024, 8  # of torchao's packing for torch's int4 kernel


@dataclass(frozen=True)
class Packing:
    """`grid`: what the weight of a quantized layer can hold, on the device of its tensors. `write`: puts the codes and
    scales of a `Rounded` of that grid in the place of the layer's own."""

    grid: Callable[[nn.Module], Grid]
    write: Callable[[nn.Module, Rounded], None]


def _nf4_grid(linear: nn.Linear) -> Grid:
    # A scale is an 8-bit code of its distance from `offset`, in units of the largest of 256 neighbours.
    state = linear.weight.quant_state
    groups = linear.in_features // state.blocksize
    numbers = torch.arange(linear.out_features * groups, device=state.absmax.device).view(-1, groups)
    units = _units(state, numbers)

    def holdable(scales: torch.Tensor, group: int) -> torch.Tensor:
        unit = units[:, group, None]
        return state.state2.code[_scale_codes(state, scales, unit)] * unit + state.offset

    return Grid(state.code, state.blocksize, holdable)


def _units(state: Any, numbers: torch.Tensor) -> torch.Tensor:
    """Of the scales of these numbers; 0 where 256 neighbours are equal, for which any small unit will do."""
    units: torch.Tensor = state.state2.absmax[numbers // state.state2.blocksize]
    return units.clamp_min(1e-12)


def _scale_codes(state: Any, scales: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    code = state.state2.code
    return torch.bucketize(((scales - state.offset) / units).contiguous(), (code[1:] + code[:-1]) / 2)


def _write_nf4(linear: nn.Linear, rounded: Rounded) -> None:
    state = linear.weight.quant_state
    codes = rounded.codes.view(-1, 2).to(torch.uint8)
    linear.weight.data.copy_((codes[:, :1] << 4 | codes[:, 1:]).view(linear.weight.data.shape))
    scales = rounded.scales.reshape(-1)
    numbers = torch.arange(len(scales), device=scales.device)
    state.absmax.copy_(_scale_codes(state, scales, _units(state, numbers)))


def _w8a8_grid(linear: nn.Linear) -> Grid:
    levels = torch.arange(-128, 128, device=linear.weight.qdata.device, dtype=torch.float32)
    return Grid(levels, linear.in_features)


def _write_w8a8(linear: nn.Linear, rounded: Rounded) -> None:
    linear.weight.qdata.copy_(rounded.codes - 128)
    linear.weight.scale.copy_(rounded.scales)


def _as_bf16(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def _int4_grid(linear: nn.Linear) -> Grid:
    levels = torch.arange(-8, 8, device=linear.weight.device, dtype=torch.float32)
    return Grid(levels, _GROUP, lambda scales, group: _as_bf16(scales), symmetric=False, holdable_zeros=_as_bf16)


def _write_int4(linear: nn.Linear, rounded: Rounded) -> None:
    weight, (rows, columns) = linear.weight, rounded.codes.shape
    codes = F.pad(rounded.codes, (0, -columns % _TILE_COLUMNS, 0, -rows % 8)).to(torch.uint8)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    weight.qdata.copy_(torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER_TILES))
    groups = columns // _GROUP
    weight.scale_and_zero[:groups, :rows] = torch.stack((rounded.scales.T, rounded.zeros.T), -1).to(torch.bfloat16)


# format -> how its weights are held; the formats that have calibrated rounding
PACKINGS: dict[Format, Packing] = {
    "nf4": Packing(_nf4_grid, _write_nf4),
    "int4": Packing(_int4_grid, _write_int4),
    "w8a8": Packing(_w8a8_grid, _write_w8a8),
}
