"""Rounding a weight matrix to the values of a format so that the layer's outputs stay, and not the weights.

Error-compensated rounding: GPTQ, arXiv 2210.17323. As biases stay in 16 bit they absorb what rounding changes in the
mean output, so that the covariance of the inputs takes the place of their second moments. Tokens count by how much the
logits depend on them. Scales are searched by the
loss that they cause; then each code and each scale is set to its best value given all others (coordinate descent, as
in QuantEase, arXiv 2309.01885), which never raises the loss.

Pure functions of tensors: `weight` is (rows, columns), `hessian` (columns, columns), and the loss of rounded weights Q
is the trace of (W - Q) H (W - Q)^T.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Shares of a group's full range, beyond which weights are clipped, from which a scale is chosen.
_SHARES = tuple(1.06 - 0.03 * step for step in range(18))
_SWEEPS = 4
_SMALLEST = 1e-12


class Moments:
    """Weighted mean and covariance of a layer's inputs: (columns, columns) numbers, however many tokens are added."""

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.tokens = 0
        self._weights = torch.zeros((), device=device)
        self._sum = torch.zeros(columns, device=device)
        self._squares = torch.zeros(columns, columns, device=device)

    def add(self, inputs: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """`inputs`: (..., columns); `weights`: a number for each of these tokens, 1 without."""
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        weights = inputs.new_ones(len(inputs)) if weights is None else weights
        weighted = inputs * weights[:, None]
        self.tokens += len(inputs)
        self._weights += weights.sum()
        self._sum += weighted.sum(0)
        self._squares += weighted.T @ inputs

    @property
    def mean(self) -> torch.Tensor:
        """(columns,)"""
        return self._sum / self._weights

    def hessian(self, damping: float) -> torch.Tensor:
        """The covariance, with `damping` times its mean diagonal on the diagonal, which makes it positive definite."""
        found = self._squares / self._weights - torch.outer(self.mean, self.mean)
        least = max(float(found.diagonal().mean()), _SMALLEST)
        return found + damping * least * torch.eye(len(found), device=found.device)


@dataclass(frozen=True)
class Grid:
    """The values that a format can hold: `zeros + scales * levels[codes]`, a scale for each row and group of columns.

    `levels`: ascending. `group`: neighbouring columns that share a scale. `symmetric`: zeros are 0. `holdable`: scales
    of one group, (rows, any), and its number -> the nearest that the format can store. `holdable_zeros`: the same of
    zeros.
    """

    levels: torch.Tensor
    group: int
    holdable: Callable[[torch.Tensor, int], torch.Tensor] = lambda scales, group: scales
    symmetric: bool = True
    holdable_zeros: Callable[[torch.Tensor], torch.Tensor] = lambda zeros: zeros

    def nearest(self, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Codes of the values that are nearest to `weight`; all three broadcast."""
        between = (self.levels[1:] + self.levels[:-1]) / 2
        return torch.bucketize(((weight - zeros) / scales.clamp_min(_SMALLEST)).contiguous(), between)


@dataclass(frozen=True)
class Rounded:
    """`codes`: (rows, columns), places in `grid.levels`; `scales`, `zeros`: (rows, groups)."""

    grid: Grid
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def values(self) -> torch.Tensor:
        """(rows, columns): the weights that they stand for."""
        scales, zeros = (part.repeat_interleave(self.grid.group, 1) for part in (self.scales, self.zeros))
        return zeros + scales * self.grid.levels[self.codes]


def loss(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """What `rounded` in place of `weight` changes in the outputs: squares, summed over rows, mean over tokens."""
    change = weight - rounded
    return float(((change @ hessian) * change).sum())


def search_scales(
    weight: torch.Tensor, importance: torch.Tensor, grid: Grid, group: int, shares: Sequence[float] = _SHARES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, (rows,) each, of one group of columns, `weight`: (rows, group's columns).

    Of the ranges that are tried, `shares` of the full one, the one whose nearest values lie closest to the weights,
    squares weighted by `importance`: (group's columns,).
    """
    low, high = grid.levels[0], grid.levels[-1]
    tried = weight.new_tensor(shares)
    if grid.symmetric:
        widest = weight.abs().amax(1, keepdim=True) / torch.maximum(-low, high)
        zeros = torch.zeros_like(widest).expand(-1, len(tried))
        scales = grid.holdable(widest * tried, group)
    else:
        least, most = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scales = grid.holdable((most - least) / (high - low) * tried, group)
        zeros = grid.holdable_zeros((most + least) / 2 - scales * (high + low) / 2)
    best = torch.full((len(weight), 1), torch.inf, device=weight.device)
    chosen = torch.zeros_like(best, dtype=torch.long)
    for index in range(len(tried)):
        scale, zero = scales[:, index : index + 1], zeros[:, index : index + 1]
        values = zero + scale * grid.levels[grid.nearest(weight, scale, zero)]
        lost = ((values - weight).square() * importance).sum(1, keepdim=True)
        chosen = torch.where(lost < best, index, chosen)
        best = torch.minimum(lost, best)
    return scales.gather(1, chosen)[:, 0], zeros.gather(1, chosen)[:, 0]


def compensated(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, search: bool = True) -> Rounded:
    """Round column by column; the columns that follow make up for what each loses (GPTQ).

    A group's scales are searched when its turn comes, on weights that have made up for the groups before, each column
    weighted by what an error in it costs after those that follow have made up for it; without `search` they span the
    weights.

    Raises:
        torch.linalg.LinAlgError: `hessian` is not positive definite.
    """
    rows, columns = weight.shape
    work = weight.clone()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    cost = upper.diagonal().square().reciprocal()
    codes = torch.zeros(rows, columns, dtype=torch.long, device=weight.device)
    scales = torch.zeros(rows, columns // grid.group, device=weight.device)
    zeros = torch.zeros_like(scales)
    for number, start in enumerate(range(0, columns, grid.group)):
        stop = start + grid.group
        scale, zero = search_scales(work[:, start:stop], cost[start:stop], grid, number, _SHARES if search else (1.0,))
        scales[:, number], zeros[:, number] = scale, zero
        errors = work.new_zeros(rows, grid.group)
        for column in range(start, stop):
            codes[:, column] = grid.nearest(work[:, column], scale, zero)
            values = zero + scale * grid.levels[codes[:, column]]
            errors[:, column - start] = (work[:, column] - values) / upper[column, column]
            work[:, column:stop] -= torch.outer(errors[:, column - start], upper[column, column:stop])
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return Rounded(grid, codes, scales, zeros)


def descended(weight: torch.Tensor, hessian: torch.Tensor, rounded: Rounded, sweeps: int = _SWEEPS) -> Rounded:
    """The same with each scale, then each code, set to its best value given all others, `sweeps` times."""
    grid, codes, scales = rounded.grid, rounded.codes.clone(), rounded.scales.clone()
    values = rounded.values()
    for _ in range(sweeps):
        for number in range(scales.shape[1]):
            columns = slice(number * grid.group, (number + 1) * grid.group)
            curvature = hessian[columns, columns]
            pull = (weight - values) @ hessian[:, columns]  # minus half the gradient of the loss
            levels = grid.levels[codes[:, columns]]
            zero, scale = rounded.zeros[:, number], scales[:, number]
            along = ((levels @ curvature) * levels).sum(1).clamp_min(_SMALLEST)
            gain = (levels * pull).sum(1)
            wanted = grid.holdable((scale + gain / along)[:, None], number)[:, 0]
            step = wanted - scale
            step = torch.where((wanted > 0) & (step * (2 * gain - step * along) > 0), step, 0)
            pull -= step[:, None] * (levels @ curvature)
            scales[:, number] = scale = scale + step
            held = zero[:, None] + scale[:, None] * levels
            for place in range(grid.group):
                best = held[:, place] + pull[:, place] / curvature[place, place]
                code = grid.nearest(best, scale, zero)
                change = zero + scale * grid.levels[code] - held[:, place]
                pull -= torch.outer(change, curvature[place])
                held[:, place] += change
                codes[:, columns.start + place] = code
            values[:, columns] = held
    return Rounded(grid, codes, scales, rounded.zeros)
