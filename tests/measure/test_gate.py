"""Requirements decided on records whose intervals are known."""

from types import SimpleNamespace

import numpy as np
import pytest

from vitopt.measure import gate
from vitopt.measure.comparison import speed_ratio
from vitopt.measure.gate import judge, judge_floor, overall
from vitopt.measure.intervals import Interval, paired_delta_interval
from vitopt.recipe import AutoSkipSpec, RequireSpec
from vitopt.records import Record, Requirement


def records(make: SimpleNamespace, images: int = 400, lost: int = 0, **fields) -> tuple[Record, Record]:
    """A baseline that is always right, and a variant that loses `lost` images."""
    before = make.predictions(images=images)
    baseline = make.record("fp32", predictions=before)
    after = make.predictions(range(lost), images)
    return baseline, make.record("nf4", predictions=after, baseline=("fp32", before), **fields)


def one(require: dict, baseline: Record, variant: Record) -> Requirement:
    (found,) = judge(RequireSpec(**require), variant, baseline)
    return found


@pytest.mark.parametrize(
    ("images", "lost", "decision"),
    [(400, 0, "undecided"), (765, 0, "shown"), (764, 0, "undecided"), (400, 40, "failed")],
)
def test_a_loss_is_within_half_a_point_only_with_its_whole_interval(make, images, lost, decision):
    found = one({"max_top1_drop": 0.5}, *records(make, images, lost))
    interval = paired_delta_interval(images - lost, lost, 0, 0)
    assert (found.decision, found.measured) == (decision, pytest.approx(100 * lost / images))
    assert found.ci95 == pytest.approx((-100 * interval.high, -100 * interval.low))


def test_undecided_says_how_many_more_images_would_decide_it(make):
    found = one({"max_top1_drop": 0.5}, *records(make, 400))
    assert found.reason == "about 370 more images would likely decide it"  # 765 without a change


def test_a_figure_that_lies_on_the_limit_says_what_its_number_supposes(make):
    found = one({"max_top1_drop": 1.0}, *records(make, 400, lost=4))
    assert (found.decision, found.measured) == ("undecided", pytest.approx(1.0))
    assert found.reason == "about 710 more images would likely decide it if nothing is truly lost"
    assert "no number of images" in one({"min_agreement": 99}, *records(make, 400, lost=4)).reason


@pytest.mark.parametrize(("lost", "decision"), [(0, "shown"), (4, "undecided"), (30, "failed")])
def test_agreement_is_judged_by_wilsons_interval(make, lost, decision):
    found = one({"min_agreement": 98}, *records(make, 400, lost))
    assert found.decision == decision and found.measured == pytest.approx(100 - lost / 4)


@pytest.mark.parametrize("place", ["above", "within", "below"])
def test_kl_is_judged_by_its_interval(make, place):
    baseline, variant = records(make, 400, lost=20)
    low, high = variant.versus_baseline.kl_ci95
    limit = {"above": 1.01 * high, "within": (low + high) / 2, "below": 0.99 * low}[place]
    found = one({"max_kl": limit}, baseline, variant)
    assert found.decision == {"above": "shown", "within": "undecided", "below": "failed"}[place]
    assert ("more images" in (found.reason or "")) == (place == "within")


def test_kl_of_few_images_is_undecided(make):
    assert "30 or more" in one({"max_kl": 1}, *records(make, 20)).reason


def timed(make, together: tuple[str | None, str | None], samples=None, **fields) -> tuple[Record, Record]:
    """Two records, the second 1.5 times as fast; `samples` are the second's own."""
    pair = [make.record(name, p50_ms={1: ms}, measured_together=one) for name, ms, one in
            zip(("fp32", "bf16"), (30.0, 20.0), together, strict=True)]  # fmt: skip
    changed = fields if samples is None else fields | {"samples_ms": tuple(samples), "iterations": len(samples)}
    row = pair[1].latency[0].model_copy(update=changed)
    return pair[0], pair[1].model_copy(update={"latency": (row,)})


@pytest.mark.parametrize(("limit", "decision"), [(1.2, "shown"), (2.0, "failed")])
def test_speed_is_judged_by_the_interval_of_rounds_that_were_timed_together(make, limit, decision):
    found = one({"min_speedup": limit}, *timed(make, ("a", "a")))
    assert (found.decision, found.batch_size) == (decision, 1)
    assert found.measured == pytest.approx(1.5, rel=0.01) and found.ci95[0] <= found.measured <= found.ci95[1]


@pytest.mark.parametrize("together", [("a", "b"), (None, None), ("a", None)])
def test_times_of_two_runs_decide_nothing_about_speed(make, together):
    found = one({"min_speedup": 1.2}, *timed(make, together))
    assert (found.decision, found.ci95) == ("undecided", None) and "not timed together" in found.reason


