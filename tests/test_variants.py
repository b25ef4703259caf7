"""How the checkpoints of variants come about: steps that are shared, and formats that are measured."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import calibration_hashes

from vitopt import checks, pipeline, storage
from vitopt.data.images import ImageSet, open_images
from vitopt.errors import DataError, UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint, save_checkpoint
from vitopt.pipeline import RunResult
from vitopt.recipe import DataSpec, FinetuneSpec, Recipe
from vitopt.stages import RunFolder
from vitopt.steps import STEPS
from vitopt.training import finetune as training
from vitopt.transformation import note_images
from vitopt.variants import Settled, VariantMaker

FIRST, SECOND = {"finetune": {"method": "full", "epochs": 1, "batch_size": 8}}, {"finetune": {"epochs": 2}}


def recipe(model: Path, data: Path, *variants: dict[str, Any]) -> Recipe:
    content = {
        "name": "r",
        "model": str(model),
        "data": str(data),
        "device": "cpu",
        "variants": [{"name": "fp32", "format": "fp32"}, *variants],
        "evaluate": {"latency": {"iterations": 8, "rounds": 4, "warmup_seconds": 0}, "end_to_end": False},
    }
    return Recipe.model_validate(content)


def variant(name: str, *steps: Any, **changes: Any) -> dict[str, Any]:
    return {"name": name, "format": "bf16", "steps": list(steps)} | changes


class FakeTraining:
    """Stands in for fine-tuning: writes the same model with its weights scaled, and notes what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, int, int]] = []
        self.error: Exception | None = None
        self.label_names: list[str] | None = None

    def __call__(
        self,
        checkpoint: Checkpoint,
        spec: Any,
        output: Path,
        device: str,
        *,
        images: ImageSet | None,
        seed: int,
        **_: Any,
    ) -> "FakeTraining":
        self.calls.append((checkpoint.source, spec, 0 if images is None else len(images), seed))
        if self.error is not None:
            raise self.error
        model = load_model(checkpoint, label_names=self.label_names)
        model.get_submodule("classifier").weight.data.mul_(1 + spec.epochs)
        with storage.staged_folder(output) as folder:
            save_checkpoint(model, load_processor(checkpoint), folder)
            note_images(checkpoint, images, "training", folder)
        return self

    def summary(self) -> str:
        return "trained"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(training, "finetune", fake)
    return fake


def make(asked: Recipe, folder: Path) -> tuple[list[Settled], list[str | None], list[str]]:
    """Settle and make all variants; what is said."""
    said: list[str] = []
    assert asked.data is not None
    with storage.claimed(folder):
        maker = VariantMaker(RunFolder(folder, said.append), asked, checks.tested_images(asked, asked.data))
        base = maker.finetuned(open_checkpoint(asked.model))
        settled = [maker.settle(variant, base) for variant in asked.variants]
        return settled, [maker.make(one) for one in settled], said


def test_the_base_that_teaches_is_the_one_that_the_steps_start_from(
    fake: FakeTraining, tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    taught = variant("a", FIRST, {"finetune": {"teacher": "base"}})
    content = recipe(tiny_checkpoint, shapes, taught).model_dump(mode="json", exclude_unset=True)
    asked = Recipe.model_validate(content | {"finetune": {"epochs": 3}})
    assert make(asked, tmp_path / "run")[1] == [None, None]
    assert [call[1].teacher for call in fake.calls] == [None, None, str(tmp_path / "run" / "finetune")]
    make(asked, tmp_path / "run")
    assert len(fake.calls) == 3
    # A base that is another one teaches anew, although its place and the settings are the same.
    again = asked.model_copy(update={"finetune": FinetuneSpec(epochs=4)})
    make(again, tmp_path / "run")
    assert len(fake.calls) == 6


def test_another_teacher_at_the_same_place_makes_a_step_again(
    fake: FakeTraining, tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    teacher = copy_of(tiny_checkpoint)
    asked = recipe(tiny_checkpoint, shapes, variant("a", {"finetune": {"teacher": str(teacher)}}))
    for calls in (1, 1):
        make(asked, tmp_path / "run")
        assert len(fake.calls) == calls
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.1}))
    make(asked, tmp_path / "run")
    assert len(fake.calls) == 2


