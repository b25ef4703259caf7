"""Power before work: how many images and calls it takes to show what is required."""

import math
from dataclasses import dataclass

from vitopt.errors import RecordError
from vitopt.measure import power
from vitopt.measure.latency_statistics import calls_needed
from vitopt.recipe import RequireSpec
from vitopt.records import Record, VersusBaseline

DISCORDANT_SHARE = 0.02  # bf16 changes fewer than 1 % of images between right and wrong, 4-bit formats up to 10 %


@dataclass(frozen=True)
class Need:
    """What one requirement takes; None where it cannot be shown, or where only a pilot could tell."""

    requirement: str
    limit: float
    unit: str
    least: int | None  # with which the best of all outcomes shows it
    likely: int | None  # which show it 8 times in 10 under the assumption
    assumption: str


def needs(require: RequireSpec, pilot: Record | None = None) -> list[Need]:
    """What each requirement takes, with the rates of `pilot`, or else with those that are stated.

    Raises:
        RecordError: the pilot was compared with nothing, or failed.
    """
    if pilot is not None and pilot.failure is not None:
        raise RecordError(f"the pilot {pilot.variant.name} failed ({pilot.failure}): it tells nothing")
    return [_need(key, limit, pilot, require.batch_size) for key, limit in require.limits.items()]


def _need(key: str, limit: float, pilot: Record | None, batch_size: int | None) -> Need:
    if key == "max_megabytes":
        return Need(key, limit, "images", 0, 0, "a size is known exactly")
    if key in ("min_speedup", "max_p99_ms"):
        unit = "calls"
        least, likely, assumption = (_speedup if key == "min_speedup" else _p99)(limit, pilot, batch_size)
    else:
        unit = "images"
        of_key = {"max_top1_drop": _top1, "min_agreement": _agreement, "max_kl": _kl}[key]
        least, likely, assumption = of_key(limit, pilot)
    return Need(key, limit, unit, _whole(least), _whole(likely), assumption)


def _whole(count: float | None) -> int | None:
    # The allowance keeps rounding in the last digits from asking for one more.
    return None if count is None or math.isinf(count) else math.ceil(count * (1 - 1e-9))


def _compared(pilot: Record) -> tuple[VersusBaseline, int]:
    if pilot.versus_baseline is None or pilot.accuracy is None:
        raise RecordError(
            f"the pilot {pilot.variant.name} was compared with no baseline on images: evaluate it with --baseline"
        )
    return pilot.versus_baseline, pilot.accuracy.images


_Answer = tuple[float | None, float | None, str]


def _top1(points: float, pilot: Record | None) -> _Answer:
    share, source = DISCORDANT_SHARE, "assumed"
    if pilot is not None:
        versus, images = _compared(pilot)
        share, source = (versus.right_to_wrong + versus.wrong_to_right) / images, "of the pilot"
    least = power.images_to_bound_loss(points / 100, 0, 0)
    likely = power.images_to_bound_loss(points / 100, share / 2, share / 2)
    return least, likely, f"nothing is truly lost, {100 * share:.2g} % of images turn right or wrong ({source})"


def _agreement(percent: float, pilot: Record | None) -> _Answer:
    agreement, source = (100 + percent) / 2, "assumed"
    if pilot is not None:
        agreement, source = _compared(pilot)[0].agreement_percent, "of the pilot"
    least = power.trials_to_bound_share(percent / 100, 1)
    likely = power.trials_to_bound_share(percent / 100, agreement / 100) if agreement > percent else None
    return least, likely, f"{agreement:.4g} % truly agree ({source})"


def _kl(nats: float, pilot: Record | None) -> _Answer:
    if pilot is None:
        return 30, None, "only a pilot tells how far images differ in KL"
    versus, images = _compared(pilot)
    mean = versus.mean_kl_divergence
    if versus.kl_ci95 is None:
        return 30, None, "the pilot has no interval of KL: evaluate it again, on 30 images or more"
    likely = images * power.growth_to_decide(nats - mean, versus.kl_ci95[1] - mean) if mean < nats else None
    return 30, likely, f"the true KL is {mean:.2g} nats (of the pilot)"


def _speedup(limit: float, pilot: Record | None, batch_size: int | None) -> _Answer:
    latency = pilot.latency_at(batch_size) if pilot else None
    if latency is None or latency.speedup_vs_baseline is None or latency.speedup_ci95 is None:
        return 3, None, "only a pilot that was timed with its baseline tells how far rounds differ"
    ratio, low = latency.speedup_vs_baseline, latency.speedup_ci95[0]
    distance, reach = math.log(ratio / limit), math.log(ratio / low)
    likely = latency.iterations * power.growth_to_decide(distance, reach) if distance > 0 else None
    return 3, likely, f"the true speed-up is {ratio:.3g}x (of the pilot)"


def _p99(limit: float, pilot: Record | None, batch_size: int | None) -> _Answer:
    over, source = 0.005, "assumed"
    latency = pilot.latency_at(batch_size) if pilot else None
    if latency is not None:
        over, source = sum(ms > limit for ms in latency.samples_ms) / latency.iterations, "of the pilot"
    likely = power.calls_to_bound_p99(over) if over < 0.01 else None
    return calls_needed(0.99), likely, f"{100 * over:.3g} % of calls truly take longer ({source})"
