"""Fine-tuning of a tiny model on drawn shapes: it learns, merges, resumes, and refuses what cannot work."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, Trainer

from vitopt.data.images import ImageSet, open_images
from vitopt.data.labels import as_indices
from vitopt.data.pixels import random_pixels
from vitopt.errors import BadImageError, CheckpointError, DataError, MeasurementError, PatternError, StorageError
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.ownership import LIST_FILE
from vitopt.recipe import DataSpec, FinetuneSpec, VariantSpec
from vitopt.training import finetune as training
from vitopt.training.finetune import TrainingReport, finetune

SHORT = FinetuneSpec(epochs=2, batch_size=8, learning_rate=3e-3, rank=4)


@pytest.fixture(scope="module")
def test(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "test")


def module_names(folder: Path) -> list[str]:
    return [name for name, _ in load_model(open_checkpoint(str(folder))).named_modules()]


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture(scope="module")
def learned(
    tiny: Checkpoint, train: ImageSet, test: ImageSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, TrainingReport, torch.Tensor]:
    """A LoRA training that is long enough to learn: its folder, its report, and logits before the merge."""
    folder = tmp_path_factory.mktemp("lora")
    spec = FinetuneSpec(epochs=20, batch_size=8, learning_rate=5e-3, rank=16, flip=False, precision="fp32")
    logits = []
    evaluate = training.top1_percent

    def with_adapter(trainer: Trainer, data: Any) -> float:
        percent = evaluate(trainer, data)
        assert any("lora_A" in name for name, _ in trainer.model.named_modules())
        with torch.inference_mode():
            logits.append(trainer.model.eval()(pixel_values=random_pixels(6, (32, 32))).logits)
        return percent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "top1_percent", with_adapter)
        report = finetune(tiny, spec, folder / "out", "cpu", images=train, test=test)
    return folder / "out", report, logits[0]


def test_lora_learns(learned: tuple[Path, TrainingReport, torch.Tensor], tiny: Checkpoint, test: ImageSet) -> None:
    _, report, _ = learned
    assert report.test_top1_percent is not None and report.test_top1_percent > 60  # chance is 25
    assert report.final_loss is not None and report.final_loss < 0.7  # chance is ln 4 = 1.39


def test_reported_accuracy_is_that_of_the_merged_checkpoint(
    learned: tuple[Path, TrainingReport, torch.Tensor], test: ImageSet
) -> None:
    folder, report, _ = learned
    model = AutoModelForImageClassification.from_pretrained(folder)
    pixels = np.stack([np.asarray(test.image(index), dtype=np.float32) for index in range(len(test))])
    pixel_values = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)  # 32 x 32 needs no resizing
    with torch.inference_mode():
        guesses = model(pixel_values=pixel_values).logits.argmax(-1)
    expected = 100 * np.mean(guesses.numpy() == np.array(test.labels))
    assert report.test_top1_percent == pytest.approx(expected)


def test_the_merged_model_has_the_modules_of_the_original_and_no_adapter(
    learned: tuple[Path, TrainingReport, torch.Tensor], tiny_checkpoint: Path
) -> None:
    folder, _, _ = learned
    assert module_names(folder) == module_names(tiny_checkpoint)
    original, tuned = (load_file(f / "model.safetensors") for f in (tiny_checkpoint, folder))
    assert {name: tensor.shape for name, tensor in tuned.items()} == {n: t.shape for n, t in original.items()}
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training.json",
        "calibration.json",
        "origin.json",
        LIST_FILE,
    }
    # The low-rank updates reached the layers and nothing else but the head.
    changed = {name for name in tuned if not torch.equal(tuned[name], original[name])}
    linears = {name for name, tensor in tuned.items() if ".layer." in name and tensor.dim() == 2}
    assert changed == linears | {"classifier.weight", "classifier.bias"}
    rank = torch.linalg.matrix_rank(tuned[min(linears)] - original[min(linears)], rtol=1e-4)
    assert 1 <= rank <= 16


def test_the_merge_keeps_the_logits_of_the_adapter(learned: tuple[Path, TrainingReport, torch.Tensor]) -> None:
    folder, _, with_adapter = learned
    with torch.inference_mode():
        merged = load_model(open_checkpoint(str(folder)))(pixel_values=random_pixels(6, (32, 32))).logits
    torch.testing.assert_close(merged, with_adapter, rtol=1e-4, atol=1e-4)


def test_training_json_holds_the_report(
    learned: tuple[Path, TrainingReport, torch.Tensor], train: ImageSet, tiny_checkpoint: Path
) -> None:
    folder, report, _ = learned
    assert json.loads((folder / "training.json").read_text()) == vars(report)
    assert set(vars(report)) == {field.name for field in fields(TrainingReport)}
    assert (report.images, report.classes, report.epochs, report.steps) == (32, 4, 20, 80)
    assert report.resumed_from_step == 0 and report.seconds > 0
    # LoRA adds rank x (in + out) to each of 18 linears; the head of 64 x 4 + 4 is trained whole.
    added = 16 * 3 * (4 * (64 + 64) + 2 * (64 + 128))
    assert report.trainable_parameters == added + 64 * 4 + 4
    original = sum(tensor.numel() for tensor in load_file(tiny_checkpoint / "model.safetensors").values())
    # peft keeps the untrained head beside its copy
    assert report.parameters == original + added + 64 * 4 + 4


def test_the_state_of_a_finished_training_is_gone(learned: tuple[Path, TrainingReport, torch.Tensor]) -> None:
    assert left_behind(learned[0].parent) == []


def test_full_fine_tuning_trains_every_weight(
    tiny: Checkpoint, train: ImageSet, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    spec = FinetuneSpec(method="full", epochs=1, batch_size=8, learning_rate=1e-3)
    report = finetune(tiny, spec, tmp_path / "out", "cpu", images=train)
    original, tuned = (load_file(f / "model.safetensors") for f in (tiny_checkpoint, tmp_path / "out"))
    assert report.trainable_parameters == report.parameters == sum(t.numel() for t in original.values())
    assert [name for name in tuned if torch.equal(tuned[name], original[name])] == []
    assert report.test_top1_percent is None
    assert module_names(tmp_path / "out") == module_names(tiny_checkpoint)


def test_only_the_layers_asked_for_change(
    tiny: Checkpoint, train: ImageSet, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    spec = SHORT.model_copy(update={"targets": ("block.1.query", "block.*.fc2"), "epochs": 1})
    finetune(tiny, spec, tmp_path / "out", "cpu", images=train)
    before, after = (load_model(open_checkpoint(str(f))).state_dict() for f in (tiny_checkpoint, tmp_path / "out"))
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "vit.layers.1.attention.q_proj.weight",
        *(f"vit.layers.{block}.mlp.fc2.weight" for block in range(3)),
        "classifier.weight",
        "classifier.bias",
    }


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    tiny: Checkpoint, train: ImageSet, tmp_path: Path
) -> None:
    spec = SHORT.model_copy(update={"epochs": 1})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finetune(tiny, spec, tmp_path / name, "cpu", images=train, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the given step, once."""
    advance = training.Advance.on_step_end

    def interrupting(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        advance(self, args, state, control, **rest)
        if state.global_step == step:
            monkeypatch.setattr(training.Advance, "on_step_end", advance)
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Advance, "on_step_end", interrupting)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_training_goes_on_and_ends_as_if_nothing_had_happened(
    method: str, tiny: Checkpoint, train: ImageSet, test: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SHORT.model_copy(update={"method": method, "epochs": 3})
    whole = finetune(tiny, spec, tmp_path / "whole", "cpu", images=train, test=test)
    interrupt_after(6, monkeypatch)  # in the middle of the second of three epochs of four steps
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny, spec, tmp_path / "out", "cpu", images=train, test=test)
    assert not (tmp_path / "out").exists()
    (state,) = left_behind(tmp_path)
    assert state.startswith(".out.training-") and (tmp_path / state / "checkpoint-4").is_dir()

    resumed = finetune(tiny, spec, tmp_path / "out", "cpu", images=train, test=test)
    assert resumed.resumed_from_step == 4
    same = vars(whole) | {"seconds": resumed.seconds, "resumed_from_step": 4}
    assert vars(resumed) == pytest.approx(same)
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[name], tensor)
    assert left_behind(tmp_path) == []


