"""How often are the claims of vitopt wrong? Each interval and each decision against a truth that is known.

    python scripts/claims_coverage.py [--runs 2000] [--only NAME] [--seed 0]

Every row simulates what vitopt would measure and hands it to the functions that vitopt itself uses. An interval is
wrong where it misses the truth, a decision where it says "shown" of what is not so. Prints a table in Markdown; takes
a few minutes on one core.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from vitopt.environment import libraries

libraries.quiet_libraries()

from vitopt.adaptive.thresholds import candidates, for_loss
from vitopt.measure.bootstrap import positive_mean_interval
from vitopt.measure.claims import at_least
from vitopt.measure.clusters import proportion_interval
from vitopt.measure.intervals import (
    Interval,
    paired_delta_interval,
    ratio_interval,
    wilson_interval,
)
from vitopt.measure.latency_statistics import quantile_interval, speedup_interval
from vitopt.measure.paired import holm, mcnemar_exact_p, paired_counts
from vitopt.measure.predictions import Predictions
from vitopt.recipe import CHOOSING
from vitopt.search.confirmation import loss, loss_with_share
from vitopt.search.goal import Goal
from vitopt.search.results import Loss, SearchResult, UnitScores
from vitopt.search.skiplist import search_skip_list


@dataclass(frozen=True)
class Claim:
    """One row: what is claimed, in which case, and one simulated run, which says whether the claim was wrong."""

    words: str
    case: str
    allowed_percent: float
    wrong: Callable[[Generator], bool]


def misses(interval: Interval, truth: float) -> bool:
    """Whether the truth is outside."""
    return not interval.low <= truth <= interval.high


# Intervals


def wilson(rng: Generator, *, share: float, images: int) -> bool:
    """Accuracy on images that are right with probability `share`."""
    return misses(wilson_interval(int(rng.binomial(images, share)), images), share)


def tango(rng: Generator, *, lost: float, gained: float, images: int) -> bool:
    """Two models that differ: `lost` of the images only the first has right, `gained` only the second."""
    kinds = rng.choice(4, images, p=[0.8 - lost, lost, gained, 0.2 - gained])
    counts = paired_counts((kinds == 0) | (kinds == 1), (kinds == 0) | (kinds == 2))
    interval = paired_delta_interval(*counts)
    return misses(interval, gained - lost)


def speedup(rng: Generator, *, rounds: int) -> bool:
    """Ten calls a round of two models, 1.3 apart, on a machine that drifts and at times stalls."""
    drift = np.exp(np.cumsum(rng.normal(0, 0.02, rounds)))[:, None]

    def samples(milliseconds: float) -> list[np.ndarray]:
        own = np.exp(rng.normal(0, 0.02, (rounds, 1)) + rng.normal(0, 0.03, (rounds, 10)))
        stalls = 1 + 0.5 * (rng.random((rounds, 10)) < 0.03)
        return list(milliseconds * drift * own * stalls)

    interval = speedup_interval(samples(13.0), samples(10.0)).interval
    return interval is None or misses(interval, 1.3)


def quantile(rng: Generator, *, q: float, calls: int) -> bool:
    """Calls of which one in twenty stalls for a time without bound (Pareto): the true quantile over the upper limit."""
    samples = 10 * rng.lognormal(0, 0.05, calls) * (1 + (rng.random(calls) < 0.05) * rng.pareto(1.5, calls))
    limit = quantile_interval(samples, q)[1]
    return limit is not None and true_quantile(q) > limit


@functools.cache
def true_quantile(q: float) -> float:
    rng = np.random.default_rng(1)
    calls = 4_000_000
    return float(
        np.quantile(10 * rng.lognormal(0, 0.05, calls) * (1 + (rng.random(calls) < 0.05) * rng.pareto(1.5, calls)), q)
    )


def mean_kl(rng: Generator, *, images: int, spread: float) -> bool:
    """Divergences that are lognormal: the true mean over the upper limit."""
    interval = positive_mean_interval(rng.lognormal(0, spread, images), seed=int(rng.integers(2**31)))
    return interval is not None and math.exp(spread**2 / 2) > interval.high


def clustered(rng: Generator, *, groups: int, size: int) -> bool:
    """Accuracy on videos whose frames are alike: each has a rate of its own, 0.8 in the mean."""
    rates = rng.beta(0.8 * 3, 0.2 * 3, groups)
    right = (rng.random((groups, size)) < rates[:, None]).ravel()
    names = [str(group) for group in range(groups) for _ in range(size)]
    return misses(proportion_interval(right, names), 0.8)


# Decisions


def margin(rng: Generator, *, images: int) -> bool:
    """The gate at a true loss of just the margin, 1 point: whether it calls it shown."""
    kinds = rng.choice(4, images, p=[0.77, 0.03, 0.02, 0.18])
    counts = paired_counts((kinds == 0) | (kinds == 1), (kinds == 0) | (kinds == 2))
    interval = paired_delta_interval(*counts)
    return at_least(interval, -0.01) == "shown"


def agreement(rng: Generator, *, share: float, images: int) -> bool:
    """The gate at an agreement that is just what is asked: whether it calls it shown."""
    return at_least(wilson_interval(int(rng.binomial(images, share)), images), share) == "shown"


def any_change(rng: Generator, *, variants: int, images: int) -> bool:
    """Variants that are all as good as the baseline: whether any is said to lose or gain."""
    found = []
    for _ in range(variants):
        kinds = rng.choice(4, images, p=[0.86, 0.03, 0.03, 0.08])
        lost, gained = int((kinds == 1).sum()), int((kinds == 2).sum())
        interval = paired_delta_interval(int((kinds == 0).sum()), lost, gained, int((kinds == 3).sum()))
        found.append((misses(interval, 0), mcnemar_exact_p(lost, gained)))
    return any(out and p < 0.05 for (out, _), p in zip(found, holm([p for _, p in found]), strict=True))


def kl_share(rng: Generator, *, images: int, spread: float) -> bool:
    """Two divergences per image, lognormal and alike, whose means are as 1 to 2."""
    common, first, second = rng.standard_normal((3, images))
    divergences = (np.exp(spread * (0.9 * common + math.sqrt(0.19) * one)) for one in (first, second))
    return misses(ratio_interval(next(divergences), 2 * next(divergences)), 0.5)


# The search for a skip list. A model of two classes: an image's exact logits are `margin` apart, and each quantized
# unit adds an error of its own to that.

UNITS = 12
MARGIN_MEAN, MARGIN_SPREAD = 2.2, 2.5  # 81 % are right
BIAS = 0.4  # by so much of the variance of the errors do they pull towards the other class
DAMAGES = {
    "flat": np.ones(UNITS),
    "steep": 0.6 ** np.arange(UNITS),
    "tied": np.repeat([8.0, 1.0], UNITS // 2),
}
TRUTH_IMAGES = 400_000  # of which the true figures are counted
VARIANCE = 0.5  # of all units' errors together: 9 % of the images change sides, and 1.4 points are lost


class Population:
    """Images, and what quantizing some units does to them."""

    def __init__(self, rng: Generator, variances: np.ndarray, images: int):
        self.margins = rng.normal(MARGIN_MEAN, MARGIN_SPREAD, images)
        self.errors = rng.standard_normal((len(variances), images)) * np.sqrt(variances)[:, None]
        self.errors -= BIAS * variances[:, None] * np.sign(self.margins)
        self.ids = tuple(map(str, range(images)))
        self.exact = self.predictions(range(len(variances)))
        self.quantized = self.predictions([])

    def predictions(self, kept: Iterable[int]) -> Predictions:
        """Of the model with `kept` in 16 bit."""
        quantized = sorted(set(range(len(self.errors))) - set(kept))
        margins = self.margins + self.errors[quantized].sum(axis=0)
        logits = np.stack([margins / 2, -margins / 2], axis=1)
        return Predictions(self.ids, self.ids, np.zeros(len(margins), np.int64), logits)

    def loss(self, goal: Goal, kept: Iterable[int]) -> Loss:
        """As vitopt measures it for this goal."""
        changed = self.predictions(kept)
        if goal.max_kl_share is None:
            return loss(self.exact, self.exact, changed)
        return loss_with_share(self.exact, self.quantized, changed)


def search(rng: Generator, damage: str, goal: Goal, images: int) -> tuple[SearchResult, float]:
    """A search with vitopt's own functions; the result, and the variance of the errors that the chosen list leaves."""
    variances = VARIANCE * DAMAGES[damage] / DAMAGES[damage].sum()
    choosing = Population(rng, variances, images // CHOOSING)
    confirming = Population(rng, variances, images - images // CHOOSING)
    units = [
        UnitScores(
            unit=str(unit),
            damage=loss(choosing.exact, choosing.exact, choosing.predictions(set(range(UNITS)) - {unit})),
            recovery=loss(choosing.exact, choosing.quantized, choosing.predictions({unit})),
            extra_bytes=1 + unit % 3,
            extra_ms=None,
        )
        for unit in range(UNITS)
    ]
    result = search_skip_list(
        units,
        lambda names: choosing.loss(goal, map(int, names)),
        lambda names: confirming.loss(goal, map(int, names)),
        goal,
        quantized=choosing.loss(goal, []),
        images=len(choosing.ids),
        confirming_images=len(confirming.ids),
    )
    return result, VARIANCE - sum(variances[int(unit)] for unit in result.chosen)


@functools.cache
def truth() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Variances of errors, and the points of top-1 and the KL that they cost over very many images."""
    variances = np.linspace(0, VARIANCE, 26)
    everyone = Population(np.random.default_rng(1), np.full(25, VARIANCE / 25), TRUTH_IMAGES)
    losses = [everyone.loss(Goal(max_top1_drop=1), range(25 - quantized)) for quantized in range(26)]
    drops, kls = [-one.top1_delta_points for one in losses], [one.kl for one in losses]
    return variances, np.array(drops), np.array(kls)


def true_drop(variance: float) -> float:
    """Points of top-1 that errors of this variance cost: a smooth curve, whose noise a parabola takes out."""
    variances, drops, _ = truth()
    return float(np.polyval(np.polyfit(variances, drops, 3), variance))


# Floors as shares of what quantizing all units loses, and calibration images: from strict with many to lax with few.
FLOORS = ((0.4, 4096), (0.7, 2048), (0.97, 2048), (0.97, 400))


def floor_wrong(rng: Generator, *, damage: str) -> bool:
    """Whether a floor is called shown where the chosen list is in truth below it."""
    share, images = FLOORS[rng.integers(len(FLOORS))]
    floor = share * true_drop(VARIANCE)
    result, left = search(rng, damage, Goal(max_top1_drop=floor), images)
    return result.decision == "shown" and true_drop(left) > floor


def kl_goal_wrong(rng: Generator, *, share: float, images: int) -> bool:
    """Whether a share of KL is called shown where the chosen list leaves more."""
    damage = list(DAMAGES)[rng.integers(len(DAMAGES))]
    result, left = search(rng, damage, Goal(max_kl_share=share), images)
    variances, _, kls = truth()
    return result.decision == "shown" and float(np.interp(left, variances, kls)) > share * kls[-1]


# The threshold of an adaptive model: images that score uniformly, and are lost the more often the lower they score.

LOST = 0.08  # of images that the first pass is least sure of


def promise(rng: Generator, *, limit: float, images: int) -> bool:
    """Whether the chosen threshold loses more than what is promised: the integral of LOST (1 - score)^2 above it."""
    choosing, fitting = rng.random(images // CHOOSING), rng.random(images - images // CHOOSING)
    lost = rng.random(len(fitting)) < LOST * (1 - fitting) ** 2
    threshold = for_loss(candidates(choosing), fitting, lost, limit, 0.95).threshold
    return threshold is not None and LOST * (1 - threshold) ** 3 / 3 > limit


CLAIMS: dict[str, Claim] = {
    "wilson": Claim("top-1 (Wilson)", "90 % of 400 images", 5, functools.partial(wilson, share=0.9, images=400)),
    "wilson-high": Claim("agreement (Wilson)", "98.5 % of 400", 5, functools.partial(wilson, share=0.985, images=400)),
    "tango": Claim(
        "change of top-1 (Tango)",
        "−1 point, 400 images",
        5,
        functools.partial(tango, lost=0.03, gained=0.02, images=400),
    ),
    "tango-few": Claim(
        "change of top-1 (Tango)",
        "no change, 100 images",
        5,
        functools.partial(tango, lost=0.02, gained=0.02, images=100),
    ),
    "speedup": Claim("speed-up (t on logs)", "10 rounds, drift, stalls", 5, functools.partial(speedup, rounds=10)),
    "p95": Claim("p95 under its upper limit", "100 calls, stalls", 2.5, functools.partial(quantile, q=0.95, calls=100)),
    "p99": Claim("p99 under its upper limit", "400 calls, stalls", 2.5, functools.partial(quantile, q=0.99, calls=400)),
    "kl": Claim(
        "mean KL under its upper limit (bootstrap)",
        "400 images, log spread 1",
        2.5,
        functools.partial(mean_kl, images=400, spread=1.0),
    ),
    "kl-wild": Claim(
        "mean KL under its upper limit (bootstrap)",
        "400 images, log spread 2",
        2.5,
        functools.partial(mean_kl, images=400, spread=2.0),
    ),
    "clustered": Claim(
        "top-1 with groups (effective share)",
        "40 videos of 10 frames",
        5,
        functools.partial(clustered, groups=40, size=10),
    ),
    "margin": Claim(
        "a loss of 1 point called within 1 point", "1,000 images", 5, functools.partial(margin, images=1000)
    ),
    "shown-agreement": Claim(
        "an agreement of 98.5 % called at least 98.5 %",
        "400 images",
        5,
        functools.partial(agreement, share=0.985, images=400),
    ),
    "holm": Claim(
        "a change that is none called shown (Holm)",
        "5 variants, 400 images",
        5,
        functools.partial(any_change, variants=5, images=400),
    ),
    "kl-share": Claim("share of KL (bootstrap)", "400 images", 5, functools.partial(kl_share, images=400, spread=1.0)),
    "kl-share-wild": Claim(
        "share of KL (bootstrap)", "100 images, heavy tail", 5, functools.partial(kl_share, images=100, spread=1.5)
    ),
}
CLAIMS |= {
    f"floor-{damage}": Claim(
        "floor of a skip list, called shown",
        f"{damage} damage, floors of 0.4 to 0.97 of the loss",
        5,
        functools.partial(floor_wrong, damage=damage),
    )
    for damage in DAMAGES
}
CLAIMS["kl-goal"] = Claim(
    "share of KL of a skip list, called shown",
    "all three damages, half of the KL, 200 images",
    5,
    functools.partial(kl_goal_wrong, share=0.5, images=200),
)


CLAIMS |= {
    f"promise-{limit}-{images}": Claim(
        "loss promised of an adaptive model's threshold",
        f"{100 * limit:g} points, {images:,} calibration images",
        5,
        functools.partial(promise, limit=limit, images=images),
    )
    for limit, images in ((0.005, 1024), (0.01, 1024), (0.01, 4096))
}


def simulate(claim: Claim, runs: int, seed: int) -> tuple[int, Interval]:
    """How many of the runs were wrong, and the interval of that share."""
    rng = np.random.default_rng(seed)
    wrong = sum(claim.wrong(rng) for _ in range(runs))
    return wrong, wilson_interval(wrong, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000, help="simulated runs per row")
    parser.add_argument("--only", default="", help="only the rows whose name begins so")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| claim | case | wrong in | 95 % interval | meant |")
    print("|---|---|---:|---:|---:|")
    for name, claim in CLAIMS.items():
        if name.startswith(arguments.only):
            wrong, interval = simulate(claim, arguments.runs, arguments.seed)
            share = f"{100 * wrong / arguments.runs:.1f} % of {arguments.runs:,}"
            ends = f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"
            print(f"| {claim.words} | {claim.case} | {share} | {ends} | ≤ {claim.allowed_percent:g} % |", flush=True)


if __name__ == "__main__":
    main()