def test_variants_with_the_same_first_steps_share_them(
    fake: FakeTraining, tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    asked = recipe(tiny_checkpoint, shapes, variant("a", FIRST), variant("b", FIRST, SECOND), variant("c", SECOND))
    settled, failures, said = make(asked, tmp_path / "run")
    assert failures == [None] * 4
    first, second = asked.variants[2].step_names
    (alone,) = asked.variants[3].step_names
    made = tmp_path / "run" / "steps"
    assert {path.name for path in made.iterdir()} == {first, second, alone}
    assert [(source, spec.epochs, count) for source, spec, count, _ in fake.calls] == [
        (str(tiny_checkpoint), 1, 32),
        (str(made / first), 2, 32),
        (str(tiny_checkpoint), 2, 32),
    ]
    assert [one.base.source for one in settled] == [
        str(tiny_checkpoint),
        *(str(made / n) for n in (first, second, alone)),
    ]
    assert said[:2] == [f"steps/{first}: full on 32 images of {shapes}", f"steps/{first}: trained"]
    trained = set(open_images(DataSpec(source=str(shapes)), "train").image_hashes)
    seen = [calibration_hashes(tmp_path / "run" / "variants" / name) for name in ("fp32", "a", "b", "c")]
    assert seen == [set(), trained, trained, trained]

    fake.calls.clear()
    _, _, again = make(asked, tmp_path / "run")
    assert fake.calls == [] and all(line.endswith("up to date, skipped") for line in again)
    _, _, changed = make(asked.model_copy(update={"seed": 1}), tmp_path / "run")
    assert [seed for *_, seed in fake.calls] == [1, 1, 1]
    assert "variant fp32: up to date, skipped" in changed


def test_a_step_that_fails_is_tried_once_and_fails_its_variants_alone(
    fake: FakeTraining, tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    asked = recipe(tiny_checkpoint, shapes, variant("a", FIRST), variant("b", FIRST, SECOND))
    make(asked, tmp_path / "run")
    fake.calls.clear()
    fake.error = UnsupportedError("not here")
    _, failures, _ = make(asked.model_copy(update={"seed": 1}), tmp_path / "run")
    assert len(fake.calls) == 1
    assert failures[0] is None and all("not here" in str(reason) for reason in failures[1:])
    assert not (tmp_path / "run" / "variants" / "a").exists()  # that of the other seed
    assert (tmp_path / "run" / "variants" / "fp32" / "model.safetensors").is_file()


def test_a_result_with_other_classes_is_refused(
    fake: FakeTraining, tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    fake.label_names = ["circle", "square"]
    with pytest.raises(DataError, match="cross"):
        make(recipe(tiny_checkpoint, shapes, variant("a", FIRST)), tmp_path / "run")


def test_a_step_without_images_gets_none(
    fake: FakeTraining, tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STEPS, "finetune", dataclasses.replace(STEPS["finetune"], images=None))
    asked = recipe(tiny_checkpoint, shapes, variant("a", FIRST))
    make(asked, tmp_path / "run")
    assert [count for _, _, count, _ in fake.calls] == [0]
    assert calibration_hashes(tmp_path / "run" / "variants" / "a") == set()


def test_what_is_left_open_is_chosen_on_the_checkpoint_after_the_steps(
    fake: FakeTraining, tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    auto = {"max_top1_drop": None, "max_kl_share": 0.9, "images": 16}
    asked = recipe(tiny_checkpoint, shapes, variant("a", FIRST, format="nf4", skip="auto", auto=auto))
    (_, settled), failures, _ = make(asked, tmp_path / "run")
    assert failures == [None, None] and settled.variant.skip and not settled.variant.skips_automatically
    scores = json.loads((tmp_path / "run" / "sensitivity" / "a.json").read_text())
    assert scores["checkpoint"] == str(tmp_path / "run" / "steps" / asked.variants[1].step_names[0])


def test_a_variant_is_rounded_on_calibration_images_and_no_other_variant_stands_for_it(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    rounding = {"images": 12}
    asked = recipe(tiny_checkpoint, shapes, variant("a", format="w8a8"), variant("b", format="w8a8", rounding=rounding))
    _, failures, said = make(asked, tmp_path / "run")
    assert failures == [None] * 3 and not any("the same weights" in line for line in said)
    train = open_images(DataSpec(source=str(shapes)), "train")
    assert calibration_hashes(tmp_path / "run" / "variants" / "b") == set(train.limited(12).image_hashes)
    weights = [(tmp_path / "run" / "variants" / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] != weights[1]
    _, _, again = make(asked, tmp_path / "run")
    assert all("up to date" in line for line in again), again


# A whole run


@pytest.fixture(scope="module")
def finished(
    tiny_checkpoint: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, RunResult, list[str]]:
    """Fine-tuned on its own, and in the format that is fastest here."""
    fastest = {"min_agreement": 50, "compile": False, "images": 16}
    asked = recipe(
        tiny_checkpoint,
        shapes,
        variant("tuned", FIRST, format="w8a8"),
        variant("fastest", format="auto", fastest=fastest),
    )
    said: list[str] = []
    return asked, pipeline.run(asked, tmp_path_factory.mktemp("runs") / "r", said.append), said


def test_the_record_tells_the_steps(finished: tuple[Recipe, RunResult, list[str]]) -> None:
    _, result, _ = finished
    reference, tuned, _ = result.records
    assert reference.variant.steps == () and tuned.failure is None
    (step,) = tuned.variant.steps
    assert step["finetune"]["method"] == "full" and step["finetune"]["epochs"] == 1
    assert [record.variant.name for record in result.records] == ["fp32", "tuned", "fastest"]
    assert result.report is not None and (result.folder / "variants" / "tuned" / "README.md").is_file()


def test_the_record_tells_the_format_that_was_chosen_and_why(
    finished: tuple[Recipe, RunResult, list[str]], shapes: Path
) -> None:
    _, result, said = finished
    record = result.records[2]
    choice = json.loads((result.folder / "formats" / "fastest.json").read_text())
    assert record.failure is None and record.variant.chosen is not None
    assert f"format fastest: {record.variant.chosen}" in said
    assert record.variant.format == choice["variant"]["format"] in ("fp32", "bf16", "w8a8")
    assert [one["variant"]["name"] for one in choice["records"]] == ["fp32", "bf16", "w8a8"]
    assert {one["dataset"]["split"] for one in choice["records"]} == {"train"}
    chosen_on = set(open_images(DataSpec(source=str(shapes), limit=16), "train").image_hashes)
    assert calibration_hashes(result.folder / "variants" / "fastest") == chosen_on


def test_a_finished_run_stands_until_a_choice_is_spoiled(
    finished: tuple[Recipe, RunResult, list[str]], copy_of: Callable[[Path], Path]
) -> None:
    asked, result, _ = finished
    folder, said = copy_of(result.folder), []
    pipeline.run(asked, folder, said.append)
    (told,) = [line for line in said if not line.endswith("up to date, skipped")]
    assert told == f"format fastest: {result.records[2].variant.chosen}"
    path = folder / "formats" / "fastest.json"
    path.write_text("x" + path.read_text()[1:])
    said.clear()
    pipeline.run(asked, folder, said.append)
    assert any(line.startswith("format fastest: again, because ") and str(path) in line for line in said)


def test_a_failed_step_has_a_row_with_what_was_asked(
    fake: FakeTraining, tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    fake.error = UnsupportedError("not here")
    fastest = variant("a", FIRST, format="auto", fastest={"min_agreement": 50})
    result = pipeline.run(recipe(tiny_checkpoint, shapes, fastest), tmp_path / "run")
    reference, failed = result.records
    assert reference.failure is None and "not here" in str(failed.failure)
    assert failed.variant.format == "auto" and failed.variant.chosen is None
    assert [list(step) for step in failed.variant.steps] == [["finetune"]]
    assert "not here" in (result.folder / "report.md").read_text()
