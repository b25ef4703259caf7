"""Both passes over images, and the rule that comes of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES

from vitopt.adaptive.calibration import Observed, calibrate, curve, observe, rankings
from vitopt.adaptive.passes import Passes
from vitopt.adaptive_spec import TargetSpec
from vitopt.data.images import ImageSet, open_images
from vitopt.data.labels import fit_labels
from vitopt.errors import DataError, UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model
from vitopt.recipe import DataSpec, RunSpec


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return fit_labels(open_images(DataSpec(source=str(shapes)), "train"), list(CLASSES))


def synthetic(count: int, seed: int = 0) -> Observed:
    """Two classes; the second pass is right, the first is the more often wrong the smaller its margin."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    margins = rng.exponential(2, count)
    wrong = rng.random(count) < 0.3 * np.exp(-2 * margins)
    signs = np.where((labels == 1) ^ wrong, 1, -1)
    first = np.stack([-signs * margins / 2, signs * margins / 2], axis=1).astype(np.float32)
    second = np.eye(2, dtype=np.float32)[labels]
    return Observed(labels, first, second, distances=rng.random(count).astype(np.float32))


@pytest.mark.parametrize("batch_size", [32, 5])
def test_what_is_observed_is_what_both_models_compute(
    passes_of: Callable[..., Passes], small: Checkpoint, tiny_checkpoint: Path, images: ImageSet, batch_size: int
) -> None:
    passes = passes_of(small, watched=True)
    found = observe(passes, images, batch_size)
    models = load_model(small), load_model(passes.second.checkpoint)
    pixels = torch.stack([passes.second.preprocess(images.image(index)) for index in range(len(images))])
    with torch.inference_mode():
        outputs = [
            model(pixel_values=taken, output_hidden_states=True)
            for model, taken in zip(models, (passes.pixels(pixels), pixels), strict=True)
        ]
        ends = [
            model.vit.layernorm(output.hidden_states[-1])[:, 0] for model, output in zip(models, outputs, strict=True)
        ]
    assert found.labels.tolist() == list(images.labels)
    assert np.allclose(found.first, outputs[0].logits, atol=1e-4)
    assert np.allclose(found.second, outputs[1].logits, atol=1e-4)
    assert found.steps is not None and found.distances is not None and len(found.steps) == len(images)
    assert np.allclose(found.distances, (ends[0] - ends[1]).norm(dim=1), atol=1e-4)


def test_an_engine_tells_logits_alone(
    passes_of: Callable[..., Passes], small: Checkpoint, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = observe(passes_of(small, RunSpec(engine="onnxruntime")), images)
    assert found.steps is None and found.distances is None
    assert found.proxies == ["margin", "entropy", "probability"]
    with pytest.raises(UnsupportedError, match="class_token"):
        calibrate(found, TargetSpec(escalation_rate=0.5, proxy="class_token"))


def test_one_image_of_a_group_counts(passes_of: Callable[..., Passes], small: Checkpoint, images: ImageSet) -> None:
    grouped = replace(images, groups=tuple(str(index // 4) for index in range(len(images))))
    assert len(observe(passes_of(small), grouped).labels) == len(images) / 4


def test_a_rate_is_met_on_other_images() -> None:
    rule, promise = calibrate(synthetic(2000), TargetSpec(escalation_rate=0.2))
    other = synthetic(4000, seed=1)
    assert rule.threshold is not None
    assert np.mean(other.scores(rule.proxy, rule.temperature) < rule.threshold) == pytest.approx(0.2, abs=0.03)
    assert "20" in promise and "2,000" in promise


def test_a_loss_is_kept_on_other_images() -> None:
    rule, promise = calibrate(synthetic(8000), TargetSpec(max_top1_loss=2))
    other = synthetic(40_000, seed=1)
    assert rule.threshold is not None
    taken = other.scores(rule.proxy, rule.temperature) >= rule.threshold
    assert 0.01 < np.mean(other.lost & taken) < 0.02 and 0.3 < taken.mean() < 0.95
    assert "2 points" in promise and "95 %" in promise and "6,000" in promise


def test_too_few_images_for_a_promise_escalate_all_and_say_how_many_it_takes() -> None:
    rule, promise = calibrate(synthetic(400), TargetSpec(max_top1_loss=0.5))
    assert rule.threshold is None and "all images" in promise and "798" in promise
    with pytest.raises(DataError, match="too few"):
        calibrate(synthetic(7), TargetSpec(max_top1_loss=0.5))


def test_a_loss_that_is_everywhere_escalates_all() -> None:
    observed = synthetic(4000)
    wrong = Observed(observed.labels, -observed.second, observed.second)
    rule, promise = calibrate(wrong, TargetSpec(max_top1_loss=0.5))
    assert rule.threshold is None and "no smaller share" in promise


def test_the_proxy_that_finds_the_changed_images_is_taken() -> None:
    observed = synthetic(2000)
    steps = np.where(observed.changed, 2.0, 1.0).astype(np.float32)
    knowing = replace(observed, steps=steps, distances=steps)
    assert calibrate(knowing, TargetSpec(escalation_rate=0.1))[0].proxy == "class_token"
    assert calibrate(knowing, TargetSpec(escalation_rate=0.1, proxy="entropy"))[0].proxy == "entropy"
    table = {row.proxy: row for row in rankings(knowing, 1.0)}
    assert table["class_token"].auroc_changed == 1 and table["class_token"].spearman == pytest.approx(1)
    assert table["margin"].auroc_changed is not None and 0.6 < table["margin"].auroc_changed < 1


def test_the_curve_goes_from_the_first_pass_to_the_second() -> None:
    observed = synthetic(1000)
    points = curve(observed, calibrate(observed, TargetSpec(escalation_rate=0.1))[0])
    assert points[0].top1_percent == pytest.approx(100 * observed.first_right.mean())
    assert (points[-1].escalated_percent, points[-1].top1_percent, points[-1].lost_percent) == (100, 100, 0)
    shares = [point.escalated_percent for point in points]
    assert shares == sorted(shares) and shares[10] == pytest.approx(50, abs=1)
