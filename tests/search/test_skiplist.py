"""The search on made-up scores, where the right answer is known."""

import itertools

import numpy as np
import pytest

from vitopt.search.goal import Goal, images_to_show
from vitopt.search.results import Loss, SearchResult, UnitScores
from vitopt.search.skiplist import Evaluate, frontier, search_skip_list


def loss(kl: float, delta: float = 0.0, width: float = 0.5, agreement: float | None = None) -> Loss:
    return Loss(
        top1_delta_points=delta,
        top1_delta_ci95_points=(delta - width, delta + width),
        agreement_percent=100 - 10 * kl if agreement is None else agreement,
        kl=kl,
        logit_error=kl,
    )


def unit(name: str, gain: float, extra_bytes: int, extra_ms: float | None = 0.1, total: float = 1.0) -> UnitScores:
    return UnitScores(
        unit=name, damage=loss(gain), recovery=loss(total - gain), extra_bytes=extra_bytes, extra_ms=extra_ms
    )


def sharing(measured: Loss, whole: float, low: float = 1.0, high: float = 1.0) -> Loss:
    """The loss with its share of the KL `whole`, and an interval from `low` to `high` times that."""
    share = measured.kl / whole
    return measured.model_copy(update={"kl_share": share, "kl_share_ci95": (low * share, high * share)})


UNITS = [unit("block.0", 0.4, 100), unit("block.1", 0.3, 10), unit("block.2", 0.2, 100), unit("block.3", 0.1, 100)]
GAINS = {one.unit: one.damage.kl for one in UNITS if one.damage}


def additive(kept: frozenset[str]) -> Loss:
    """KL falls by each kept unit's gain; a point of top-1 is lost per 0.5 of KL."""
    kl = 1.0 - sum(GAINS[name] for name in kept)
    return sharing(loss(kl, delta=-2 * kl), 1.0)


def search(
    goal: Goal,
    evaluate: Evaluate = additive,
    confirm: Evaluate | None = None,
    units: list[UnitScores] = UNITS,
    **options: object,
) -> SearchResult:
    defaults: dict[str, object] = {"images": 500, "confirming_images": 1500, "quantized": evaluate(frozenset())}
    return search_skip_list(units, evaluate, confirm or evaluate, goal, **defaults | options)  # type: ignore[arg-type]


# Choosing


def test_the_cheapest_list_is_not_the_one_of_best_worth_first() -> None:
    """By gain per cost the two cheaper units come first and cost 165; one unit of 100 is enough."""
    gains = {"a": 1.0, "b": 0.9, "c": 0.9}
    units = [unit("a", 1.0, 100, total=2.8), unit("b", 0.9, 80, total=2.8), unit("c", 0.9, 85, total=2.8)]
    result = search(
        Goal(max_kl_share=1.8 / 2.8),
        lambda kept: sharing(loss(2.8 - sum(gains[name] for name in kept)), 2.8),
        units=units,
    )
    assert result.chosen == ("a",)


def test_additive_damage_gets_the_cheapest_of_all_lists() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        count = int(rng.integers(2, 8))
        gains = rng.uniform(0.02, 1, count)
        total, costs = float(gains.sum()), rng.integers(1, 30, count).tolist()
        units = [unit(str(i), float(gains[i]), costs[i], total=total) for i in range(count)]
        share = float(rng.uniform(0.05, 0.95))
        result = search(
            Goal(max_kl_share=share),
            lambda kept, gains=gains, total=total: sharing(  # type: ignore[misc]
                loss(total - sum(gains[int(name)] for name in sorted(kept))), total
            ),
            units=units,
        )
        all_lists = itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in range(count + 1))
        enough = [kept for kept in all_lists if total - sum(gains[list(kept)]) <= share * total + 1e-12]
        cheapest = min(sum(costs[i] for i in kept) for kept in enough)
        assert sum(costs[int(name)] for name in result.chosen) == cheapest
        assert len(result.points) <= 3  # nothing, the answer, and at most one that rounding asks for


def test_where_gains_overlap_more_is_asked_until_it_is_enough() -> None:
    """Beside the best, each unit brings back half of what its score says."""

    def overlapping(kept: frozenset[str]) -> Loss:
        gains = sorted((GAINS[name] for name in kept), reverse=True)
        return sharing(loss(1.0 - sum(gains[:1]) - 0.5 * sum(gains[1:])), 1.0)

    result = search(Goal(max_kl_share=0.42), overlapping)
    assert [point.skip for point in result.points[1:]] == [("block.0", "block.1"), ("block.0", "block.1", "block.2")]
    assert [point.within_target for point in result.points] == [False, False, True]
    assert result.chosen == ("block.0", "block.1", "block.2")


