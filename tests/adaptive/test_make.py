"""An adaptive checkpoint on disk, and what refuses to be one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASSES, calibration_hashes, make_checkpoint
from transformers import AutoModelForImageClassification

from vitopt.adaptive.alone import main as alone
from vitopt.adaptive.calibrated import ADAPTIVE_FILE, load_calibrated
from vitopt.adaptive.make import at_size, make, require_low, require_untrained
from vitopt.adaptive.router import Router
from vitopt.adaptive.runtime import prepare
from vitopt.adaptive_spec import AdaptiveSpec
from vitopt.data.images import ImageSet, open_images
from vitopt.errors import CheckpointError, DataError
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.recipe import DataSpec, RunSpec, VariantSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "train")


@pytest.fixture
def made(tiny_checkpoint: Path, small: Checkpoint, images: ImageSet, tmp_path: Path) -> Path:
    spec = AdaptiveSpec(low=16, escalation_rate=0.5)
    make(small, open_checkpoint(str(tiny_checkpoint)), spec, tmp_path / "made", "cpu", images=images)
    return tmp_path / "made"


def opened(folder: Path, **options: Any) -> Any:
    return prepare(open_checkpoint(str(folder)), name="adaptive", device=CPU, **options)


def test_the_folder_is_the_second_pass_for_transformers_and_both_for_vitopt(
    made: Path, tiny_checkpoint: Path, images: ImageSet
) -> None:
    router = opened(made)
    assert isinstance(router, Router) and router.first.input_size == (16, 16)
    pixels = torch.stack([router.preprocess(images.image(index)) for index in range(len(images))])
    plain = AutoModelForImageClassification.from_pretrained(made)
    logits = router(pixels)
    with torch.inference_mode():
        whole = plain(pixel_values=pixels).logits
    assert 0.3 < router.escalated.float().mean() < 0.7
    assert torch.allclose(logits[router.escalated], whole[router.escalated], atol=1e-4)
    assert not torch.allclose(logits[~router.escalated], whole[~router.escalated], atol=1e-2)
    assert calibration_hashes(made) == set(images.image_hashes)
    assert {use.purpose for use in router.images_seen()} == {"threshold"}


def test_one_checkpoint_may_be_both_passes_run_in_two_ways(
    tiny_checkpoint: Path, images: ImageSet, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    spec = AdaptiveSpec(first={"fuse_qkv": "true"}, escalation_rate=0.5)
    make(checkpoint, checkpoint, spec, tmp_path / "made", "cpu", images=images, run=RunSpec(attention="sdpa"))
    router = opened(tmp_path / "made", run=RunSpec(patch_product=True))
    assert (router.first.run.fuse_qkv, router.second.run.fuse_qkv) == (True, False)
    assert router.first.run.patch_product and router.second.run.patch_product
    assert not (tmp_path / "made" / "first").exists()
    routing = router.describe()["routing"]
    assert routing.first_ran == {"fuse_qkv": True} and router.describe()["size"].disk_bytes is not None


def test_a_draft_of_other_pixels_answers_too(
    tiny_checkpoint: Path, draft: Checkpoint, images: ImageSet, tmp_path: Path
) -> None:
    second = open_checkpoint(str(tiny_checkpoint))
    made = make(draft, second, AdaptiveSpec(draft="d", max_top1_loss=60), tmp_path / "made", "cpu", images=images)
    assert made.distances is not None  # both are 64 wide
    assert opened(tmp_path / "made").first.checkpoint.config.num_hidden_layers == 1


def test_a_quantized_second_pass_keeps_its_format(tiny_checkpoint: Path, images: ImageSet, tmp_path: Path) -> None:
    source = open_checkpoint(str(tiny_checkpoint))
    variant = VariantSpec(name="nf4", format="nf4")
    folders = [tmp_path / "second", tmp_path / "first"]
    for checkpoint, folder in zip((source, at_size(source, 16, tmp_path / "small")), folders, strict=True):
        quantize(checkpoint, variant, folder, "cpu")
    second, first = (open_checkpoint(str(folder)) for folder in folders)
    with pytest.raises(CheckpointError, match="quantized"):
        at_size(second, 16, tmp_path / "other")
    make(first, second, AdaptiveSpec(low=16, escalation_rate=0.5), tmp_path / "made", "cpu", images=images)
    told = opened(tmp_path / "made").describe()
    assert told["variant"].format == told["routing"].first_format == "nf4"


@pytest.mark.parametrize("place", [".", "first"])
def test_a_threshold_of_another_checkpoint_is_refused(made: Path, place: str) -> None:
    weights = made / place / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()  # it is a link to another's
    weights.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=f"{'second' if place == '.' else 'first'} pass"):
        opened(made)


@pytest.mark.parametrize("text", ["{", '{"schema": "vitopt.adaptive/1"}', "[]"])
def test_a_broken_file_is_refused(made: Path, text: str) -> None:
    (made / ADAPTIVE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=ADAPTIVE_FILE):
        load_calibrated(open_checkpoint(str(made)))


@pytest.mark.parametrize(
    ("low", "told"), [(32, "not below"), (48, "not below"), (20, "patches of 8"), (4, "patches of 8")]
)
def test_resolutions_that_cannot_be_are_refused(tiny_checkpoint: Path, low: int, told: str) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    with pytest.raises(CheckpointError, match=told):
        require_low(checkpoint, low, checkpoint)


@pytest.mark.parametrize("labels", [CLASSES[:3], ("one", "two", "three", "four")])
def test_a_draft_of_other_classes_is_refused(
    tiny_checkpoint: Path, images: ImageSet, tmp_path: Path, labels: tuple[str, ...]
) -> None:
    folder = make_checkpoint(tmp_path / "draft", blocks=1)
    config = json.loads((folder / "config.json").read_text())
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config | names))
    second = open_checkpoint(str(tiny_checkpoint))
    with pytest.raises(CheckpointError, match="fine-tuned on the same data"):
        make(
            open_checkpoint(str(folder)),
            second,
            AdaptiveSpec(draft="d", escalation_rate=0.5),
            tmp_path / "made",
            "cpu",
            images=images,
        )
    assert not (tmp_path / "made").exists()


def test_memory_is_that_of_both_passes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *_, source, run, batch_size = opened(made).alone(2)
    alone(source, run, batch_size)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["peak_bytes"] > 10**6


def test_a_promise_on_images_that_trained_a_pass_is_refused_and_a_rate_warned_of(
    images: ImageSet, caplog: pytest.LogCaptureFixture
) -> None:
    trained = set(images.image_hashes[:3])
    with pytest.raises(DataError, match=r"3 of 32 calibration images .*held_out"):
        require_untrained(trained, images, AdaptiveSpec(low=16, max_top1_loss=1))
    require_untrained(trained, images, AdaptiveSpec(low=16, escalation_rate=0.1))
    assert "3 of 32" in caplog.text
    caplog.clear()
    require_untrained({"other"}, images, AdaptiveSpec(low=16, max_top1_loss=1))
    assert not caplog.text
