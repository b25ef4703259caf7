"""Statistics of latency, as pure functions of samples in ms: percentiles, their limits, and speed-ups."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from vitopt.measure.intervals import Interval, check_confidence

Limits = tuple[float | None, float | None]  # None: so few samples cannot give this limit
FOR_P99 = 100  # samples; of fewer it is little but the maximum


@dataclass(frozen=True)
class LatencySummary:
    """Latency over `count` samples, in ms; a percentile too few samples can show is None."""

    count: int
    mean_ms: float
    std_ms: float
    min_ms: float
    p50_ms: float
    p95_ms: float | None
    p99_ms: float | None
    p50_ci95_ms: Limits
    p95_ci95_ms: Limits
    p99_ci95_ms: Limits


@dataclass(frozen=True)
class Speedup:
    """How many times faster the variant is; `interval` is None under three rounds."""

    ratio: float
    interval: Interval | None


def latency_summary(samples_ms: ArrayLike) -> LatencySummary:
    """Summary of latency samples (samples,) in ms, with percentiles interpolated linearly.

    The standard deviation is that of the samples themselves (divided by their count). p95 needs
    20 samples and p99 needs 100; under that they are None, being little but the maximum.
    Raises ValueError for no samples, or for samples that are not positive and finite.
    """
    samples = _latencies(samples_ms)
    return LatencySummary(
        count=len(samples),
        mean_ms=float(np.mean(samples)),
        std_ms=float(np.std(samples)),
        min_ms=float(np.min(samples)),
        p50_ms=float(np.percentile(samples, 50)),
        p95_ms=float(np.percentile(samples, 95)) if len(samples) >= 20 else None,
        p99_ms=float(np.percentile(samples, 99)) if len(samples) >= FOR_P99 else None,
        p50_ci95_ms=quantile_interval(samples, 0.50),
        p95_ci95_ms=quantile_interval(samples, 0.95),
        p99_ci95_ms=quantile_interval(samples, 0.99),
    )


def quantile_interval(samples_ms: ArrayLike, quantile: float, confidence: float = 0.95) -> Limits:
    """Limits of the true quantile (0 to 1): two of the samples, chosen by the binomial distribution.

    Each limit is missed with a probability of at most (1 - confidence) / 2, whatever the samples'
    distribution, provided that they do not depend on each other; spells in which the whole machine is
    slow make the limits too narrow. A limit that so few samples cannot give is None: the upper one of
    p95 takes 72 samples at 95 %, that of p99 takes 368.
    Raises ValueError as `latency_summary`, or for a quantile or confidence out of range.
    Source: David and Nagaraja 2003, "Order Statistics", section 7.1.
    """
    _check_quantile(quantile)
    check_confidence(confidence)
    ordered = np.sort(_latencies(samples_ms))
    # below[k]: the probability that at most k samples lie below the quantile, for k under their count
    below = special.bdtr(np.arange(len(ordered)), len(ordered), quantile)
    tail = (1 - confidence) / 2
    lower = int(np.searchsorted(below, tail, side="right"))
    upper = int(np.searchsorted(below, 1 - tail))
    return (
        float(ordered[lower - 1]) if lower > 0 else None,
        float(ordered[upper]) if upper < len(ordered) else None,
    )


def calls_needed(quantile: float, confidence: float = 0.95) -> int:
    """Samples from which on `quantile_interval` at this confidence has an upper limit, the slowest sample.

    72 for p95 and 368 for p99. A claim about the upper limit alone may take it from the interval at 90 %, which
    is missed upwards in 5 % of cases: 59 and 299. MLPerf's 662 for p99 is one-sided at 99 % confidence, with the
    second slowest as the limit.
    Source: Hahn and Meeker 1991, "Statistical intervals", section 5.2.
    Raises ValueError for a quantile or confidence out of range.
    """
    _check_quantile(quantile)
    check_confidence(confidence)
    # The allowance keeps rounding in the last digits from asking for one sample more.
    return math.ceil(math.log((1 - confidence) / 2) / math.log(quantile) * (1 - 1e-12))


def speedup_interval(
    baseline_rounds: Sequence[ArrayLike], variant_rounds: Sequence[ArrayLike], confidence: float = 0.95
) -> Speedup:
    """Speed-up of the variant: geometric mean over rounds of baseline median / variant median.

    Each argument holds one array of latency samples in ms per round. Both models of a round are
    measured back to back, so a machine that drifts slows both alike and the ratio keeps; which of
    the two goes first should alternate from round to round, so that the drift within a round
    cancels too. The interval is Student's t on the logarithms of the rounds' ratios.
    Raises ValueError for no rounds, different numbers of rounds, or samples that are missing, not
    positive or not finite.
    Source: Student 1908, "The probable error of a mean".
    """
    if len(baseline_rounds) != len(variant_rounds):
        raise ValueError(f"both models need the same rounds, got {len(baseline_rounds)} and {len(variant_rounds)}")
    rounds = len(baseline_rounds)
    if rounds == 0:
        raise ValueError("a speed-up needs at least one round, got none")
    log_ratios = [
        math.log(np.median(_latencies(baseline)) / np.median(_latencies(variant)))
        for baseline, variant in zip(baseline_rounds, variant_rounds, strict=True)
    ]
    centre = math.fsum(log_ratios) / rounds
    if rounds < 3:
        return Speedup(math.exp(centre), None)
    variance = math.fsum((ratio - centre) ** 2 for ratio in log_ratios) / (rounds - 1)
    check_confidence(confidence)
    reach = special.stdtrit(rounds - 1, (1 + confidence) / 2) * math.sqrt(variance / rounds)
    return Speedup(math.exp(centre), Interval(math.exp(centre - reach), math.exp(centre + reach)))


def mean_speedup(
    baseline_rounds: Sequence[ArrayLike], variant_rounds: Sequence[ArrayLike], confidence: float = 0.95
) -> Speedup:
    """Speed-up of the variant where calls do not all do the same work: mean of all baseline calls / of all variant's.

    A median would not see the slower calls, and a mean of rounds' ratios is biased where a round holds few of them.
    The interval is Student's t on jackknife pseudo-values of the ratio's logarithm, leaving out a round at a time.
    Arguments and errors as of `speedup_interval`.
    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", chapter 11.
    """
    if len(baseline_rounds) != len(variant_rounds) or not baseline_rounds:
        raise ValueError(f"both models need the same rounds, got {len(baseline_rounds)} and {len(variant_rounds)}")
    rounds = len(baseline_rounds)
    sums, counts = (
        np.array([[measure(_latencies(samples)) for samples in both] for both in (baseline_rounds, variant_rounds)])
        for measure in (np.sum, np.size)
    )

    def log_ratio(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
        before, after = sums.sum(axis=1) / counts.sum(axis=1)
        return math.log(before / after)

    whole = log_ratio(sums, counts)
    if rounds < 3:
        return Speedup(math.exp(whole), None)
    check_confidence(confidence)
    without = (log_ratio(np.delete(sums, i, axis=1), np.delete(counts, i, axis=1)) for i in range(rounds))
    pseudo = np.array([rounds * whole - (rounds - 1) * left for left in without])
    reach = special.stdtrit(rounds - 1, (1 + confidence) / 2) * float(pseudo.std(ddof=1)) / math.sqrt(rounds)
    return Speedup(math.exp(whole), Interval(math.exp(whole - reach), math.exp(whole + reach)))


def _check_quantile(quantile: float) -> None:
    if not 0 < quantile < 1:
        raise ValueError(f"a quantile must lie between 0 and 1, got {quantile}")


def _latencies(samples_ms: ArrayLike) -> NDArray[np.float64]:
    samples = np.asarray(samples_ms, np.float64)
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(f"latency samples must be a flat array and not empty, got shape {samples.shape}")
    if not (np.isfinite(samples) & (samples > 0)).all():
        raise ValueError("latency samples must be positive and finite")
    return samples
