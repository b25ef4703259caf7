"""What is held out of a data set without splits."""

import numpy as np
import pytest

from vitopt.data.division import held_out


def test_a_fifth_of_each_class_is_held_out_evenly() -> None:
    assert held_out([0] * 10 + [1] * 5, None, 0.2) == [False] * 4 + [True] + [False] * 4 + [True] + [False] * 4 + [True]


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_divided_and_no_class_gives_more_than_its_share(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label_of = rng.integers(0, 3, 60)
    members = rng.permutation(np.repeat(np.arange(60), rng.integers(1, 8, 60)))
    labels, groups = label_of[members].tolist(), [f"video {group}" for group in members]
    testing = np.array(held_out(labels, groups, 0.2))
    for group in set(groups):
        assert len(set(testing[np.array(groups) == group])) == 1
    for label in range(3):
        share = testing[np.array(labels) == label].mean()
        assert 0.1 < share <= 0.2


def test_a_group_of_several_classes_stays_whole() -> None:
    testing = held_out([0, 1] * 10, [f"g{index // 2}" for index in range(20)], 0.2)
    assert testing == [index // 2 in (4, 9) for index in range(20)]
