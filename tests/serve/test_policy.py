import itertools

import numpy as np
import pytest

from vitopt.serve.policy import BatchTimes, Delay, batch_size, expected_wait, retry_after


def times(**seconds):
    return BatchTimes({int(size[1:]): value for size, value in seconds.items()})


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (30, 8)],
)
def test_the_batch_that_serves_most_images_per_second_is_run(waiting, expected):
    # Twice the images take 1.2 times as long, so filling up pays.
    assert batch_size([0.0] * waiting, times(b1=0.1, b2=0.12, b4=0.144, b8=0.173), None) == expected


def test_where_batches_bring_nothing_one_image_runs_alone():
    assert batch_size([0.0] * 8, times(b1=0.1, b2=0.2, b4=0.4, b8=0.8), None) == 1


def test_the_oldest_request_is_answered_in_time_if_any_size_can():
    seconds = times(b1=0.1, b4=0.2, b8=0.3)
    assert batch_size([0.0] * 8, seconds, 0.35) == 8
    assert batch_size([0.1] + [0.0] * 7, seconds, 0.35) == 4
    assert batch_size([0.5] + [0.0] * 7, seconds, 0.35) == 8  # too late for it: the others need not wait longer


def test_a_batch_is_as_by_trying_all_sizes():
    seconds = times(b1=0.05, b2=0.07, b4=0.11, b8=0.3)
    for waiting, age, target in itertools.product(range(1, 12), (0.0, 0.1, 0.2), (None, 0.15, 0.31)):
        size = batch_size([age] + [0.0] * (waiting - 1), seconds, target)
        in_time = [s for s in seconds.sizes if target is None or age + seconds[s] <= target] or list(seconds.sizes)
        assert size in in_time
        assert min(waiting, size) / seconds[size] == max(min(waiting, s) / seconds[s] for s in in_time)


def test_times_follow_the_machine_for_all_sizes():
    seconds = times(b1=0.1, b8=0.4)
    for _ in range(200):
        seconds.observe(8, 0.8)
    assert seconds[8] == pytest.approx(0.8, rel=1e-3)
    assert seconds[1] == pytest.approx(0.2, rel=1e-3)
    assert seconds.best_rate == pytest.approx(10, rel=1e-3)


def test_a_new_request_waits_for_the_running_batch_those_ahead_and_its_own():
    seconds = times(b1=0.1, b4=0.2)
    assert expected_wait(0, -3.0, seconds) == pytest.approx(0.1)
    assert expected_wait(10, 0.05, seconds) == pytest.approx(0.05 + 10 / 20 + 0.1)
    # Two decoders give 25 a second where the model takes 20, and 12.5 where they are what is slow.
    assert expected_wait(10, 0.05, seconds, 0.08, 2) == pytest.approx(0.05 + 10 / 20 + 0.08 + 0.1)
    assert expected_wait(10, 0.05, seconds, 0.16, 2) == pytest.approx(0.05 + 10 / 12.5 + 0.16 + 0.1)


def test_retry_after_is_at_least_a_second():
    assert retry_after(0.2, 0.1) == 1
    assert retry_after(3.2, 0.1) == 4
    assert retry_after(2.5, None) == 3


def test_a_batch_that_was_not_filled_up_is_held_against_its_own_size():
    seconds = times(b1=0.1, b4=0.4)
    seconds.observe(3, 0.3)  # just what it takes, in proportion
    assert (seconds[1], seconds[4]) == (pytest.approx(0.1), pytest.approx(0.4))
    seconds.observe(3, 0.6)
    assert seconds[1] == pytest.approx(0.1 * 2**0.1) and seconds[4] == pytest.approx(0.4 * 2**0.1)


@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_a_delay_is_that_of_all_but_one_in_a_hundred(spread):
    delay, taken = Delay(), np.random.default_rng(0).lognormal(0, spread, 20_000)
    factors = []
    for seconds in taken:
        delay.observe(0.2, 0.2 * seconds)
        factors.append(delay.factor)
    assert np.mean(factors[5000:]) == pytest.approx(np.quantile(taken, 0.99), rel=0.1)


def test_a_delay_is_never_taken_for_a_gain():
    delay = Delay()
    for _ in range(1000):
        delay.observe(1.0, 0.1)
    assert delay.factor == 1