@pytest.mark.parametrize("changed", [{"rounds": 5}, {"samples_ms": ()}])
def test_samples_of_other_rounds_decide_nothing_about_speed(make, changed):
    found = one({"min_speedup": 1.2}, *timed(make, ("a", "a"), **changed))
    assert found.decision == "undecided" and "samples" in found.reason


def test_speed_near_the_limit_says_how_many_more_calls(make):
    noisy = np.random.default_rng(0).lognormal(np.log(20), 0.3, 100)
    baseline, variant = timed(make, ("a", "a"), noisy)
    ratio = speed_ratio(baseline, variant, 1).ratio
    found = one({"min_speedup": 0.99 * ratio}, baseline, variant)
    assert found.decision == "undecided" and "more calls" in found.reason


@pytest.mark.parametrize(
    ("interval", "decision"),
    [((18.0, 19.9), "shown"), ((18.0, 20.1), "undecided"), ((20.1, None), "failed"), ((18.0, None), "undecided")],
)
def test_p99_is_judged_by_its_upper_limit(make, interval, decision):
    found = one({"max_p99_ms": 20}, *timed(make, (None, None), p99_ci95_ms=interval))
    assert (found.decision, found.ci95) == (decision, interval)


def test_p99_without_an_interval_says_how_many_calls_it_takes(make):
    found = one({"max_p99_ms": 20}, *timed(make, (None, None)))
    assert found.decision == "undecided" and "368 calls, not 100" in found.reason


def test_p99_counts_the_calls_that_are_missing(make):
    found = one({"max_p99_ms": 30}, *timed(make, (None, None), p99_ci95_ms=(18.0, None)))
    assert found.reason == "about 270 more calls would likely decide it"  # none of 100 took longer


@pytest.mark.parametrize(("limit", "decision"), [(20, "shown"), (19.9, "failed")])
def test_size_is_known_exactly(make, limit, decision):
    found = one({"max_megabytes": limit}, *records(make))
    assert (found.decision, found.measured) == (decision, 20.0)


def test_what_was_not_measured_shows_nothing(make):
    everything = RequireSpec(max_top1_drop=1, min_agreement=9, max_kl=1, min_speedup=1, max_p99_ms=9, max_megabytes=1)
    bare = make.record("a", weight_bytes=None)
    failed = make.record("b", failure="no kernel")
    for record in (bare, failed):
        found = judge(everything, record, make.record("fp32"))
        assert [each.name for each in found] == list(everything.limits)
        assert {each.decision for each in found} == {"undecided"} and all(each.reason for each in found)
    assert "no kernel" in found[0].reason


def test_speed_is_judged_at_the_batch_size_asked_for(make):
    baseline = make.record("fp32", p50_ms={1: 30.0, 8: 90.0}, measured_together="a")
    variant = make.record("bf16", p50_ms={1: 20.0, 8: 100.0}, measured_together="a")
    at_1, at_8, at_16 = (one({"min_speedup": 1.2} | asked, baseline, variant) for asked in
                         ({}, {"batch_size": 8}, {"batch_size": 16}))  # fmt: skip
    assert [(each.decision, each.batch_size) for each in (at_1, at_8, at_16)] == [
        ("shown", 1), ("failed", 8), ("undecided", 16)
    ]  # fmt: skip


def test_floors_of_an_automatic_skip_list_are_judged_on_the_tested_images(make):
    baseline, variant = records(make, 400, lost=40)
    top1, share = judge_floor(AutoSkipSpec(max_top1_drop=0.5, max_kl_share=0.5), variant, baseline)
    assert (top1.name, top1.decision) == ("auto.max_top1_drop", "failed")
    assert (share.name, share.decision) == ("auto.max_kl_share", "undecided")


def test_overall_a_failure_counts_more_than_a_doubt():
    def of(*decisions: str) -> str:
        return overall([Requirement(name="max_kl", limit=1, measured=1, decision=each) for each in decisions])

    assert of() == of("shown") == "shown"
    assert of("shown", "undecided") == "undecided"
    assert of("undecided", "failed", "shown") == "failed"


@pytest.mark.parametrize(("count", "rounded"), [(1, 1), (7.2, 8), (99.1, 100), (365, 370), (1_201, 1_300)])
def test_numbers_of_more_images_have_two_digits(count, rounded):
    assert gate.round_up(count) == rounded


def test_an_interval_that_reaches_down_without_end_is_kept_as_unknown():
    found = gate._judged("max_p99_ms", 5.0, gate.Evidence(6.0, Interval(6.0, float("inf")), 1, 1))
    assert (found.decision, found.ci95) == ("failed", (6.0, None))
