"""Distillation: the loss by hand in float64, what a teacher is shown, and what its logits leave of the labels."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from vitopt.data.images import ImageSet, open_images
from vitopt.data.pixels import Augmentation, Preprocessor, random_pixels
from vitopt.errors import CheckpointError, RecipeError, StorageError
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint
from vitopt.models.origin import load_origin
from vitopt.optimize.quantize import quantize
from vitopt.recipe import DataSpec, FinetuneSpec, VariantSpec
from vitopt.training import finetune as training
from vitopt.training.finetune import finetune
from vitopt.training.teacher import distillation_loss, load_teacher

CPU = torch.device("cpu")
SHORT = {"epochs": 1, "batch_size": 8, "precision": "fp32"}


@pytest.fixture(scope="module")
def student(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Another model of the same classes."""
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("teacher") / "teacher-vit", seed=1)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_that_of_its_formula(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (2, 5, 7))
    expected = 0.0
    for learned, taught in zip(student, teacher, strict=True):
        q, p = (np.exp(row / temperature) / np.exp(row / temperature).sum() for row in (learned, taught))
        expected += temperature**2 * sum(p[k] * (math.log(p[k]) - math.log(q[k])) for k in range(7)) / 5
    loss = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(torch.from_numpy(teacher), torch.from_numpy(teacher), temperature)) < 1e-6


def divergence(folder: Path, teacher: Checkpoint, images: ImageSet) -> float:
    """Mean KL of a checkpoint's answers from the teacher's."""
    preprocess = Preprocessor(load_processor(teacher))
    pixels = torch.stack([preprocess(images.image(index)) for index in range(len(images))])
    with torch.inference_mode():
        learned = load_model(open_checkpoint(str(folder)))(pixels).logits
        return float(distillation_loss(learned, load_model(teacher)(pixels).logits, 1.0))


def test_a_student_comes_nearer_to_its_teacher(
    student: Checkpoint, teacher: Checkpoint, train: ImageSet, tmp_path: Path
) -> None:
    spec = FinetuneSpec(
        method="full",
        teacher=teacher.source,
        teacher_weight=1,
        **SHORT | {"epochs": 8},  # type: ignore[arg-type]
        augment=False,
    )
    finetune(student, spec, tmp_path / "out", "cpu", images=train)
    assert student.folder is not None
    assert divergence(tmp_path / "out", teacher, train) < 0.3 * divergence(student.folder, teacher, train)


