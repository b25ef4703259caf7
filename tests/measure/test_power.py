import math

import numpy as np
import pytest
import scipy.stats

from vitopt.measure.claims import at_least, at_most
from vitopt.measure.intervals import Interval, paired_delta_interval, wilson_interval
from vitopt.measure.power import (
    calls_to_bound_p99,
    growth_to_decide,
    images_to_bound_loss,
    smallest_visible_loss,
    trials_to_bound_share,
)


def shares(images, lost_rate, gained_rate, margin, cases=4_000):
    """Shares of simulated comparisons in which a loss of at most `margin` is shown, and shown to fail."""
    tables = np.random.default_rng(2).multinomial(images, [lost_rate, gained_rate, 1 - lost_rate - gained_rate], cases)
    distinct, counts = np.unique(tables, axis=0, return_counts=True)
    intervals = [paired_delta_interval(same, lost, gained, 0) for lost, gained, same in distinct.tolist()]
    decisions = np.array([at_least(interval, -margin) for interval in intervals])
    return tuple(float(counts @ (decisions == word)) / cases for word in ("shown", "failed"))


class TestImagesToBoundLoss:
    @pytest.mark.parametrize(("margin", "least"), [(0.005, 765), (0.01, 381), (0.05, 73)])
    def test_least_is_where_the_interval_of_no_change_reaches_the_margin(self, margin, least):
        assert math.ceil(images_to_bound_loss(margin, 0, 0)) == least
        assert -paired_delta_interval(least, 0, 0, 0).low <= margin < -paired_delta_interval(least - 1, 0, 0, 0).low

    @pytest.mark.parametrize(
        ("margin", "lost", "gained"), [(0.01, 0.01, 0.01), (0.02, 0.04, 0.04), (0.02, 0.02, 0.01), (0.01, 0.05, 0.02)]
    )
    def test_that_many_images_decide_it_eight_times_in_ten(self, margin, lost, gained):
        images = math.ceil(images_to_bound_loss(margin, lost, gained))
        decided = shares(images, lost, gained, margin)[0 if lost - gained < margin else 1]
        assert 0.76 <= decided <= 0.84

    def test_no_number_decides_a_loss_that_lies_on_the_limit(self):
        assert images_to_bound_loss(0.02, 0.03, 0.01) == math.inf

    @pytest.mark.parametrize("arguments", [(0.01, 0.6, 0.6), (-0.01, 0, 0), (0.01, 0, 0, 1.0), (0.01, 0, 0, 0.2)])
    def test_rejects_shares_and_powers_out_of_range(self, arguments):
        with pytest.raises(ValueError, match=r"between 0 and 1|power"):
            images_to_bound_loss(*arguments)


@pytest.mark.parametrize(("images", "discordant"), [(400, 0.02), (400, 0.1), (1_000, 0.08), (2_000, 0.03)])
def test_a_loss_of_just_the_margin_is_rarely_shown_to_be_within_it(images, discordant):
    margin = 0.01
    lost, gained = (discordant + margin) / 2, (discordant - margin) / 2
    shown, failed = shares(images, lost, gained, margin)
    assert shown <= 0.03 and failed <= 0.04


class TestTrialsToBoundShare:
    def test_least_is_where_wilsons_interval_of_all_reaches_the_limit(self):
        assert math.ceil(trials_to_bound_share(0.98, 1)) == 189
        assert wilson_interval(189, 189).low >= 0.98 > wilson_interval(188, 188).low

    @pytest.mark.parametrize(("limit", "truth"), [(0.98, 0.99), (0.9, 0.92), (0.9, 0.88)])
    def test_that_many_trials_decide_it_eight_times_in_ten(self, limit, truth):
        trials = math.ceil(trials_to_bound_share(limit, truth))
        successes = np.arange(trials + 1)
        wanted = "shown" if truth > limit else "failed"
        decided = [at_least(wilson_interval(count, trials), limit) == wanted for count in successes.tolist()]
        assert 0.76 <= scipy.stats.binom.pmf(successes, trials, truth) @ decided <= 0.84

    def test_agreement_of_just_the_limit_is_rarely_shown(self):
        for trials in (100, 400, 3_000):
            successes = np.arange(trials + 1)
            shown = [at_least(wilson_interval(count, trials), 0.98) == "shown" for count in successes.tolist()]
            assert scipy.stats.binom.pmf(successes, trials, 0.98) @ shown <= 0.03


class TestCalls:
    def test_of_p99_is_the_number_whose_slowest_bounds_it(self):
        assert calls_to_bound_p99(0.0) == 368

    @pytest.mark.parametrize("over", [0.003, 0.005, 0.02])
    def test_that_many_decide_it_about_eight_times_in_ten(self, over):
        calls = math.ceil(calls_to_bound_p99(over))
        # The order statistics that bound p99: a limit is above the upper one where few enough calls exceed it.
        few = scipy.stats.binom.ppf(0.025, calls, 0.01) - 1
        many = scipy.stats.binom.ppf(0.975, calls, 0.01)
        decided = scipy.stats.binom.cdf(few, calls, over) if over < 0.01 else scipy.stats.binom.sf(many, calls, over)
        assert 0.7 <= decided <= 0.9


def test_a_sample_that_has_grown_so_much_decides_eight_times_in_ten():
    # Means of a normal sample of 100 with spread 1 reach 0.196; the limit is 0.1 away.
    sample = 100 * growth_to_decide(0.1, 1.96 / 10)
    spread = 1 / math.sqrt(sample)
    assert scipy.stats.norm.cdf((0.1 - 1.96 * spread) / spread) == pytest.approx(0.8, abs=0.001)
    assert growth_to_decide(0.0, 1.0) == math.inf
    assert at_most(Interval(0, 1), 1) == "shown"


def seen(images, loss, discordant_rate):
    return shares(images, (discordant_rate + loss) / 2, (discordant_rate - loss) / 2, 1e-9)[1]


class TestSmallestVisibleLoss:
    def test_is_seen_eight_times_in_ten(self):
        assert 0.77 <= seen(2_000, smallest_visible_loss(2_000, 0.05) / 100, 0.05) <= 0.83

    def test_is_cautious_where_every_discordant_image_is_lost(self):
        loss = smallest_visible_loss(400, 0.0) / 100
        assert 0.9 <= seen(400, loss, loss) <= 0.98

    def test_follows_the_formula_of_connor(self):
        z, z_power = scipy.stats.norm.ppf([0.975, 0.8])
        loss = smallest_visible_loss(800, 0.05) / 100
        assert (z * 0.05**0.5 + z_power * (0.05 - loss**2) ** 0.5) ** 2 / loss**2 == pytest.approx(800)

    def test_no_loss_is_visible_on_three_images(self):
        assert smallest_visible_loss(3, 0.5) == math.inf
        assert smallest_visible_loss(4, 0.0) <= 100

    @pytest.mark.parametrize("arguments", [(0, 0.1), (9, 1.1), (9, 0.1, 1.0)])
    def test_rejects(self, arguments):
        with pytest.raises(
            ValueError, match="at least" if arguments[0] == 0 or len(arguments) == 3 else "between 0 and 1"
        ):
            smallest_visible_loss(*arguments)
