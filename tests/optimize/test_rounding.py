"""Rounding against a slow reference in float64, and against all choices of codes on small problems."""

import itertools

import pytest
import torch

from vitopt.optimize.rounding import Grid, Moments, Rounded, compensated, descended, loss, search_scales

INTEGERS = torch.arange(-4.0, 4.0)


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the covariance of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / len(inputs)


def nearest(weight: torch.Tensor, grid: Grid, scales: torch.Tensor) -> Rounded:
    zeros = torch.zeros_like(scales)
    wide = scales.repeat_interleave(grid.group, 1)
    return Rounded(grid, grid.nearest(weight, wide, torch.zeros_like(wide)), scales, zeros)


def test_moments_are_those_of_all_tokens_at_once() -> None:
    tokens = torch.randn(60, 5, generator=torch.Generator().manual_seed(1)) + 3
    moments = Moments(5)
    for part in tokens.view(4, 3, 5, 5).unbind():
        moments.add(part)
    covariance = torch.cov(tokens.double().T, correction=0)
    expected = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(5)
    assert moments.tokens == 60
    torch.testing.assert_close(moments.mean, tokens.mean(0))
    torch.testing.assert_close(moments.hessian(0.1).double(), expected, rtol=1e-4, atol=1e-4)


def test_inputs_that_never_change_have_a_positive_definite_hessian() -> None:
    moments = Moments(4)
    moments.add(torch.ones(3, 4))
    torch.linalg.cholesky(moments.hessian(0.01))


def test_loss_is_the_mean_square_of_the_change_of_the_outputs() -> None:
    weight, _ = problem(3, 6)
    inputs = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    outputs = inputs @ (weight - weight.round()).T
    assert loss(weight, weight.round(), inputs.T @ inputs / 50) == pytest.approx(
        float(outputs.square().sum(1).mean()), rel=1e-4
    )


def reference(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, scales: torch.Tensor) -> torch.Tensor:
    """Optimal brain quantization in order of columns: the inverse of what remains is computed anew for each."""
    work, hessian = weight.double().clone(), hessian.double()
    for column in range(work.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        scale = scales[:, column // grid.group].double()
        distance = (work[:, column, None] - scale[:, None] * grid.levels.double()).abs()
        value = scale * grid.levels.double()[distance.argmin(1)]
        error = (work[:, column] - value) / inverse[0, 0]
        work[:, column] = value
        work[:, column + 1 :] -= torch.outer(error, inverse[0, 1:])
    return work


@pytest.mark.parametrize("group", [4, 12])
def test_compensated_rounding_is_that_of_the_slow_reference(group: int) -> None:
    weight, hessian = problem(5, 12)
    found = compensated(weight, hessian, Grid(INTEGERS, group))
    expected = reference(weight, hessian, found.grid, found.scales)
    torch.testing.assert_close(found.values().double(), expected)


def test_compensated_rounding_loses_less_than_nearest_and_scales_that_are_searched_less_than_whole_ranges() -> None:
    weight, hessian = problem(16, 32)
    grid = Grid(INTEGERS, 8)
    scales = weight.view(16, 4, 8).abs().amax(2) / 4
    whole = compensated(weight, hessian, grid, search=False)
    searched = compensated(weight, hessian, grid)
    losses = [loss(weight, found.values(), hessian) for found in (searched, whole, nearest(weight, grid, scales))]
    assert losses == sorted(losses) and losses[0] < 0.8 * losses[2]


def test_descent_never_raises_the_loss_and_ends_where_no_code_alone_can_be_better() -> None:
    weight, hessian = problem(4, 16)
    grid = Grid(INTEGERS, 8)
    found = compensated(weight, hessian, grid)
    losses = [loss(weight, found.values(), hessian)]
    for _ in range(12):
        found = descended(weight, hessian, found, sweeps=1)
        losses.append(loss(weight, found.values(), hessian))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    for row, column in itertools.product(range(4), range(16)):
        for code in range(len(INTEGERS)):
            codes = found.codes.clone()
            codes[row, column] = code
            other = Rounded(grid, codes, found.scales, found.zeros)
            assert loss(weight, other.values(), hessian) >= losses[-1] * (1 - 1e-5)


def test_descent_comes_near_the_best_of_all_codes() -> None:
    levels = torch.tensor([-1.0, 0.0, 1.0])
    gaps, left = 0.0, 0.0
    for seed in range(20):
        weight, hessian = problem(1, 6, seed)
        # The scale is kept, so that the best codes can be found by trying all of them.
        grid = Grid(levels, 6, holdable=lambda scales, group: torch.full_like(scales, 1.2))
        every = torch.tensor(list(itertools.product(range(3), repeat=6)))
        change = weight - 1.2 * levels[every]
        best = float(((change @ hessian) * change).sum(1).min())
        found = descended(weight, hessian, compensated(weight, hessian, grid))
        reached = loss(weight, found.values(), hessian)
        assert reached >= best * (1 - 1e-4)
        left += reached - best
        gaps += loss(weight, nearest(weight, grid, torch.full((1, 1), 1.2)).values(), hessian) - best
    assert left < gaps / 3


def test_searched_scales_are_the_best_of_those_that_can_be_held() -> None:
    weight, _ = problem(7, 8)
    importance = torch.rand(8, generator=torch.Generator().manual_seed(3))
    grid = Grid(INTEGERS, 8, holdable=lambda scales, group: (scales * 10).round().clamp_min(1) / 10)
    scales, zeros = search_scales(weight, importance, grid, 0)

    def lost(scale: float, row: torch.Tensor) -> float:
        values = scale * INTEGERS[(row[:, None] - scale * INTEGERS).abs().argmin(1)]
        return float(((row - values).square() * importance).sum())

    assert not zeros.any()
    for row, scale in zip(weight, scales, strict=True):
        widest = float(row.abs().max()) / 4
        held = [tenths / 10 for tenths in range(1, 30) if 0.55 * widest <= tenths / 10 <= 1.06 * widest]
        assert lost(float(scale), row) <= min(lost(tried, row) for tried in held) * (1 + 1e-5)


def test_a_grid_with_zeros_holds_a_range_that_is_not_symmetric() -> None:
    weight, hessian = problem(4, 16)
    grid = Grid(torch.arange(-8.0, 8.0), 8, symmetric=False)
    found = compensated(weight + 5, hessian, grid)
    assert (found.values() - weight - 5).abs().max() < 1 and (found.zeros > 3).all()


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        compensated(torch.ones(2, 4), torch.zeros(4, 4), Grid(INTEGERS, 4))


def test_moments_count_tokens_by_their_weights() -> None:
    tokens = torch.randn(30, 4, generator=torch.Generator().manual_seed(5))
    counts = torch.randint(1, 5, (30,), generator=torch.Generator().manual_seed(6))
    weighted, repeated = Moments(4), Moments(4)
    weighted.add(tokens.view(2, 15, 4), counts.float())
    repeated.add(tokens.repeat_interleave(counts, 0))
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(weighted.hessian(0.01), repeated.hessian(0.01))
