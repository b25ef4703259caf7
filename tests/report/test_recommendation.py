"""Which variant is recommended, and what is said of those that are not."""

from types import SimpleNamespace

import numpy as np
import pytest

from vitopt.records import Record, Requirement, Throughput
from vitopt.report.recommendation import cost_per_million, recommend
from vitopt.report.summary import headline

MET = Requirement(name="max_top1_drop", limit=1.0, measured=0.0, decision="shown")
SLOW = Requirement(name="min_speedup", limit=1.2, measured=0.6, ci95=(0.5, 0.7), decision="failed")
UNSURE = Requirement(
    name="max_top1_drop",
    limit=1.0,
    measured=0.2,
    decision="undecided",
    reason="about 412 more images",
    would_decide=812,
)


@pytest.fixture
def variant(make: SimpleNamespace):
    def variant(
        name: str, p50_ms: float, *requirements: Requirement, megabytes: float = 10, **fields: object
    ) -> Record:
        timed = {"p50_ms": {1: p50_ms}, "baseline_ms": {1: 4.0}, "weight_bytes": int(megabytes * 1e6)}
        return make.record(name, requirements=requirements, measured_together="once", **timed, **fields)

    return variant


def test_of_different_sessions_the_fastest_is_the_one_of_the_largest_speed_up(variant, make: SimpleNamespace) -> None:
    busy = make.record(  # in a session in which everything took twice as long
        "busy", requirements=(MET,), measured_together="later", p50_ms={1: 3.0}, baseline_ms={1: 8.0}
    )
    advice = recommend([variant("fp32", 4.0), variant("quiet", 2.0, MET), busy])
    assert advice is not None and advice.ship == "busy"


def test_the_fastest_that_meets_all_is_shipped_and_the_others_are_accounted_for(variant) -> None:
    records = [
        variant("fp32", 4.0),
        variant("slow", 3.0, MET),
        variant("fast", 2.0, MET),
        variant("nf4", 1.0, MET, SLOW),
        variant("int8", 1.1, SLOW),
        variant("w8a8", 1.5, UNSURE),
    ]
    advice = recommend(records)
    assert advice is not None and advice.ship == "fast"
    assert advice.line.startswith("ship fast: 2.00 ms (2.00x)")
    assert "nf4, int8 miss speed-up at least 1.2x" in advice.line and "10 MB" in advice.line
    assert advice.line.endswith(
        "undecided: w8a8 (loss of top-1 at most 1 points; with about 812 images it could be told)"
    )
    assert advice.missed.keys() == {"nf4", "int8"} and advice.undecided.keys() == {"w8a8"}
    assert headline(records, records[0], advice.line).startswith("Ship fast: ")


@pytest.mark.parametrize(
    ("prefer", "name"), [("latency", "quick"), ("size", "small"), ("throughput", "wide"), ("cost", "wide")]
)
def test_preferences(variant, prefer: str, name: str) -> None:
    records = [
        variant("quick", 1.0, MET, megabytes=30),
        variant("small", 3.0, MET, megabytes=3),
        variant(
            "wide", 2.0, MET, throughput=Throughput(batch_size=64, images_per_second=9000.0, largest_batch_size=64)
        ),
        variant("best-but-failed", 0.5, SLOW, megabytes=1),
    ]
    advice = recommend(records, prefer, price_per_hour=3.6)
    assert advice is not None and advice.ship == name


def test_of_equally_fast_ones_the_smallest_is_taken(variant) -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, (2, 10))

    def noisy(record: Record, of_rounds: np.ndarray) -> Record:
        latency = record.latency[0]
        samples = np.array(latency.samples_ms).reshape(10, -1) * np.exp(of_rounds)[:, None]
        return record.model_copy(
            update={"latency": (latency.model_copy(update={"samples_ms": tuple(samples.ravel())}),)}
        )

    large, small = variant("large", 2.0, MET, megabytes=12), variant("small", 2.001, MET, megabytes=6)
    slower = variant("smallest", 3.0, MET, megabytes=3)
    advice = recommend([noisy(large, noise[0]), noisy(small, noise[1]), slower])
    assert advice is not None and advice.ship == "small"
    advice = recommend([large, small, slower])  # without noise the difference is measured
    assert advice is not None and advice.ship == "large"


def test_cost_is_that_of_the_time_that_a_million_images_take(variant) -> None:
    # 4 ms an image are 4,000 s for a million; at 3.60 an hour a second costs 0.001.
    assert cost_per_million(variant("v", 4.0), 3.6) == pytest.approx(4.0)
    advice = recommend([variant("v", 4.0, MET)], "cost", 3.6)
    assert advice is not None and "4.00 per million images" in advice.line


def test_nothing_is_recommended_without_evidence(variant) -> None:
    advice = recommend([variant("fp32", 4.0), variant("w8a8", 1.0, UNSURE)])
    assert advice is not None and advice.ship is None and advice.line.startswith("no variant is shown")
    assert recommend([variant("fp32", 4.0), variant("w8a8", 1.0)]) is None
