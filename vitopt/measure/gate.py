"""The gate: what is required of a variant, decided by the 95 % intervals of its record.

A requirement is shown where the whole interval is on the right side of its limit (non-inferiority with a margin),
failed where the whole interval is on the wrong side, else undecided; then it is said how many images or calls would
likely decide it, if the rates stay as they were measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitopt.measure import power
from vitopt.measure.claims import Decision, at_least, at_most, together
from vitopt.measure.comparison import speed_ratio
from vitopt.measure.intervals import Interval
from vitopt.measure.latency_statistics import calls_needed
from vitopt.recipe import AutoSkipSpec, RequireSpec
from vitopt.records import Record, Requirement


@dataclass(frozen=True)
class Evidence:
    """What a record says about one requirement."""

    measured: float | None = None
    interval: Interval | None = None
    needed: float = math.inf  # images or calls that would likely decide it
    have: int = 0
    unit: str = "images"
    supposing: str = ""  # what `needed` takes to be true, if not what was measured
    missing: str | None = None  # why there is no interval
    batch_size: int | None = None


def judge(require: RequireSpec, record: Record, baseline: Record) -> tuple[Requirement, ...]:
    """Every requirement of `require` on the variant of `record`, in the order of its fields."""
    return tuple(
        _judged(key, limit, _evidence(key, limit, record, baseline, require.batch_size))
        for key, limit in require.limits.items()
    )


def judge_floor(auto: AutoSkipSpec, record: Record, baseline: Record) -> tuple[Requirement, ...]:
    """The floors of `skip: auto`, which was chosen on calibration images, on the tested ones."""
    requirements = []
    for key, limit in (("max_top1_drop", auto.max_top1_drop), ("max_kl", auto.max_kl)):
        if limit is not None:
            requirements.append(_judged(f"auto.{key}", limit, _evidence(key, limit, record, baseline, None)))
    if auto.max_kl_share is not None:
        missing = Evidence(missing="a share of KL is measured on the calibration images alone")
        requirements.append(_judged("auto.max_kl_share", auto.max_kl_share, missing))
    return tuple(requirements)


def overall(requirements: Sequence[Requirement]) -> Decision:
    """Failed where any is, else undecided where any is, else shown."""
    return together(requirement.decision for requirement in requirements)


def _judged(key: str, limit: float, evidence: Evidence) -> Requirement:
    interval = evidence.interval
    decision: Decision = "undecided"
    if interval is not None:
        decision = (at_least if key.startswith("min_") else at_most)(interval, limit)
    return Requirement(
        name=key,
        limit=limit,
        measured=evidence.measured,
        ci95=None if interval is None else (_finite(interval.low), _finite(interval.high)),
        decision=decision,
        batch_size=evidence.batch_size,
        reason=_what_would_decide(evidence) if decision == "undecided" else None,
        would_decide=round_up(max(evidence.needed, evidence.have + 1))
        if decision == "undecided" and evidence.missing is None and math.isfinite(evidence.needed)
        else None,
    )


def _what_would_decide(evidence: Evidence) -> str:
    if evidence.missing is not None:
        return evidence.missing
    if math.isinf(evidence.needed):
        return f"no number of {evidence.unit} would decide it: the measured value lies on the limit"
    more = max(1, evidence.needed - evidence.have)
    return f"about {round_up(more):,} more {evidence.unit} would likely decide it{evidence.supposing}"


def round_up(count: float) -> int:
    """`count` rounded up to two significant digits: it is an estimate."""
    unit: int = 10 ** max(0, math.ceil(math.log10(count)) - 2)
    return math.ceil(count / unit) * unit


def _evidence(key: str, limit: float, record: Record, baseline: Record, batch_size: int | None) -> Evidence:
    if record.failure is not None:
        return Evidence(missing=f"it could not be measured: {record.failure}")
    if key in ("max_top1_drop", "min_agreement", "max_kl"):
        return _of_answers(key, limit, record)
    if key == "max_megabytes":
        if record.size is None:
            return Evidence(missing="the size of the weights is not known")
        megabytes = record.size.weight_bytes / 1e6
        return Evidence(megabytes, Interval(megabytes, megabytes))
    return (_of_speed if key == "min_speedup" else _of_p99)(limit, record, baseline, batch_size)


def _of_answers(key: str, limit: float, record: Record) -> Evidence:
    versus, accuracy = record.versus_baseline, record.accuracy
    if versus is None or accuracy is None:
        return Evidence(missing="it was not compared with the baseline on images")
    images = accuracy.images
    if key == "max_top1_drop":
        low, high = versus.top1_delta_ci95_points
        lost, gained = versus.right_to_wrong / images, versus.wrong_to_right / images
        needed, supposing = power.images_to_bound_loss(limit / 100, lost, gained), ""
        if math.isinf(needed):  # the estimate lies on the limit
            needed = power.images_to_bound_loss(limit / 100, (lost + gained) / 2, (lost + gained) / 2)
            supposing = " if nothing is truly lost"
        loss = 0.0 - versus.top1_delta_points
        return Evidence(loss, Interval(-high, -low), needed, images, supposing=supposing)
    if key == "min_agreement":
        if versus.agreement_ci95_percent is None:
            return Evidence(versus.agreement_percent, missing="the record has no interval: evaluate again")
        needed = power.trials_to_bound_share(limit / 100, versus.agreement_percent / 100)
        return Evidence(versus.agreement_percent, Interval(*versus.agreement_ci95_percent), needed, images)
    kl = versus.mean_kl_divergence
    if versus.kl_ci95 is None:
        return Evidence(kl, missing=f"no interval of KL from {images} images: evaluate again, on 30 or more")
    interval = Interval(*versus.kl_ci95)
    return Evidence(kl, interval, images * _growth(kl, interval, limit), images)


def _of_speed(limit: float, record: Record, baseline: Record, batch_size: int | None) -> Evidence:
    latency = record.latency_at(batch_size)
    speed = speed_ratio(baseline, record, latency.batch_size) if latency else None
    if latency is None or speed is None:
        return Evidence(missing=_not_timed(batch_size), batch_size=batch_size)
    at = latency.batch_size
    if speed.interval is None:
        reason = f"{speed.caution}; time both in one `vitopt run` or `vitopt benchmark`"
        return Evidence(speed.ratio, missing=reason, batch_size=at)
    logs = Interval(math.log(speed.interval.low), math.log(speed.interval.high))
    needed = latency.iterations * _growth(math.log(speed.ratio), logs, math.log(limit))
    return Evidence(speed.ratio, speed.interval, needed, latency.iterations, "calls", batch_size=at)


def _of_p99(limit: float, record: Record, baseline: Record, batch_size: int | None) -> Evidence:
    latency = record.latency_at(batch_size)
    if latency is None:
        return Evidence(missing=_not_timed(batch_size), batch_size=batch_size)
    at = latency.batch_size
    low, high = latency.p99_ci95_ms or (None, None)
    if low is None and high is None:
        reason = f"an upper limit of p99 needs {calls_needed(0.99)} calls, not {latency.iterations}"
        return Evidence(latency.p99_ms, missing=reason, batch_size=at)
    interval = Interval(0.0 if low is None else low, math.inf if high is None else high)
    over = sum(sample > limit for sample in latency.samples_ms) / latency.iterations
    needed = power.calls_to_bound_p99(over)
    return Evidence(latency.p99_ms, interval, needed, latency.iterations, "calls", batch_size=at)


def _growth(estimate: float, interval: Interval, limit: float) -> float:
    reach = interval.high - estimate if limit > estimate else estimate - interval.low
    return power.growth_to_decide(abs(limit - estimate), reach)


def _not_timed(batch_size: int | None) -> str:
    return "not timed at a batch size of both" if batch_size is None else f"not timed at batch {batch_size}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
