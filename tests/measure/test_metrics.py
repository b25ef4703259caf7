"""Top-k accuracy in the interface of Hugging Face `evaluate`."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from vitopt.measure.metrics import TopKAccuracy


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((200, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 12, 200)


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_equals_scikit_learn(k: int, logits: np.ndarray, labels: np.ndarray) -> None:
    expected = 100 * top_k_accuracy_score(labels, logits, k=k, labels=np.arange(12))
    assert TopKAccuracy().compute(predictions=logits, references=labels, k=k) == {
        f"top{k}_percent": pytest.approx(expected)
    }


def test_top_1_is_the_default(logits: np.ndarray, labels: np.ndarray) -> None:
    expected = 100 * np.mean(logits.argmax(1) == labels)
    assert TopKAccuracy().compute(predictions=logits, references=labels) == {"top1_percent": pytest.approx(expected)}


def test_batches_add_up(logits: np.ndarray, labels: np.ndarray) -> None:
    metric = TopKAccuracy()
    assert isinstance(metric, evaluate.Metric)
    for start in range(0, 200, 64):
        metric.add_batch(predictions=logits[start : start + 64], references=labels[start : start + 64])
    whole = TopKAccuracy().compute(predictions=logits, references=labels, k=3)
    assert metric.compute(k=3) == whole and 0 < whole["top3_percent"] < 100
