"""Which checkpoints are made to be measured together, and where they see the images."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitopt import inference
from vitopt.data.images import ImageSet, open_images
from vitopt.environment import cluster
from vitopt.errors import BadImageError
from vitopt.evaluate_spec import LatencySpec
from vitopt.inference import Candidate, measure
from vitopt.measure.evaluator import Measured
from vitopt.models.checkpoint import open_checkpoint
from vitopt.recipe import DataSpec, EvaluateSpec, VariantSpec


def test_variants_share_a_checkpoint_unless_an_engine_compiles_their_options_in(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        inference, "make", lambda checkpoint, variant, output, *_, **__: asked.append(variant.name) or output.mkdir()
    )
    variants = [
        VariantSpec(name="torch", format="fp32"),
        VariantSpec(name="fused", format="fp32", fuse_qkv=True),
        VariantSpec(name="file", format="fp32", engine="aoti"),
        VariantSpec(name="file-fused", format="fp32", engine="aoti", fuse_qkv=True),
        VariantSpec(name="file-again", format="fp32", engine="aoti"),
    ]
    made = list(inference.made(open_checkpoint(str(tiny_checkpoint)), variants, tmp_path, "cpu"))
    assert asked == ["torch", "file", "file-fused"]
    assert made[0].source == made[1].source and made[2].source == made[4].source != made[3].source


QUICK = EvaluateSpec(
    batch_size=4,
    latency=LatencySpec(batch_sizes=(1,), iterations=2, rounds=2, warmup_seconds=0),
    end_to_end=False,
    look_alikes=False,
)


@pytest.fixture
def two(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """The tiny checkpoint in fp32 and in bf16, which see the images in parts of 7."""
    monkeypatch.setattr(inference, "IMAGES_PER_PART", 7)
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    variants = [VariantSpec(name="fp32", format="fp32"), VariantSpec(name="bf16", format="bf16")]
    return list(inference.made(checkpoint, variants, tmp_path, "cpu"))


@pytest.fixture
def in_other_processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for Ray: what goes to a process and comes back is packed; parts are ready in another order."""
    asked: list[str] = []

    def answers(make: Callable[[], Any], items: Sequence[str], device: str) -> Iterator[Any]:
        actor = cluster._Actor(pickle.loads(pickle.dumps(make)))  # noqa: S301
        for item in reversed(items):
            asked.append(item)
            (answer,) = actor({"item": np.array([item])})["answer"]
            if isinstance(answer, Exception):
                raise answer
            yield pickle.loads(pickle.dumps(answer))  # noqa: S301

    monkeypatch.setattr(inference, "answers_of_cluster", answers)
    return asked


def require_same(found: Sequence[Measured], expected: Sequence[Measured]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.predictions is not None and other.predictions is not None
        assert one.predictions.ids == other.predictions.ids
        np.testing.assert_array_equal(one.predictions.labels, other.predictions.labels)
        np.testing.assert_allclose(one.predictions.logits, other.predictions.logits, rtol=1e-4, atol=1e-5)
        assert one.record.latency and one.record.dataset == other.record.dataset
        assert one.record.accuracy is not None and other.record.accuracy is not None
        assert one.record.accuracy.top1_percent == other.record.accuracy.top1_percent
        assert any("Ray" in warning for warning in one.record.warnings)
    versus, other_versus = found[1].record.versus_baseline, expected[1].record.versus_baseline
    assert versus is not None and other_versus is not None
    assert versus.agreement_percent == other_versus.agreement_percent


def test_other_processes_give_the_accuracy_of_this_one(
    two: list[Candidate], shapes: Path, in_other_processes: list[str]
) -> None:
    images = open_images(DataSpec(source=str(shapes)), "test")
    options: dict[str, Any] = {"images": images, "baseline": "fp32", "device": "cpu", "untrained": True}
    expected = measure(two, QUICK, **options)
    assert not in_other_processes
    require_same(measure(two, QUICK, **options, ray=True), expected)
    assert sorted(in_other_processes) == ["0", "1", "2", "3"]  # 24 images, 7 in a part at most


@pytest.fixture
def with_bad(shapes: Path, copy_of: Callable[[Path], Path]) -> ImageSet:
    """The test images of `shapes`, of which two are broken."""
    folder = copy_of(shapes)
    for name in ("circle/02.png", "stripe/05.png"):
        (folder / "test" / name).write_bytes(b"broken")
    return open_images(DataSpec(source=str(folder)), "test")


def test_other_processes_tell_of_images_that_cannot_be_decoded(
    two: list[Candidate], with_bad: ImageSet, in_other_processes: list[str]
) -> None:
    with pytest.raises(BadImageError, match=r"stripe/05|circle/02"):
        measure(two, QUICK, images=with_bad, device="cpu", untrained=True, ray=True)
    for one in measure(two, QUICK, images=with_bad, device="cpu", untrained=True, skip_bad=True, ray=True):
        assert one.record.dataset is not None and one.record.accuracy is not None
        assert (one.record.dataset.skipped, one.record.accuracy.images) == (("circle/02.png", "stripe/05.png"), 22)


def test_ray_gives_the_accuracy_of_this_process(two: list[Candidate], shapes: Path) -> None:
    ray = pytest.importorskip("ray")
    images = open_images(DataSpec(source=str(shapes)), "test")
    options: dict[str, Any] = {"images": images, "baseline": "fp32", "device": "cpu", "untrained": True}
    require_same(measure(two, QUICK, **options, ray=True), measure(two, QUICK, **options))
    assert not ray.is_initialized()  # nothing of it runs beside what is timed
