"""Plain words for a comparison of a variant with its baseline."""

import math

from vitopt.measure.statistics import smallest_visible_loss


def accuracy_verdict(
    images: int,
    delta_points: float,
    delta_low: float,
    delta_high: float,
    right_to_wrong: int,
    wrong_to_right: int,
) -> str:
    """Say whether accuracy changed, from the change and its 95 % interval, all in points.

    `delta_points` is variant minus baseline; the last two arguments count the images whose answer
    turned wrong or right. Raises ValueError for no image, impossible counts of images, or a change
    outside its interval.
    """
    if images < 1:
        raise ValueError(f"a verdict needs at least one image, got {images}")
    discordant = right_to_wrong + wrong_to_right
    if min(right_to_wrong, wrong_to_right) < 0 or discordant > images:
        raise ValueError(f"{right_to_wrong} and {wrong_to_right} changed images do not fit in {images}")
    _check_inside(delta_points, delta_low, delta_high)

    # A tenth of a point is less than one image until there are about 10,000.
    decimals = 1 if images < 10_000 else 2
    if discordant == 0:
        everything = "the only image" if images == 1 else f"all {images:,} images"
        return (
            f"identical on {everything}: none turned right or wrong "
            f"(on other images a loss of up to {_figure(abs(delta_low), decimals)} points is possible)"
        )
    if delta_high < 0:
        low, estimate, high = (_figure(-delta, decimals) for delta in (delta_high, delta_points, delta_low))
        return f"loses {estimate} points ({low} to {high})"
    if delta_low > 0:
        low, estimate, high = (_figure(delta, decimals) for delta in (delta_low, delta_points, delta_high))
        return f"gains {estimate} points ({low} to {high})"
    visible = smallest_visible_loss(images, discordant / images)
    if math.isinf(visible):
        return f"no measurable loss (n = {images}: too few images to see any loss)"
    return (
        f"no measurable loss (n = {images:,}: a loss under {_figure(visible, decimals)} points "
        "cannot be seen with these images)"
    )


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