def test_where_units_help_each_other_less_is_asked() -> None:
    def helping(kept: frozenset[str]) -> Loss:
        return sharing(loss(max(0.0, 1.0 - 2 * sum(GAINS[name] for name in kept))), 1.0)

    # By the scores it takes block.0 and block.1; in truth block.1, the cheapest, is enough.
    result = search(Goal(max_kl_share=0.4), helping)
    assert result.chosen == ("block.1",)


def test_a_largest_kl_is_aimed_at_with_the_upper_end_of_its_interval() -> None:
    def measured(kept: frozenset[str], high: float) -> Loss:
        found = additive(kept)
        return found.model_copy(update={"kl_ci95": (found.kl / high, found.kl * high)})

    assert search(Goal(max_kl=0.7), lambda kept: measured(kept, 1.0)).chosen == ("block.1",)
    wide = search(Goal(max_kl=0.7), lambda kept: measured(kept, 1.5))
    assert set(wide.chosen) > {"block.1"} and wide.decision == "shown"
    over = search(Goal(max_kl=0.7), lambda kept: measured(kept, 1.0), confirm=lambda kept: measured(frozenset(), 1.5))
    assert over.decision == "undecided" and "1.0000 (0.6667 to 1.5000) nats" in (over.advice or "")


def test_few_images_and_no_damage_table_do_not_keep_everything() -> None:
    """So few images show the floor of next to no KL; without a table of damage it is that of the best list known."""
    units = [one.model_copy(update={"damage": None}) for one in UNITS]
    fewest = images_to_show(1.0)
    assert fewest is not None
    result = search(Goal(max_top1_drop=1.0), units=units, confirming_images=fewest - -(-fewest // 4))
    assert set(result.chosen) < {one.unit for one in units}


def test_keeps_nothing_when_the_quantized_model_meets_the_goal() -> None:
    result = search(Goal(max_top1_drop=8), lambda kept: loss(1.0 - 0.1 * len(kept), delta=-0.1, agreement=99))
    assert result.chosen == ()
    assert len(result.points) == 1
    assert result.decision == "shown"


def test_units_that_help_and_cost_nothing_are_always_kept() -> None:
    units = [unit("block.0", 0.4, 1, extra_ms=1.0), unit("block.1", 0.3, 1000, extra_ms=-0.2)]

    def evaluate(kept: frozenset[str]) -> Loss:
        return sharing(loss(1.0 - sum({"block.0": 0.4, "block.1": 0.3}[name] for name in kept)), 1.0)

    assert search(Goal(max_kl_share=0.75), evaluate, units=units, objective="latency").chosen == ("block.1",)
    assert search(Goal(max_kl_share=0.75), evaluate, units=units, objective="size").chosen == ("block.0",)
    assert search(Goal(max_kl_share=0.99), evaluate, units=units, objective="latency").chosen == ("block.1",)


def test_bytes_are_what_counts_where_one_time_is_unknown() -> None:
    units = [unit("block.0", 0.4, 1, extra_ms=1.0), unit("block.1", 0.4, 1000, extra_ms=None)]

    def evaluate(kept: frozenset[str]) -> Loss:
        return sharing(loss(1.0 - 0.4 * len(kept)), 1.0)

    assert search(Goal(max_kl_share=0.7), evaluate, units=units, objective="latency").chosen == ("block.0",)


def test_a_share_of_kl_is_aimed_at_with_the_end_of_its_interval() -> None:
    def wide(kept: frozenset[str]) -> Loss:
        return sharing(loss(additive(kept).kl), 1.0, high=1.3 if kept else 1.0)

    assert search(Goal(max_kl_share=0.6)).chosen == ("block.0",)
    assert search(Goal(max_kl_share=0.6), wide).chosen == ("block.0", "block.1")


# A floor of top-1


def by_kl(kept: frozenset[str]) -> Loss:
    """One point lost per nat and 3 % of the images changed at one nat."""
    kl = max(0.0, 1.0 - sum(GAINS[name] for name in kept))
    return loss(kl, delta=-kl, agreement=100 - 3 * kl**0.5)


def with_top1() -> list[UnitScores]:
    return [
        one.model_copy(
            update={
                "damage": loss(GAINS[one.unit], -GAINS[one.unit], agreement=100 - 3 * GAINS[one.unit] ** 0.5),
                "recovery": loss(
                    1 - GAINS[one.unit], GAINS[one.unit], agreement=100 - 3 * (1 - GAINS[one.unit]) ** 0.5
                ),
            }
        )
        for one in UNITS
    ]


def test_a_floor_is_aimed_at_with_what_the_confirming_images_can_show() -> None:
    kept = [
        search(Goal(max_top1_drop=1.2), by_kl, units=with_top1(), confirming_images=images).chosen
        for images in (1_000_000, 4_000, 1_500)
    ]
    assert kept[0] == ()
    assert 0 < len(kept[1]) < len(kept[2]) < 4


def test_where_the_images_can_show_nothing_half_of_the_floor_is_aimed_at() -> None:
    result = search(Goal(max_top1_drop=1.0), by_kl, units=with_top1(), confirming_images=100)
    assert result.chosen == ("block.0", "block.1")  # block.0 alone leaves 0.6 nats, which lose 0.6 points


# Confirming


def test_only_the_list_that_is_chosen_meets_the_confirming_images_and_once() -> None:
    asked: list[frozenset[str]] = []

    def confirm(kept: frozenset[str]) -> Loss:
        asked.append(kept)
        return loss(0.9, delta=-7, width=1)

    result = search(Goal(max_top1_drop=1), by_kl, confirm, units=with_top1())
    assert asked == [frozenset(result.chosen)]
    assert result.confirmed.top1_delta_points == -7
    assert (result.choosing_images, result.confirming_images) == (500, 1500)
    assert result.decision == "failed"
    assert result.advice is not None and "is not met on 1,500 images that were not used to choose" in result.advice


def test_what_the_choosing_images_say_decides_nothing() -> None:
    flattering, sober = (lambda kept: loss(0.0, 0.0, width=0.1)), (lambda kept: loss(0.0, -0.4, width=0.3))
    result = search(Goal(max_top1_drop=0.5), flattering, sober)
    assert result.decision == "undecided"
    assert result.advice is not None
    assert "top-1 drops by at most 0.5 points is not shown" in result.advice and "-0.4 (-0.7 to -0.1)" in result.advice


def test_the_advice_says_how_many_images_would_show_it() -> None:
    result = search(Goal(max_top1_drop=1.0), by_kl, lambda kept: loss(0.1, -0.3, width=1, agreement=97))
    assert result.advice is not None
    assert f"give about {images_to_show(1.0, 0.3, 0.03):,} calibration images" in result.advice
    over = search(Goal(max_top1_drop=1.0), by_kl, lambda kept: loss(0.1, -1.0, width=1, agreement=97))
    assert over.advice is not None and "calibration images" not in over.advice


def test_both_halves_of_a_goal_must_be_shown() -> None:
    goal = Goal(max_top1_drop=1.0, max_kl_share=0.5)
    for high, decision in ((1.0, "shown"), (1.5, "undecided")):
        confirmed = sharing(loss(0.45, 0.0, width=0.4), 1.0, low=0.8, high=high)
        assert search(goal, additive, lambda kept, confirmed=confirmed: confirmed).decision == decision  # type: ignore[misc]


def test_a_goal_that_no_candidate_reaches_speaks_of_the_candidates_alone() -> None:
    def hopeless(kept: frozenset[str]) -> Loss:
        return sharing(loss(1.0 - 0.01 * len(kept), delta=-20), 1.0)

    everything, some = search(Goal(max_kl_share=0.1), hopeless), search(Goal(max_kl_share=0.1), hopeless, untried=8)
    assert everything.decision == some.decision == "failed"
    assert not any(point.within_target for point in some.points)
    assert everything.advice is not None and "units were not tried" not in everything.advice
    assert some.advice is not None and "8 units were not tried" in some.advice


def test_the_number_of_looks_is_bounded() -> None:
    rng = np.random.default_rng(3)
    units = [unit(f"block.{i}", float(rng.uniform(0, 0.1)), int(rng.integers(1, 99))) for i in range(24)]
    result = search(
        Goal(max_kl_share=0.5), lambda kept: sharing(loss(float(rng.uniform(0, 1)) if kept else 1.0), 1.0), units=units
    )
    assert len(result.points) <= 25


def test_frontier_holds_only_points_that_none_beats() -> None:
    result = search(Goal(max_kl_share=0.05))
    fronts = frontier(
        result.points, {"bytes": lambda point: float(point.extra_bytes), "ms": lambda point: point.extra_ms}
    )
    for name, cost in (("bytes", lambda point: point.extra_bytes), ("ms", lambda point: point.extra_ms)):
        front = [result.points[index] for index in fronts[name]]
        assert [point.loss.kl for point in front] == sorted((point.loss.kl for point in front), reverse=True)
        for point in front:
            assert not any(
                cost(other) <= cost(point) and other.loss.kl < point.loss.kl - 1e-12 for other in result.points
            )


@pytest.mark.parametrize("count", [1, 2])
def test_few_units_are_no_special_case(count: int) -> None:
    result = search(Goal(max_kl_share=0.05), additive, units=UNITS[:count], untried=4 - count)
    assert set(result.chosen) <= {one.unit for one in UNITS[:count]}