def test_without_labels_other_labels_change_nothing(
    student: Checkpoint,
    teacher: Checkpoint,
    train: ImageSet,
    shapes: Path,
    copy_of: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    folder = copy_of(shapes)
    for name in ("circle", "cross", "square", "stripe"):
        (folder / "train" / name).rename(folder / "train" / f"what-{name}")
    unknown = open_images(DataSpec(source=str(folder)), "train")
    written = {}
    for weight in (1, 0.5):
        spec = FinetuneSpec(teacher=teacher.source, teacher_weight=weight, **SHORT)  # type: ignore[arg-type]
        finetune(student, spec, tmp_path / f"{weight}", "cpu", images=train)
        written[weight] = load_file(tmp_path / f"{weight}" / "model.safetensors")
    spec = FinetuneSpec(teacher=teacher.source, teacher_weight=1, **SHORT)  # type: ignore[arg-type]
    test = open_images(DataSpec(source=str(folder)), "test")
    report = finetune(student, spec, tmp_path / "unknown", "cpu", images=unknown, test=test)
    same = load_file(tmp_path / "unknown" / "model.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in written[1].items())
    assert not all(torch.equal(same[name], tensor) for name, tensor in written[0.5].items())
    assert open_checkpoint(str(tmp_path / "unknown")).label_names == teacher.label_names
    assert report.test_top1_percent is not None  # the test split's classes are still known


def test_a_teacher_sees_the_same_crops_in_its_own_size(
    student: Checkpoint, train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops: list[Image.Image] = []
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []
    augment, load = Augmentation.__call__, training.load_teacher

    def kept(self: Augmentation, image: Image.Image) -> Image.Image:
        crops.append(augment(self, image))
        return crops[-1]

    def watched(*arguments: object) -> object:
        teacher = load(*arguments)  # type: ignore[arg-type]
        forward = teacher.model.forward
        monkeypatch.setattr(
            teacher.model, "forward", lambda **inputs: shown.append(inputs["pixel_values"]) or forward(**inputs)
        )
        return teacher

    monkeypatch.setattr(Augmentation, "__call__", kept)
    monkeypatch.setattr(training, "load_teacher", watched)
    spec = FinetuneSpec(teacher="base", image_size=16, **SHORT | {"epochs": 0.25})  # type: ignore[arg-type]
    finetune(student, spec, tmp_path / "out", "cpu", images=train)
    processor = load_processor(student)
    expected = torch.cat([processor(crop, return_tensors="pt")["pixel_values"] for crop in crops[:8]])
    torch.testing.assert_close(shown[0], expected)
    assert shown[0].shape == (8, 3, 32, 32)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.image_size == 16


def test_a_teacher_of_the_same_preprocessing_takes_the_pixels_of_the_student(
    student: Checkpoint, teacher: Checkpoint
) -> None:
    own = Preprocessor(load_processor(student))
    assert load_teacher(teacher, student.label_names, own, CPU, torch.float32).preprocess is None


def test_classes_in_another_order_are_matched_by_name(student: Checkpoint, teacher: Checkpoint) -> None:
    names = ["stripe", "circle", "square", "cross"]
    loaded = load_teacher(teacher, names, Preprocessor(load_processor(student)), CPU, torch.float32)
    pixels = random_pixels(3, (32, 32))
    with torch.inference_mode():
        plain = load_model(teacher)(pixels).logits
    for place, name in enumerate(names):
        torch.testing.assert_close(loaded(pixels)[:, place], plain[:, teacher.label_names.index(name)])


def test_a_quantized_checkpoint_can_teach(student: Checkpoint, train: ImageSet, tmp_path: Path) -> None:
    quantize(student, VariantSpec(name="v", format="nf4"), tmp_path / "nf4", "cpu")
    spec = FinetuneSpec(teacher=str(tmp_path / "nf4"), **SHORT | {"epochs": 0.25})  # type: ignore[arg-type]
    assert finetune(student, spec, tmp_path / "out", "cpu", images=train).steps == 1


def test_a_teacher_of_other_classes_is_refused(
    student: Checkpoint, train: ImageSet, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    assert student.folder is not None
    other = copy_of(student.folder)
    text = (other / "config.json").read_text()
    (other / "config.json").write_text(text.replace("stripe", "line"))
    spec = FinetuneSpec(teacher=str(other), **SHORT)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"tiny-vit has other classes .*first: stripe"):
        finetune(student, spec, tmp_path / "out", "cpu", images=train)
    with pytest.raises(CheckpointError, match="nowhere"):
        finetune(student, spec.model_copy(update={"teacher": "./nowhere"}), tmp_path / "out", "cpu", images=train)
    assert not (tmp_path / "out").exists()


def test_another_teacher_never_resumes(
    student: Checkpoint,
    teacher: Checkpoint,
    train: ImageSet,
    copy_of: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert teacher.folder is not None
    folder = copy_of(teacher.folder)
    spec = FinetuneSpec(teacher=str(folder), **SHORT)  # type: ignore[arg-type]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", full)
        with pytest.raises(StorageError):
            finetune(student, spec, tmp_path / "out", "cpu", images=train)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.1}))
    assert finetune(student, spec, tmp_path / "out", "cpu", images=train).resumed_from_step == 0


def test_what_the_teacher_was_and_saw_is_noted(
    student: Checkpoint, teacher: Checkpoint, train: ImageSet, shapes: Path, tmp_path: Path
) -> None:
    others = open_images(DataSpec(source=str(shapes)), "test")
    spec = FinetuneSpec(**SHORT | {"epochs": 0.25})  # type: ignore[arg-type]
    finetune(teacher, spec, tmp_path / "taught", "cpu", images=others)
    spec = spec.model_copy(update={"teacher": str(tmp_path / "taught"), "temperature": 3.0})
    finetune(student, spec, tmp_path / "out", "cpu", images=train)
    noted = load_origin(tmp_path / "out").last("finetune")
    assert noted is not None
    assert (noted["teacher"], noted["temperature"], noted["teacher_weight"]) == ("taught", 3, 0.5)
    assert noted["teacher_sha256"] == open_checkpoint(str(tmp_path / "taught")).fingerprint()
    assert str(tmp_path) not in json.dumps(noted)
    seen = {content for use in load_uses(tmp_path / "out") for content in use.image_sha256}
    assert seen == {*train.image_hashes, *others.image_hashes}
    with pytest.raises(StorageError):  # a teacher is not written over
        finetune(student, spec, tmp_path / "taught", "cpu", images=train)


def test_sets_of_labels_have_no_teacher_beside_them(student: Checkpoint, train: ImageSet, tmp_path: Path) -> None:
    sets = replace(train, label_sets=tuple(frozenset({label}) for label in train.labels))
    spec = FinetuneSpec(teacher="base", **SHORT | {"epochs": 0.25})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="sets of labels"):
        finetune(student, spec, tmp_path / "out", "cpu", images=sets)
    alone = spec.model_copy(update={"teacher_weight": 1.0})
    assert finetune(student, alone, tmp_path / "out", "cpu", images=sets).steps == 1


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"temperature": 3}, "`temperature`"),
        ({"teacher_weight": 1}, "`teacher_weight`"),
        ({"teacher": "base", "teacher_weight": 1, "label_smoothing": 0.1}, "`label_smoothing`"),
        ({"teacher": "base", "teacher_weight": 0}, "greater than 0"),
    ],
)
def test_keys_without_an_effect_are_refused(keys: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        FinetuneSpec.model_validate(keys)