def test_a_training_that_was_complete_but_not_saved_is_only_saved(
    tiny: Checkpoint, train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = training.save_checkpoint
    monkeypatch.setattr(training, "save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(StorageError, match=r"the disk is full while writing .*out: free some space and run it again"):
        finetune(tiny, SHORT, tmp_path / "out", "cpu", images=train)
    monkeypatch.setattr(training, "save_checkpoint", save)
    report = finetune(tiny, SHORT, tmp_path / "out", "cpu", images=train)
    assert report.resumed_from_step == report.steps == 8
    assert report.final_loss is not None and 0.1 < report.final_loss < 3


def test_a_half_written_save_is_not_resumed_from(
    tiny: Checkpoint, train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for broken in ("", '{"global_step": 4'):
        interrupt_after(6, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            finetune(tiny, SHORT, tmp_path / "out", "cpu", images=train)
        (state,) = left_behind(tmp_path)
        (tmp_path / state / "checkpoint-4" / "trainer_state.json").write_text(broken)
        assert finetune(tiny, SHORT, tmp_path / "out", "cpu", images=train).resumed_from_step == 0
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("change", ["rank", "learning_rate", "seed", "images", "checkpoint", "output"])
def test_other_inputs_never_resume(
    change: str,
    tiny: Checkpoint,
    train: ImageSet,
    copy_of: Callable[[Path], Path],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = SHORT.model_copy(update={"epochs": 2})
    interrupt_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny, spec, tmp_path / "out", "cpu", images=train)
    checkpoint, images, seed, output = tiny, train, 0, "out"
    match change:
        case "rank" | "learning_rate":
            spec = spec.model_copy(update={change: 2})
        case "seed":
            seed = 1
        case "images":
            images = train.subset(range(1, len(train)))
        case "output":
            output = "other"
        case "checkpoint":
            folder = copy_of(tiny_checkpoint)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.1}))
            checkpoint = open_checkpoint(str(folder))
    spec = spec.model_copy(update={"epochs": 1 if change == "learning_rate" else spec.epochs, "learning_rate": 1e-3})
    assert finetune(checkpoint, spec, tmp_path / output, "cpu", images=images, seed=seed).resumed_from_step == 0


def test_new_classes_get_a_new_head(tiny: Checkpoint, shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    for old, new in (("circle", "round"), ("square", "angular")):
        shutil.copytree(shapes / "train" / old, folder / "train" / new)
    images = open_images(DataSpec(source=str(folder)), "train")
    report = finetune(tiny, SHORT, tmp_path / "out", "cpu", images=images)
    assert report.classes == 2
    tuned = open_checkpoint(str(tmp_path / "out"))
    assert tuned.label_names == ["angular", "round"]
    assert tuned.config.label2id == {"angular": 0, "round": 1}
    assert load_file(tmp_path / "out" / "model.safetensors")["classifier.weight"].shape == (2, 64)


def test_known_classes_keep_the_head(tiny: Checkpoint, train: ImageSet, tiny_checkpoint: Path, tmp_path: Path) -> None:
    spec = SHORT.model_copy(update={"epochs": 1, "learning_rate": 1e-9})
    finetune(tiny, spec, tmp_path / "out", "cpu", images=train)
    heads = [load_file(f / "model.safetensors")["classifier.weight"] for f in (tiny_checkpoint, tmp_path / "out")]
    torch.testing.assert_close(heads[1], heads[0], rtol=0, atol=1e-6)


def numbered(folder: Path, shapes: Path, labels: list[int]) -> ImageSet:
    """Images whose labels are numbers, in the given order."""
    folder.mkdir()
    files = sorted((shapes / "train").rglob("*.png"))[:: 32 // len(labels)][: len(labels)]
    lines = ["file_name,label"]
    for index, (file, label) in enumerate(zip(files, labels, strict=True)):
        shutil.copy(file, folder / f"{index}.png")
        lines.append(f"{index}.png,{label}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return open_images(DataSpec(source=str(folder)), "all")


def test_numbers_are_classes_and_only_those_that_the_images_have(
    tiny: Checkpoint, shapes: Path, tmp_path: Path
) -> None:
    spec = SHORT.model_copy(update={"epochs": 1})
    for labels, names in (([0, 3, 1, 2], ["0", "1", "2", "3"]), ([0, 60, 7, 60], ["0", "7", "60"])):
        output = tmp_path / f"out-{len(names)}"
        finetune(tiny, spec, output, "cpu", images=numbered(tmp_path / f"in-{len(names)}", shapes, labels))
        assert open_checkpoint(str(output)).label_names == names


def test_numbers_that_count_the_heads_outputs_keep_the_head(tiny: Checkpoint, shapes: Path, tmp_path: Path) -> None:
    spec = SHORT.model_copy(update={"epochs": 1})
    few, more = (
        as_indices(numbered(tmp_path / name, shapes, labels))
        for name, labels in (("few", [0, 3, 1, 3]), ("more", [0, 6, 1, 6]))
    )
    finetune(tiny, spec, tmp_path / "kept", "cpu", images=few)
    assert open_checkpoint(str(tmp_path / "kept")).label_names == ["circle", "cross", "square", "stripe"]
    with pytest.raises(DataError, match="has label 6, but the model's head has 4 classes"):
        finetune(tiny, spec, tmp_path / "new", "cpu", images=more)


def test_a_training_that_ends_in_guessing_says_so_and_is_kept(
    tiny: Checkpoint, train: ImageSet, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The test images' labels count in another order."""
    for number, name in enumerate(("circle", "cross", "square", "stripe")):
        other = ("circle", "cross", "square", "stripe")[(number + 1) % 4]
        shutil.copytree(shapes / "train" / name, tmp_path / "other" / "test" / other)
    wrong = open_images(DataSpec(source=str(tmp_path / "other")), "test")
    spec = SHORT.model_copy(update={"method": "full", "epochs": 30, "learning_rate": 1e-3, "augment": False})
    report = finetune(tiny, spec, tmp_path / "out", "cpu", images=train, test=wrong)
    assert report.test_top1_percent is not None and report.test_top1_percent < 15
    assert any("no better than guessing" in record.message for record in caplog.records)
    assert open_checkpoint(str(tmp_path / "out"))


def test_test_images_of_another_class_are_refused(
    tiny: Checkpoint, train: ImageSet, shapes: Path, tmp_path: Path
) -> None:
    for old, new in (("circle", "circle"), ("cross", "plus")):
        shutil.copytree(shapes / "test" / old, tmp_path / "other" / "test" / new)
    other = open_images(DataSpec(source=str(tmp_path / "other")), "test")
    with pytest.raises(DataError, match="has the class 'plus', which the model's head does not know"):
        finetune(tiny, SHORT, tmp_path / "out", "cpu", images=train, test=other)
    assert left_behind(tmp_path) == []  # refused before the training


def test_a_target_that_matches_nothing_tells_what_exists(tiny: Checkpoint, train: ImageSet, tmp_path: Path) -> None:
    spec = SHORT.model_copy(update={"targets": ("query", "dense")})
    with pytest.raises(PatternError, match=r"pattern 'dense' matches no layer; this model has block.0 to block.2, in"):
        finetune(tiny, spec, tmp_path / "out", "cpu", images=train)
    assert list(tmp_path.iterdir()) == []


def test_a_training_without_images_is_refused(tiny: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without images"):
        finetune(tiny, SHORT, tmp_path / "out", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_checkpoint_is_refused(tiny: Checkpoint, train: ImageSet, tmp_path: Path) -> None:
    quantize(tiny, VariantSpec(name="v", format="nf4"), tmp_path / "nf4", "cpu")
    quantized = open_checkpoint(str(tmp_path / "nf4"))
    with pytest.raises(CheckpointError, match="nf4 is quantized already"):
        finetune(quantized, SHORT, tmp_path / "out", "cpu", images=train)


def test_a_training_image_that_cannot_be_decoded_is_named(
    tiny: Checkpoint, shapes: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copy_of(shapes)
    (folder / "train" / "cross" / "03.png").write_bytes(b"not an image")
    images = open_images(DataSpec(source=str(folder)), "train")
    with pytest.raises(BadImageError, match=r"image cross/03.png cannot be decoded"):
        finetune(tiny, SHORT, tmp_path / "out", "cpu", images=images)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("epochs", "batch_size", "what"), [(2, 8, r"the loss is nan at step 4"), (1, 32, r"\S+ is not finite")]
)
def test_a_training_that_diverges_is_refused_and_not_resumed(
    epochs: int, batch_size: int, what: str, tiny: Checkpoint, train: ImageSet, test: ImageSet, tmp_path: Path
) -> None:
    spec = SHORT.model_copy(update={"epochs": epochs, "batch_size": batch_size, "learning_rate": 1e39})
    with pytest.raises(MeasurementError, match=rf"the training diverged \({what}\): lower the learning rate, which is"):
        finetune(tiny, spec, tmp_path / "out", "cpu", images=train, test=test)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 89088 vs 88980"),
    ],
)
def test_a_full_disk_while_the_state_is_saved_is_explained(
    error: Exception, tiny: Checkpoint, train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(StorageError, match=r"the disk is full while writing the training state beside .*out: free"):
        finetune(tiny, SHORT, tmp_path / "out", "cpu", images=train)
    assert not (tmp_path / "out").exists()


def test_a_full_gpu_names_the_batch_size(
    tiny: Checkpoint, train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(Trainer, "training_step", full)
    with pytest.raises(MeasurementError, match="out of GPU memory while training: lower the batch size, which is 8"):
        finetune(tiny, SHORT, tmp_path / "out", "cpu", images=train)


def test_other_runtime_errors_of_a_training_keep_their_kind(
    tiny: Checkpoint, train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(Trainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        finetune(tiny, SHORT, tmp_path / "out", "cpu", images=train)


def test_augmentation_is_used_only_where_it_is_wanted(
    tiny: Checkpoint, train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    augment = training.Augmentation.__call__

    def watched(self: Any, image: Image.Image) -> Image.Image:
        seen.append(self.flip)
        return augment(self, image)

    monkeypatch.setattr(training.Augmentation, "__call__", watched)
    counts = []
    for update in ({"augment": True, "flip": False}, {"augment": True}, {"augment": False}):
        finetune(tiny, SHORT.model_copy(update=update | {"epochs": 1}), tmp_path / "out", "cpu", images=train)
        counts.append((len(seen), set(seen)))
        seen.clear()
    assert counts == [(32, {False}), (32, {True}), (0, set())]
