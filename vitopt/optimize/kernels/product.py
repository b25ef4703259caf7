"""A linear layer as one kernel with the LayerNorm before it and the GELU or addition after it, in Triton.

A norm's scale and shift belong to the layer's weight and bias (`fold` in `blocks.py`); what is left of it is done after
the product, for each row: ((x - mean) / std) W^T = (x W^T - mean * (sums of W's rows)) / std. Mean and std are summed
while the product passes over the row, so that normalised activations are never written. Few rows leave most of a GPU
idle: then programs share the columns of x (split-K), and a second kernel adds what they found, in a fixed order.

Importing this needs triton.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

Gelu = Literal["none", "erf", "tanh"]

_GROUP = 8  # tiles of rows that programs take one after another: they find the weight's tiles in the cache
_ADDED = (8, 256)  # rows and columns of a program that adds splits


class Tile(NamedTuple):
    """What one program takes (`rows` of `columns` outputs, `depth` inputs at a time), by how many `splits` of all
    inputs, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    splits: int = 1


@triton.jit
def _finished(  # type: ignore[no-untyped-def]
    found, x, row, column, row_sums, row_squares, bias, weight_sums, residual, n_rows, n_columns, n_depth,
    x_stride, eps, NORM: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """The norm, bias, GELU and addition of a tile of products, in fp32."""
    there = column < n_columns
    if NORM:
        shift = tl.load(x + row * x_stride, mask=row < n_rows, other=0.0).to(tl.float32)
        mean = row_sums / n_depth
        variance = tl.maximum(row_squares / n_depth - mean * mean, 0.0)
        sums = tl.load(weight_sums + column, mask=there, other=0.0)
        found = (found - (mean + shift)[:, None] * sums[None, :]) / tl.sqrt(variance + eps)[:, None]
    if BIAS:
        found += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    if GELU == "erf":
        found = 0.5 * found * (1.0 + tl.erf(found * 0.7071067811865476))
    if GELU == "tanh":  # (1 + tanh(u)) / 2 is the logistic function of 2 u
        found = found * tl.sigmoid(1.5957691216057308 * (found + 0.044715 * found * found * found))
    if RESIDUAL:
        inside = (row < n_rows)[:, None] & there[None, :]
        found += tl.load(residual + row[:, None] * n_columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def _product(  # type: ignore[no-untyped-def]
    x, weight, bias, weight_sums, residual, out, partial, statistics, n_rows, n_columns, n_depth, x_stride, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of x W^T, finished, or with SPLIT its sum over a part of the depth and that of its rows."""
    tiles_down, tiles_across = tl.cdiv(n_rows, ROWS), tl.cdiv(n_columns, COLUMNS)
    program, in_group = tl.program_id(0), GROUP * tiles_across
    first = program // in_group * GROUP
    height = tl.minimum(tiles_down - first, GROUP)
    tile_row = first + program % in_group % height
    tile_column = program % in_group // height

    # Offsets are 64 bit: 4,096 images of 197 tokens have more than 2^31 values of 4,096.
    row = tile_row.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, DEPTH)
    part = tl.cdiv(tl.cdiv(n_depth, DEPTH), tl.num_programs(1)) * DEPTH
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, n_depth)
    row_there, column_there = (row < n_rows)[:, None], (column < n_columns)[None, :]
    x_at = x + row[:, None] * x_stride + (begin + step)[None, :]
    weight_at = weight + column.to(tl.int64)[None, :] * n_depth + (begin + step)[:, None]

    if DEPENDENT:  # nothing of the kernel before is read or written over until it has ended
        tl.extra.cuda.gdc_wait()
    # Squares of what is near the mean lose no digits. Any value of the row is near enough: it is part of the variance.
    # Inputs are loaded once more for the sums, an iteration ahead and with another policy, so that the loads stay two:
    # of one that the product shares, Triton (3.9) overwrites the buffer while wgmma still reads it.
    if NORM:
        shift = tl.load(x + row * x_stride, mask=row < n_rows, other=0.0).to(tl.float32)[:, None]
        ahead = tl.load(x_at, mask=row_there & (begin + step < end)[None, :], other=0.0, eviction_policy="evict_last")
    row_sums = tl.zeros((ROWS,), tl.float32)
    row_squares = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(begin, end, DEPTH):
        if EVEN:
            inputs = tl.load(x_at, mask=row_there, other=0.0)
            weights = tl.load(weight_at, mask=column_there, other=0.0)
        else:
            inputs = tl.load(x_at, mask=row_there & (at + step < end)[None, :], other=0.0)
            weights = tl.load(weight_at, mask=column_there & (at + step < end)[:, None], other=0.0)
        found = tl.dot(inputs, weights, found, input_precision=PRECISION)
        if NORM:
            moved = ahead.to(tl.float32) - shift
            if not EVEN:
                moved = tl.where((at + step < end)[None, :], moved, 0.0)
            next_there = row_there & (at + DEPTH + step < end)[None, :]
            ahead = tl.load(x_at + DEPTH, mask=next_there, other=0.0, eviction_policy="evict_last")
            row_sums += tl.sum(moved, 1)
            row_squares += tl.sum(moved * moved, 1)
        x_at += DEPTH
        weight_at += DEPTH
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()

    inside = row_there & column_there
    if SPLIT:
        split = tl.program_id(1).to(tl.int64)
        at = (split * n_rows + row)[:, None] * n_columns + column[None, :]
        tl.store(partial + at, found, mask=inside)
        if NORM and tile_column == 0:
            tl.store(statistics + split * 2 * n_rows + row, row_sums, mask=row < n_rows)
            tl.store(statistics + (split * 2 + 1) * n_rows + row, row_squares, mask=row < n_rows)
    else:
        found = _finished(
            found, x, row, column, row_sums, row_squares, bias, weight_sums, residual, n_rows, n_columns, n_depth,
            x_stride, eps, NORM, BIAS, GELU, RESIDUAL,
        )  # fmt: skip
        tl.store(out + row[:, None] * n_columns + column[None, :], found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _added(  # type: ignore[no-untyped-def]
    x, bias, weight_sums, residual, out, partial, statistics, n_rows, n_columns, n_depth, n_splits, x_stride, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the sum of all splits, finished."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    row_sums = tl.zeros((ROWS,), tl.float32)
    row_squares = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for split in range(n_splits):
        at = (split * n_rows + row)[:, None] * n_columns + column[None, :]
        found += tl.load(partial + at, mask=inside, other=0.0)
        if NORM:
            row_sums += tl.load(statistics + split * 2 * n_rows + row, mask=row < n_rows, other=0.0)
            row_squares += tl.load(statistics + (split * 2 + 1) * n_rows + row, mask=row < n_rows, other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    found = _finished(
        found, x, row, column, row_sums, row_squares, bias, weight_sums, residual, n_rows, n_columns, n_depth,
        x_stride, eps, NORM, BIAS, GELU, RESIDUAL,
    )  # fmt: skip
    tl.store(out + row[:, None] * n_columns + column[None, :], found.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("vitopt::fused_linear", mutates_args=())
def fused_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight_sums: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    gelu: str,
    tile: Sequence[int],
    dependent: bool,
) -> torch.Tensor:
    """gelu(norm(input) weight^T + bias) + residual, summed in fp32 and rounded once.

    `input`: (..., in); `weight`: (out, in), of the same type; `residual`: (..., out). With `weight_sums` (out), fp32,
    the sums of the weight's rows, each row of `input` is normalised (LayerNorm, arXiv 1607.06450, without scale and
    shift). `gelu`: as `Gelu`. `tile`: a `Tile`. `dependent`: launched before the kernel before it has ended
    (programmatic dependent launch; compute capability 9.0). Returns (..., out), the same for the same inputs.
    """
    rows = input.reshape(-1, input.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weight = weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    (n_rows, n_depth), n_columns = rows.shape, weight.shape[0]
    how = Tile(*tile)
    out = rows.new_empty(n_rows, n_columns)
    split = how.splits > 1
    partial = rows.new_empty((how.splits, n_rows, n_columns), dtype=torch.float32) if split else None
    statistics = rows.new_empty((how.splits, 2, n_rows), dtype=torch.float32) if split else None
    does = {
        "NORM": weight_sums is not None, "BIAS": bias is not None, "GELU": gelu, "RESIDUAL": residual is not None,
        "DEPENDENT": dependent,
    }  # fmt: skip
    launch = {"launch_pdl": True} if dependent else {}
    # As torch's own products: fp32 keeps its digits unless the user gave them up.
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    tiles = triton.cdiv(n_rows, how.rows) * triton.cdiv(n_columns, how.columns)
    with torch.cuda.device_of(rows):
        _product[(tiles, how.splits)](
            rows, weight, bias, weight_sums, residual, out, partial, statistics, n_rows, n_columns, n_depth,
            rows.stride(0), eps, SPLIT=split, EVEN=n_depth % (how.depth * how.splits) == 0, PRECISION=precision,
            GROUP=_GROUP, ROWS=how.rows, COLUMNS=how.columns, DEPTH=how.depth, num_warps=how.warps,
            num_stages=how.stages, **does, **launch,
        )  # fmt: skip
        if split:
            _added[(triton.cdiv(n_rows, _ADDED[0]), triton.cdiv(n_columns, _ADDED[1]))](
                rows, bias, weight_sums, residual, out, partial, statistics, n_rows, n_columns, n_depth, how.splits,
                rows.stride(0), eps, ROWS=_ADDED[0], COLUMNS=_ADDED[1], num_warps=4, **does, **launch,
            )  # fmt: skip
    return out.view(*input.shape[:-1], n_columns)


@fused_linear.register_fake
def _(input, weight, bias, weight_sums, residual, eps, gelu, tile, dependent):  # type: ignore[no-untyped-def]
    return input.new_empty(*input.shape[:-1], weight.shape[0])
