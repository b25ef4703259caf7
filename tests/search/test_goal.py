"""Deciding on a goal, and how many images that takes, against the binomial distribution."""

import numpy as np
import pytest

from vitopt.measure.intervals import paired_delta_interval
from vitopt.search.goal import Goal, decide, images_to_show, likely_shown, power_note
from vitopt.search.results import Loss


def loss(low: float, high: float, share: tuple[float, float] | None = None) -> Loss:
    middle = (low + high) / 2
    known = {} if share is None else {"kl_share": sum(share) / 2, "kl_share_ci95": share}
    delta = {"top1_delta_points": middle, "top1_delta_ci95_points": (low, high)}
    return Loss(**delta, agreement_percent=99, kl=0.1, logit_error=0.1, **known)


def with_kl(interval: tuple[float, float] | None) -> Loss:
    return loss(-9, 9).model_copy(update={"kl_ci95": interval})


@pytest.mark.parametrize(
    ("goal", "measured", "decision"),
    [
        (Goal(max_top1_drop=1), loss(-1.0, 0.2), "shown"),
        (Goal(max_top1_drop=1), loss(-1.1, 0.2), "undecided"),
        (Goal(max_top1_drop=1), loss(-3.0, -1.1), "failed"),
        (Goal(max_kl_share=0.5), loss(-9, 9, (0.3, 0.5)), "shown"),
        (Goal(max_kl_share=0.5), loss(0, 0, (0.3, 0.51)), "undecided"),
        (Goal(max_kl_share=0.5), loss(0, 0, (0.51, 0.6)), "failed"),
        (Goal(max_kl=0.1), with_kl((0.05, 0.1)), "shown"),
        (Goal(max_kl=0.1), with_kl((0.05, 0.11)), "undecided"),
        (Goal(max_kl=0.1), with_kl((0.11, 0.2)), "failed"),
        (Goal(max_kl=0.1), with_kl(None), "undecided"),
        (Goal(1, 0.5), loss(-0.5, 0.5, (0.3, 0.51)), "undecided"),
        (Goal(1, 0.5), loss(-3.0, -2.0, (0.3, 0.4)), "failed"),
        (Goal(1, 0.5), loss(-0.5, 0.5, (0.3, 0.4)), "shown"),
    ],
)
def test_the_whole_interval_decides_each_half_of_the_goal(goal: Goal, measured: Loss, decision: str) -> None:
    assert decide(goal, measured) == decision


@pytest.mark.parametrize("floor", [0.5, 1.0, 3.0])
def test_the_fewest_images_are_those_that_show_the_floor_if_none_changes(floor: float) -> None:
    fewest = images_to_show(floor)
    assert fewest is not None
    confirming = fewest - -(-fewest // 4)
    assert -100 * paired_delta_interval(confirming, 0, 0, 0).low <= floor
    assert -100 * paired_delta_interval(confirming - 2, 0, 0, 0).low > floor


@pytest.mark.parametrize(("floor", "drop", "changed"), [(1.0, 0.0, 0.02), (1.0, 0.4, 0.03), (2.0, 0.0, 0.005)])
def test_so_many_images_show_the_floor_four_times_in_five(floor: float, drop: float, changed: float) -> None:
    images = images_to_show(floor, drop, changed)
    assert images is not None
    confirming = images - -(-images // 4)
    rng = np.random.default_rng(0)
    lost, gained = (changed + drop / 100) / 2, (changed - drop / 100) / 2
    counts = rng.multinomial(confirming, [1 - changed, lost, gained], 2000)
    shown = sum(-100 * paired_delta_interval(*map(int, row), 0).low <= floor for row in counts)
    assert 0.76 <= shown / 2000 <= 0.97  # more than asked where few images change, as counts are whole
    assert likely_shown(confirming, floor, drop, changed)
    assert not likely_shown(confirming // 2, floor, drop, changed)


def test_a_drop_over_the_floor_is_shown_by_no_number_of_images() -> None:
    assert images_to_show(0.5, drop=0.5) is None
    assert images_to_show(0.5, drop=0.7, changed=0.02) is None


def test_the_note_says_what_the_floor_takes_and_what_there_is() -> None:
    few, enough = power_note(0.5, 400), power_note(0.5, 20_000)
    assert "0.5 points" in few and "1,020" in few and "there are 400" in few and "cannot show it" in few
    assert "there are 20,000" in enough and "cannot" not in enough
