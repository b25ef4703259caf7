"""Metrics in the interface of Hugging Face `evaluate`, computed here, so that none is downloaded."""

from typing import Any

import datasets
import evaluate
import numpy as np

from vitopt.measure.logit_statistics import topk_correct

_CITATION = "Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, arXiv 1409.0575"


class TopKAccuracy(evaluate.Metric):
    """Percentage of images whose label is among the `k` classes of highest logit.

    `TopKAccuracy().compute(predictions=logits, references=labels, k=5)` returns `{"top5_percent": ...}`;
    `logits`: (images, classes).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="top-k accuracy in percent",
            citation=_CITATION,
            inputs_description="predictions: logits per image; references: class indices",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any, k: int = 1) -> dict[str, float]:
        correct = topk_correct(np.asarray(predictions), np.asarray(references), k)
        return {f"top{k}_percent": 100 * float(correct.mean())}
