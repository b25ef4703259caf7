import math

import pytest

from vitopt.measure.statistics import paired_delta_interval
from vitopt.measure.verdict import accuracy_verdict, speed_verdict


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((400, -2.4, -3.5, -1.3, 12, 2), "loses 2.4 points (1.3 to 3.5)"),
        ((400, 1.1, 0.2, 2.0, 2, 7), "gains 1.1 points (0.2 to 2.0)"),
        ((50_000, -0.24, -0.35, -0.13, 900, 780), "loses 0.24 points (0.13 to 0.35)"),
        # A limit that excludes zero is never printed as zero.
        ((400, -1.0, -2.1, -0.004, 5, 1), "loses 1.0 points (0.004 to 2.1)"),
        (
            (2_000, -0.2, -0.8, 0.4, 18, 14),
            "no measurable loss (n = 2,000: a loss under 0.8 points cannot be seen with these images)",
        ),
        (
            (400, 0.5, -1.2, 2.3, 7, 9),
            "no measurable loss (n = 400: a loss under 2.8 points cannot be seen with these images)",
        ),
        # An interval that ends at zero includes it.
        (
            (400, -1.0, -2.0, 0.0, 8, 4),
            "no measurable loss (n = 400: a loss under 2.4 points cannot be seen with these images)",
        ),
        ((3, -33.3, -79.2, 32.9, 1, 0), "no measurable loss (n = 3: too few images to see any loss)"),
        (
            (400, 0.0, -0.95, 0.95, 0, 0),
            "identical on all 400 images: none turned right or wrong "
            "(on other images a loss of up to 0.9 points is possible)",
        ),
        (
            (50_000, 0.0, -0.0077, 0.0077, 0, 0),
            "identical on all 50,000 images: none turned right or wrong "
            "(on other images a loss of up to 0.01 points is possible)",
        ),
        (
            (1, 0.0, -79.3, 79.3, 0, 0),
            "identical on the only image: none turned right or wrong "
            "(on other images a loss of up to 79.3 points is possible)",
        ),
    ],
)
def test_accuracy_verdict(arguments, words):
    assert accuracy_verdict(*arguments) == words


def test_accuracy_verdict_follows_the_interval():
    interval = paired_delta_interval(340, 16, 4, 40)
    verdict = accuracy_verdict(400, -3.0, 100 * interval.low, 100 * interval.high, 16, 4)
    assert verdict == "loses 3.0 points (0.9 to 5.5)"


def test_accuracy_verdict_when_every_image_is_lost():
    interval = paired_delta_interval(0, 50, 0, 0)
    verdict = accuracy_verdict(50, -100.0, 100 * interval.low, 100 * interval.high, 50, 0)
    assert verdict == "loses 100.0 points (85.7 to 100.0)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.0, -1.0, 1.0, 0, 0), "at least one image, got 0"),
        ((10, 0.0, -1.0, 1.0, 6, 5), "6 and 5 changed images do not fit in 10"),
        ((10, 0.0, -1.0, 1.0, -1, 5), "-1 and 5 changed images do not fit in 10"),
        ((10, 5.0, -1.0, 1.0, 1, 1), "5.0 lies outside its interval, -1.0 to 1.0"),
        ((10, 0.0, math.nan, 1.0, 1, 1), "lies outside its interval"),
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
