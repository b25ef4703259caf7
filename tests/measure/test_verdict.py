import math

import pytest

from vitopt.measure.intervals import paired_delta_interval
from vitopt.measure.paired import mcnemar_exact_p
from vitopt.measure.verdict import accuracy_verdict, speed_verdict


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((400, -2.4, -3.5, -1.3, 0.01), "loses 2.4 points (1.3 to 3.5)"),
        ((400, 1.1, 0.2, 2.0, 0.03), "gains 1.1 points (0.2 to 2.0)"),
        ((50_000, -0.24, -0.35, -0.13, 0.01), "loses 0.24 points (0.13 to 0.35)"),
        # A limit that excludes zero is never printed as zero.
        ((400, -1.0, -2.1, -0.004, 0.04), "loses 1.0 points (0.004 to 2.1)"),
        ((2_000, -0.2, -0.8, 0.4, 0.6), "no loss shown; a loss of up to 0.8 points is not excluded (n = 2,000)"),
        ((400, 0.0, -0.95, 0.95, 1.0), "no loss shown; a loss of up to 0.9 points is not excluded (n = 400)"),
        ((3, -33.3, -79.2, 32.9, 1.0), "no loss shown; a loss of up to 79.2 points is not excluded (n = 3)"),
        # An interval that ends at zero includes it.
        ((400, -1.0, -2.0, 0.0, 0.05), "no loss shown; a loss of up to 2.0 points is not excluded (n = 400)"),
        # Four images lost and none won: the score interval excludes zero, the exact test does not.
        (
            (400, -1.0, -2.5, -0.02, 0.125),
            "no loss shown (p = 0.12); a loss of up to 2.5 points is not excluded (n = 400)",
        ),
        ((400, 1.0, 0.02, 2.5, 0.125), "neither loss nor gain shown (p = 0.12) (n = 400)"),
    ],
)
def test_accuracy_verdict(arguments, words):
    assert accuracy_verdict(*arguments) == words


@pytest.mark.parametrize("discordant", range(1, 41))
def test_the_words_never_contradict_the_exact_test_beside_them(discordant):
    for lost in range(discordant + 1):
        gained, images = discordant - lost, 400
        interval, p = paired_delta_interval(images - discordant, lost, gained, 0), mcnemar_exact_p(lost, gained)
        delta = 100 * (gained - lost) / images
        verdict = accuracy_verdict(images, delta, 100 * interval.low, 100 * interval.high, p)
        assert verdict.startswith(("loses", "gains")) == (p < 0.05)


def test_accuracy_verdict_when_every_image_is_lost():
    interval = paired_delta_interval(0, 50, 0, 0)
    verdict = accuracy_verdict(50, -100.0, 100 * interval.low, 100 * interval.high, 0.0)
    assert verdict == "loses 100.0 points (85.7 to 100.0)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.0, -1.0, 1.0, 1.0), "at least one image, got 0"),
        ((10, 5.0, -1.0, 1.0, 1.0), "5.0 lies outside its interval, -1.0 to 1.0"),
        ((10, 0.0, math.nan, 1.0, 1.0), "lies outside its interval"),
    ],
)
def test_accuracy_verdict_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        accuracy_verdict(*arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1.68, 1.61, 1.75), "1.68x faster (1.61 to 1.75)"),
        ((0.62, 0.6, 0.641), "0.62x: slower (0.60 to 0.64)"),
        ((1.004, 0.97, 1.04), "no measurable difference in speed (0.97 to 1.04)"),
        ((1.05, 1.0, 1.1), "no measurable difference in speed (1.00 to 1.10)"),
        # A figure that differs from 1 is never printed as 1.
        ((1.003, 1.001, 1.005), "1.003x faster (1.001 to 1.005)"),
        ((0.97, 0.95, 0.9996), "0.97x: slower (0.95 to 0.9996)"),
        ((1.68, None, None), "1.68x faster (too few rounds for an interval)"),
        ((0.62, None, None), "0.62x: slower (too few rounds for an interval)"),
        ((1.0, None, None), "no measurable difference in speed (too few rounds for an interval)"),
    ],
)
def test_speed_verdict(arguments, words):
    assert speed_verdict(*arguments) == words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, None, None), "positive and finite, got 0.0"),
        ((math.nan, None, None), "positive and finite, got nan"),
        ((1.2, 1.1, None), "both limits, got one"),
        ((1.2, 1.3, 1.4), "1.2 lies outside its interval, 1.3 to 1.4"),
    ],
)
def test_speed_verdict_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        speed_verdict(*arguments)
