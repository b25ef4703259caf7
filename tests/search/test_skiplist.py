"""The search on made-up scores, where the right answer is known."""

import pytest

from vitopt.search.results import Loss, UnitScores
from vitopt.search.skiplist import Goal, can_show, frontier, search_skip_list


def loss(kl: float, delta: float = 0.0, width: float = 0.5) -> Loss:
    return Loss(
        top1_delta_points=delta,
        top1_delta_ci95_points=(delta - width, delta + width),
        agreement_percent=100 - 10 * kl,
        kl=kl,
        logit_error=kl,
    )


def unit(name: str, gain: float, extra_bytes: int, extra_ms: float | None = 0.1, total: float = 1.0) -> UnitScores:
    return UnitScores(
        unit=name, damage=loss(gain), recovery=loss(total - gain), extra_bytes=extra_bytes, extra_ms=extra_ms
    )


UNITS = [unit("block.0", 0.4, 100), unit("block.1", 0.3, 10), unit("block.2", 0.2, 100), unit("block.3", 0.1, 100)]
GAINS = {one.unit: 1.0 - one.recovery.kl for one in UNITS}


def additive(kept: frozenset[str]) -> Loss:
    """KL falls by each kept unit's gain; a point of top-1 is lost per 0.5 of KL."""
    kl = 1.0 - sum(GAINS[name] for name in kept)
    return loss(kl, delta=-2 * kl)


def test_takes_units_by_gain_per_byte_until_the_goal_is_met() -> None:
    result = search_skip_list(UNITS, additive, Goal(max_kl_share=0.35), quantized=additive(frozenset()), images=1000)
    assert result.chosen == ("block.0", "block.1")
    assert result.floor_shown
    assert result.advice is None


def test_gives_back_a_unit_that_a_later_one_made_needless() -> None:
    # block.1 is worth most per byte and goes first, but block.0 alone meets the goal.
    result = search_skip_list(UNITS, additive, Goal(max_kl_share=0.6), quantized=additive(frozenset()), images=1000)
    assert result.chosen == ("block.0",)
    assert [point.skip for point in result.points] == [
        (),
        ("block.1",),
        ("block.0", "block.1"),
        ("block.1",),
        ("block.0",),
    ] or [point.skip for point in result.points] == [(), ("block.1",), ("block.0", "block.1"), ("block.0",)]


def test_keeps_nothing_when_the_quantized_model_meets_the_goal() -> None:
    result = search_skip_list(UNITS, additive, Goal(max_top1_drop=5), quantized=additive(frozenset()), images=1000)
    assert result.chosen == ()
    assert len(result.points) == 1


def test_latency_objective_prefers_units_that_cost_no_time() -> None:
    units = [unit("block.0", 0.4, 1, extra_ms=1.0), unit("block.1", 0.3, 1000, extra_ms=-0.2)]

    def evaluate(kept: frozenset[str]) -> Loss:
        return loss(1.0 - sum({"block.0": 0.4, "block.1": 0.3}[name] for name in kept))

    goal = Goal(max_kl_share=0.75)
    by_time = search_skip_list(units, evaluate, goal, quantized=evaluate(frozenset()), images=1000, objective="latency")
    by_size = search_skip_list(units, evaluate, goal, quantized=evaluate(frozenset()), images=1000, objective="size")
    assert by_time.chosen == ("block.1",)
    assert by_size.chosen == ("block.0",)


def test_says_how_many_images_would_show_the_floor() -> None:
    def lossless(kept: frozenset[str]) -> Loss:
        return loss(0.0, delta=0.0, width=0.95)

    result = search_skip_list(UNITS, lossless, Goal(max_top1_drop=0.5), quantized=lossless(frozenset()), images=400)
    assert result.chosen == ()
    assert not result.floor_shown
    assert result.advice is not None
    assert "400 images cannot show that top-1 drops by at most 0.5 points (95 %)" in result.advice
    assert "calibration images, or allow a larger drop" in result.advice
    needed = int(result.advice.split("at least ")[1].split()[0].replace(",", ""))
    assert can_show(Goal(max_top1_drop=0.5), needed)
    assert not can_show(Goal(max_top1_drop=0.5), int(needed * 0.85))


def test_the_interval_decides_where_there_are_enough_images() -> None:
    # The estimate of keeping nothing is within the floor, its interval is not.
    def evaluate(kept: frozenset[str]) -> Loss:
        return loss(1.0 - len(kept) / 4, delta=-0.3 + 0.1 * len(kept), width=0.3)

    result = search_skip_list(UNITS, evaluate, Goal(max_top1_drop=0.5), quantized=evaluate(frozenset()), images=5000)
    assert len(result.chosen) == 1
    assert result.floor_shown


def test_an_unreachable_goal_is_named() -> None:
    def hopeless(kept: frozenset[str]) -> Loss:
        return loss(1.0, delta=-20)

    result = search_skip_list(UNITS, hopeless, Goal(max_top1_drop=1), quantized=hopeless(frozenset()), images=5000)
    assert not result.floor_shown
    assert result.advice is not None
    assert "relax the goal" in result.advice


def test_frontier_holds_only_points_that_none_beats() -> None:
    result = search_skip_list(UNITS, additive, Goal(max_kl_share=0.05), quantized=additive(frozenset()), images=1000)
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


@pytest.mark.parametrize(("drop", "images"), [(0.5, 1000), (2.0, 200)])
def test_can_show_agrees_with_the_interval_of_identical_predictions(drop: float, images: int) -> None:
    from vitopt.measure.statistics import paired_delta_interval

    assert can_show(Goal(max_top1_drop=drop), images) == (-100 * paired_delta_interval(images, 0, 0, 0).low <= drop)
