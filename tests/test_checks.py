"""What is refused before the first long stage, for the images and classes of a recipe."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vitopt import checks
from vitopt.checks import plans, require_images, step_images
from vitopt.errors import DataError, RecipeError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.recipe import CalibrationSpec, DataSpec, FinetuneSpec, Recipe
from vitopt.steps import StepKind


def recipe(model: Path, data: Path, *variants: dict[str, Any], **changes: Any) -> Recipe:
    reference = {"name": "fp32", "format": "fp32"}
    content = {"name": "r", "model": str(model), "data": str(data), "variants": [reference, *variants]}
    return Recipe.model_validate(content | changes)


def require(asked: Recipe) -> None:
    assert asked.data is not None
    require_images(asked, open_checkpoint(asked.model), asked.data, checks.tested_images(asked, asked.data))


TUNED = {"name": "tuned", "format": "fp32", "steps": ["finetune"]}


def test_targets_of_a_step_are_told_with_their_place(tiny_checkpoint: Path, shapes: Path) -> None:
    step = {"finetune": {"targets": ["query", "dense"]}}
    with pytest.raises(RecipeError, match=r"variants\.1\.steps\.0\.finetune\.targets: .*'dense'"):
        plans(recipe(tiny_checkpoint, shapes, {"name": "tuned", "format": "nf4", "steps": [step]}))


def test_an_image_size_that_the_model_cannot_have_is_told_with_its_place(tiny_checkpoint: Path, shapes: Path) -> None:
    step = {"finetune": {"image_size": 20}}
    with pytest.raises(RecipeError, match=r"variants\.1\.steps\.0\.finetune: `image_size` 20 .*16 or 24"):
        plans(recipe(tiny_checkpoint, shapes, {"name": "small", "format": "fp32", "steps": [step]}))


def test_a_teacher_that_is_not_there_is_told_with_its_place(tiny_checkpoint: Path, shapes: Path) -> None:
    step = {"finetune": {"teacher": "./nowhere"}}
    with pytest.raises(RecipeError, match=r"variants\.1\.steps\.0\.finetune\.teacher: .*nowhere"):
        plans(recipe(tiny_checkpoint, shapes, {"name": "taught", "format": "fp32", "steps": [step]}))


def test_a_format_that_is_yet_to_be_chosen_has_no_plan(tiny_checkpoint: Path, shapes: Path) -> None:
    assert list(plans(recipe(tiny_checkpoint, shapes, {"name": "fastest", "format": "auto"}))) == ["fp32"]


def test_a_step_that_gives_one_variant_other_classes_is_refused(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path]
) -> None:
    require(recipe(tiny_checkpoint, shapes, TUNED))
    folder = copy_of(shapes)
    shutil.rmtree(folder / "train" / "cross")
    shutil.rmtree(folder / "test" / "cross")
    with pytest.raises(DataError, match=r"fp32 and tuned .*different classes"):
        require(recipe(tiny_checkpoint, folder, TUNED))
    require(recipe(tiny_checkpoint, folder, TUNED, finetune={}))


def test_a_teacher_that_teaches_alone_gives_its_classes(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(shapes)
    shutil.rmtree(folder / "train" / "cross")
    for teacher in ("base", str(tiny_checkpoint)):
        alone = {"finetune": {"teacher": teacher, "teacher_weight": 1}}
        require(recipe(tiny_checkpoint, folder, TUNED | {"steps": [alone]}))
        beside = {"finetune": {"teacher": teacher}}
        with pytest.raises(DataError, match="'cross'"):
            require(recipe(tiny_checkpoint, folder, TUNED | {"steps": [beside]}))


def test_tested_classes_that_a_step_does_not_train_are_refused(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(shapes)
    (folder / "train" / "cross").rename(folder / "train" / "plus")
    with pytest.raises(DataError, match="'cross'"):
        require(recipe(tiny_checkpoint, folder, TUNED))


def test_tested_images_that_train_are_warned_of_once(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_of(shapes)
    shutil.copy(folder / "train" / "circle" / "00.png", folder / "test" / "circle" / "again.png")
    other = {"name": "other", "format": "fp32", "steps": [{"finetune": {"epochs": 1}}]}
    with caplog.at_level(logging.WARNING):
        require(recipe(tiny_checkpoint, folder, TUNED, other))
    assert [line for line in caplog.messages if "also training images" in line] == [
        "1 test images are also training images; accuracy will look better than it is"
    ]


@pytest.mark.parametrize(
    "choosing",
    [
        {"format": "auto", "fastest": {"split": "test", "min_agreement": 10}},
        {"format": "nf4", "skip": "auto", "auto": {"split": "test"}},
    ],
)
def test_tested_images_choose_nothing(choosing: dict[str, Any], tiny_checkpoint: Path, shapes: Path) -> None:
    with pytest.raises(DataError, match="calibration images are also test images"):
        require(recipe(tiny_checkpoint, shapes, {"name": "a"} | choosing))


def test_too_few_images_to_choose_a_format_are_refused(tiny_checkpoint: Path, shapes: Path) -> None:
    with pytest.raises(RecipeError, match="32 images cannot show"):
        require(recipe(tiny_checkpoint, shapes, {"name": "fastest", "format": "auto"}))


@dataclass
class OtherStep:
    """A step of a kind that is not built."""

    kind: StepKind
    settings: CalibrationSpec | FinetuneSpec


def test_a_step_gets_the_images_that_its_kind_wants(shapes: Path) -> None:
    data, few = DataSpec(source=str(shapes), limit=4), CalibrationSpec(images=8)

    def images(wanted: Any) -> Any:
        return step_images(data, OtherStep(StepKind(CalibrationSpec, "", wanted), few))  # type: ignore[arg-type]

    assert images(None) is None
    assert (len(images("calibration")), images("calibration").split) == (8, "train")
    assert len(images("training")) == 32


def test_tokens_that_cannot_leave_are_told_with_all_other_mistakes(tiny_checkpoint: Path, shapes: Path) -> None:
    variants = [
        {"name": "many", "format": "bf16", "merge_tokens": "9@0"},
        {"name": "last", "format": "bf16", "prune_tokens": "4@2"},
        {"name": "fits", "format": "bf16", "merge_tokens": "8@0"},
    ]
    with pytest.raises(RecipeError) as caught:
        plans(recipe(tiny_checkpoint, shapes, *variants))
    many, last = str(caught.value).splitlines()
    assert "variant many" in many and "block 0" in many and "variant last" in last and "block 2" in last
