"""Plain words for a comparison of a variant with its baseline."""

import math

from vitopt.records import VersusBaseline

SIGNIFICANCE = 0.05


def accuracy_verdict(images: int, delta_points: float, low: float, high: float, p: float) -> str:
    """Say whether accuracy changed, from the change (variant minus baseline) and its 95 % interval, all in points.

    A change is shown where the interval excludes zero and `p`, McNemar's exact p adjusted by Holm's method where
    several variants were compared, is below 0.05: with few changed images, or several variants, the interval of one
    alone excludes zero too often. Else the words give the largest loss within the interval.
    Raises ValueError for no image, or a change outside its interval.
    """
    if images < 1:
        raise ValueError(f"a verdict needs at least one image, got {images}")
    _check_inside(delta_points, low, high)
    # A tenth of a point is less than one image until there are about 10,000.
    decimals = 1 if images < 10_000 else 2
    if _is_shown(low, high, p):
        verb = "loses" if high < 0 else "gains"
        near, estimate, far = (_figure(delta, decimals) for delta in sorted(map(abs, (low, delta_points, high))))
        return f"{verb} {estimate} points ({near} to {far})"
    why = f" (p = {p:.2g})" if not low <= 0 <= high else ""
    if low >= 0:
        return f"neither loss nor gain shown{why} (n = {images:,})"
    return f"no loss shown{why}; a loss of up to {_figure(-low, decimals)} points is not excluded (n = {images:,})"


def loses(versus: VersusBaseline) -> bool:
    """Whether a loss of accuracy is shown, by the rule of `accuracy_verdict`."""
    p = versus.mcnemar_p if versus.mcnemar_holm_p is None else versus.mcnemar_holm_p
    return versus.top1_delta_points < 0 and _is_shown(*versus.top1_delta_ci95_points, p)


def _is_shown(low: float, high: float, p: float) -> bool:
    return not low <= 0 <= high and p < SIGNIFICANCE


def speed_verdict(speedup: float, low: float | None, high: float | None) -> str:
    """Say whether the variant is faster, from its speed-up and the 95 % interval, or None and None.

    Raises ValueError for a speed-up that is not positive, one limit without the other, or a
    speed-up outside its interval.
    """
    if not 0 < speedup < math.inf:
        raise ValueError(f"a speed-up must be positive and finite, got {speedup}")
    if low is None and high is None:
        within, different = "too few rounds for an interval", speedup != 1
    elif low is None or high is None:
        raise ValueError("an interval needs both limits, got one")
    else:
        _check_inside(speedup, low, high)
        within = f"{_figure(low, 2, origin=1)} to {_figure(high, 2, origin=1)}"
        different = not low <= 1 <= high
    if not different:
        return f"no measurable difference in speed ({within})"
    ratio = _figure(speedup, 2, origin=1)
    return f"{ratio}x faster ({within})" if speedup > 1 else f"{ratio}x: slower ({within})"


def _figure(value: float, decimals: int, origin: float = 0.0) -> str:
    """The value with at least `decimals` decimals, and up to four to tell it from `origin`."""
    text = f"{value:.{decimals}f}"
    if value != origin and decimals < 4 and float(text) == origin:
        return _figure(value, decimals + 1, origin)
    return text


def _check_inside(estimate: float, low: float, high: float) -> None:
    # The slack is for the rounding of a change that equals a limit, such as 100 points.
    if not low - 1e-9 <= estimate <= high + 1e-9:
        raise ValueError(f"the estimate {estimate} lies outside its interval, {low} to {high}")
