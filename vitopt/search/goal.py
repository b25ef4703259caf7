"""What a skip list must reach, how that is decided, and how many images it takes."""

import math
from dataclasses import dataclass

from vitopt.measure.claims import Decision, at_most, together
from vitopt.measure.intervals import Interval
from vitopt.measure.power import growth_to_decide, images_to_bound_loss
from vitopt.recipe import CHOOSING, SKIP_GOALS, AutoSkipSpec
from vitopt.search.results import Loss


@dataclass(frozen=True)
class Goal:
    """A floor of accuracy, a share of the quantized model's KL, a largest KL, or more than one of them.

    `max_top1_drop`: points of top-1 against the 16-bit model. `max_kl_share`: KL divergence at most this share
    of that of the fully quantized model. `max_kl`: nats.
    """

    max_top1_drop: float | None = None
    max_kl_share: float | None = None
    max_kl: float | None = None

    @classmethod
    def of(cls, auto: AutoSkipSpec) -> "Goal":
        """What `skip: auto` asks for."""
        return cls(**{name: getattr(auto, name) for name in SKIP_GOALS})

    def words(self) -> str:
        """The goal as a phrase."""
        parts = []
        if self.max_top1_drop is not None:
            parts.append(f"top-1 drops by at most {self.max_top1_drop:g} points")
        if self.max_kl_share is not None:
            parts.append(f"KL is at most {self.max_kl_share:g} of the quantized model's")
        if self.max_kl is not None:
            parts.append(f"KL is at most {self.max_kl:g} nats")
        return " and ".join(parts)


def decide(goal: Goal, measured: Loss) -> Decision:
    """Whether a loss shows that the goal is met: each part of it must be shown, and one that failed fails it.

    Where several must be shown, each may be tested at the full level (Berger 1982, intersection-union tests).
    """
    decisions: list[Decision] = []
    if goal.max_top1_drop is not None:
        low, high = measured.top1_delta_ci95_points
        decisions.append(at_most(Interval(-high, -low), goal.max_top1_drop))
    if goal.max_kl_share is not None and measured.kl_share_ci95 is not None:
        decisions.append(at_most(Interval(*measured.kl_share_ci95), goal.max_kl_share))
    if goal.max_kl is not None:  # without an interval nothing is shown
        decisions.append("undecided" if measured.kl_ci95 is None else at_most(Interval(*measured.kl_ci95), goal.max_kl))
    return together(decisions)


def likely_shown(images: int, max_drop: float, drop: float, changed: float) -> bool:
    """Whether so many confirming images show a floor, four times in five, for a list with these true figures.

    `max_drop`, `drop`: points of top-1; `changed`: share of the images, 0 to 1, right under one model only. With no
    drop and none changed it is whether they can show the floor at all.
    """
    return images >= _confirming_images(max_drop, drop, changed)


def images_to_show(max_drop: float, drop: float = 0.0, changed: float = 0.0) -> int | None:
    """Calibration images, in both parts together, of which the confirming part is `likely_shown` to be enough.

    Without `drop` and `changed`: the fewest that can show the floor at all. None where no number of images would do, as
    the drop itself is over the floor.
    """
    confirming = _confirming_images(max_drop, drop, changed)
    return None if math.isinf(confirming) else math.ceil(math.ceil(confirming) * CHOOSING / (CHOOSING - 1))


def images_to_show_kl(max_kl: float, kl: float, interval: tuple[float, float] | None, confirming: int) -> int | None:
    """Calibration images, in both parts together, that likely show a largest KL, from what `confirming` of them gave.

    None where the KL itself is over it, and without an interval, which takes 30 confirming images.
    """
    if kl >= max_kl:
        return None
    if interval is None:
        return math.ceil(30 * CHOOSING / (CHOOSING - 1))
    return math.ceil(confirming * growth_to_decide(max_kl - kl, interval[1] - kl) * CHOOSING / (CHOOSING - 1))


def _confirming_images(max_drop: float, drop: float, changed: float) -> float:
    if drop >= max_drop:
        return math.inf
    changed = max(changed, drop / 100)
    return images_to_bound_loss(max_drop / 100, (changed + drop / 100) / 2, (changed - drop / 100) / 2)


def power_note(max_drop: float, images: int) -> str:
    """What a floor asks of the calibration images, said before the work starts."""
    fewest, usual = images_to_show(max_drop), images_to_show(max_drop, changed=0.02)
    enough = "" if fewest is not None and images >= fewest else ", which cannot show it, so an estimate chooses"
    return (
        f"showing (95 %) that top-1 drops by at most {max_drop:g} points needs {_count(fewest)} calibration images "
        f"if no image changes, and about {_count(usual)} if 1 % become right and 1 % wrong; "
        f"there are {images:,}{enough}"
    )


def _count(images: int | None) -> str:
    return "more than a billion" if images is None else f"{images:,}"
