"""The interval of a ratio of means, against scipy's bootstrap."""

import numpy as np
import pytest
from scipy import stats

from vitopt.measure.ratio import ratio_interval


def test_limits_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    both = np.exp(rng.multivariate_normal([0, 1], [[1, 0.8], [0.8, 1]], 300))
    found = ratio_interval(both[:, 0], both[:, 1])
    expected = stats.bootstrap(
        (both[:, 0], both[:, 1]),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=0.02)


def test_it_is_always_the_same_and_exact_where_images_agree() -> None:
    values = np.arange(1.0, 50.0)
    assert ratio_interval(values, values[::-1]) == ratio_interval(values, values[::-1])
    half = ratio_interval(values / 2, values)
    assert (half.low, half.high) == pytest.approx((0.5, 0.5))


def test_many_images_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitopt.measure import ratio

    rng = np.random.default_rng(2)
    values = rng.exponential(size=(2, 100))
    whole = ratio_interval(*values)
    monkeypatch.setattr(ratio, "_AT_ONCE", 1700)
    parts = ratio_interval(*values)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=0.05)


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [0.0]), ([1.0, 2.0], [1.0]), ([-1.0], [1.0])])
def test_what_has_no_ratio_is_refused(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError):
        ratio_interval(above, below)
