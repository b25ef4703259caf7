"""How many images or calls a claim needs before its 95 % interval is likely to show it.

All sizes are for the intervals that the gate decides by, so a plan and a gate agree. Shares are proportions from
0 to 1. Sizes are floats, math.inf where no number would do: the truth lies on the limit.
"""

import math
from statistics import NormalDist

from vitopt.measure.intervals import paired_score_variance
from vitopt.measure.latency_statistics import calls_needed

POWER = 0.8
_Z = NormalDist().inv_cdf(0.975)


def images_to_bound_loss(margin: float, only_baseline: float, only_variant: float, power: float = POWER) -> float:
    """Images until Tango's interval decides whether accuracy falls by at most `margin`, with the given power.

    The shares are of images on which one of the two is right alone. With both at 0 it is the least number there is.
    Raises ValueError for a share or power out of range.
    Source: Nam 1997, "Establishing equivalence of two treatments and sample size requirements in matched-pairs
    design".
    """
    for share in (margin, only_baseline, only_variant, only_baseline + only_variant):
        _check_share(share)
    change = only_variant - only_baseline
    truth = max(0.0, only_baseline + only_variant - change**2)
    return _size(change + margin, paired_score_variance(only_baseline, only_variant, -margin), truth, power)


def trials_to_bound_share(limit: float, truth: float, power: float = POWER) -> float:
    """Trials until Wilson's interval of a share lies on one side of `limit`, where the share is `truth`.

    Raises ValueError for a share or power out of range.
    Source: Fleiss, Levin and Paik 2003, "Statistical methods for rates and proportions", section 2.5.
    """
    _check_share(limit)
    _check_share(truth)
    return _size(truth - limit, limit * (1 - limit), truth * (1 - truth), power)


def calls_to_bound_p99(share_over: float, power: float = POWER) -> float:
    """Calls until the interval of p99 lies on one side of a limit that `share_over` of all calls exceed.

    It is never less than `calls_needed`, and just that where no call exceeds it.
    """
    fewest = calls_needed(0.99)
    return max(trials_to_bound_share(0.01, share_over, power), fewest) if share_over > 0 else fewest


def growth_to_decide(distance: float, reach: float, power: float = POWER) -> float:
    """How many times the sample must grow so that an interval which reaches `reach` from its estimate stays within
    `distance` with the given power; an interval shrinks with the square root of the sample."""
    if distance == 0:
        return math.inf
    return (reach / distance * (1 + _power_quantile(power) / _Z)) ** 2


def smallest_visible_loss(images: int, discordant_rate: float, power: float = POWER) -> float:
    """Smallest true loss of accuracy, in points, that `images` images show with the given power.

    To show it is to have a `paired_delta_interval` without zero. `discordant_rate` is the share of images on which
    one model is right and the other is wrong; where it is below the loss itself, the loss stands in for it; there
    the normal approximation errs towards too large a loss (seen 95 times in 100 rather than 80). The answer is
    math.inf where no loss would be seen (under 4 images).
    Raises ValueError for no image, or for a rate or power out of range.
    Source: Connor 1987, "Sample size for testing differences in proportions for the paired-sample design".
    """
    if images < 1:
        raise ValueError(f"a visible loss needs at least one image, got {images}")
    _check_share(discordant_rate)
    z_power = _power_quantile(power)
    if images < _Z**2:
        return math.inf
    # Connor's formula solved for loss / sqrt(discordant rate); where every discordant image is a
    # lost one, that is sqrt(loss).
    scaled = (math.sqrt(images) * _Z + z_power * math.sqrt(images + z_power**2 - _Z**2)) / (images + z_power**2)
    return 100 * scaled * max(math.sqrt(discordant_rate), scaled)


def _size(distance: float, variance_at_limit: float, variance: float, power: float) -> float:
    """Observations until a score interval excludes a limit at `distance` from the truth."""
    if abs(distance) < 1e-12:  # a difference of shares is rounded
        return math.inf
    return ((_Z * math.sqrt(variance_at_limit) + _power_quantile(power) * math.sqrt(variance)) / distance) ** 2


def _power_quantile(power: float) -> float:
    if not 0.5 <= power < 1:
        raise ValueError(f"the power must be at least 0.5 and below 1, got {power}")
    return NormalDist().inv_cdf(power)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"a share must lie between 0 and 1, got {share}")
