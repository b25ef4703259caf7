import pytest

from vitopt.errors import RecordError
from vitopt.measure.planning import needs
from vitopt.measure.power import images_to_bound_loss
from vitopt.recipe import RequireSpec


def one(pilot=None, **require):
    (need,) = needs(RequireSpec(**require), pilot)
    return need


@pytest.fixture
def pilot(make):
    """800 images of which 8 turn wrong, timed at batch 1 with one call in a hundred over 10.9 ms."""
    before = make.predictions(images=800)
    after = make.predictions(range(8), 800)
    times = {"p50_ms": {1: 10.0}, "baseline_ms": {1: 15.0}}
    return make.record("nf4", predictions=after, baseline=("fp32", before), **times)


def test_without_a_pilot_the_assumption_is_stated():
    need = one(max_top1_drop=0.5)
    assert (need.unit, need.least, need.likely) == ("images", 765, 6527)
    assert "2 %" in need.assumption and "assumed" in need.assumption


def test_a_pilot_gives_the_share_of_images_that_change(pilot):
    need = one(pilot, max_top1_drop=0.5)
    assert need.likely == pytest.approx(images_to_bound_loss(0.005, 0.005, 0.005), abs=1)
    assert need.least == 765 and "1 %" in need.assumption and "pilot" in need.assumption


def test_agreement(pilot):
    assert one(min_agreement=98).least == 189
    assert one(pilot, min_agreement=98).likely == one(min_agreement=98).likely  # 99 % in both
    assert one(pilot, min_agreement=99.5).likely is None  # it does not agree so often


def test_kl_takes_a_pilot(pilot):
    assert one(max_kl=0.01).likely is None
    mean, (_, high) = pilot.versus_baseline.mean_kl_divergence, pilot.versus_baseline.kl_ci95
    # Twice the reach of the interval away: a quarter of the images, and (1 + 0.84 / 1.96) squared for the power.
    assert one(pilot, max_kl=mean + 2 * (high - mean)).likely == pytest.approx(200 * 1.4294**2, rel=0.01)
    assert one(pilot, max_kl=mean / 2).likely is None


def test_calls(pilot):
    assert (one(max_p99_ms=20).unit, one(max_p99_ms=20).least) == ("calls", 368)
    assert one(max_p99_ms=20).likely > 2_000  # half of what is allowed takes longer
    assert one(pilot, max_p99_ms=20).likely == 368  # no call of the pilot took longer
    assert one(pilot, max_p99_ms=9).likely is None  # most did
    assert one(min_speedup=1.2).likely is None
    assert one(pilot, min_speedup=1.2).likely < 100 < one(pilot, min_speedup=1.49).likely
    assert one(pilot, min_speedup=1.6).likely is None


def test_a_pilot_that_was_compared_with_nothing_is_refused(make):
    with pytest.raises(RecordError, match=r"a was compared with no baseline .*--baseline"):
        one(make.record("a"), max_top1_drop=0.5)
    with pytest.raises(RecordError, match=r"pilot a failed \(no\)"):
        one(make.record("a", failure="no"), max_p99_ms=1)
