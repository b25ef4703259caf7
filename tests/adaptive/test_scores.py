"""How sure a first pass is, against plain arithmetic in float64."""

import math

import numpy as np
import pytest
import torch

from vitopt.adaptive.scores import scores

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.0, 0.0], [5.0, -5.0, -5.0]])


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_scores_are_those_of_the_definition(temperature: float) -> None:
    shares = [sorted(softmax([value / temperature for value in row]), reverse=True) for row in LOGITS.tolist()]
    wanted = {
        "margin": [best - second for best, second, _ in shares],
        "probability": [best for best, *_ in shares],
        "entropy": [sum(share * math.log(share) for share in row) for row in shares],
    }
    for proxy, values in wanted.items():
        assert scores(proxy, LOGITS, None, temperature).numpy() == pytest.approx(np.array(values), abs=1e-6)


def test_a_class_token_that_moves_more_is_less_sure() -> None:
    assert scores("class_token", LOGITS, torch.tensor([0.3, 0.1, 0.2]), 1.0).argsort().tolist() == [0, 2, 1]
