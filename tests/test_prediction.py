"""Classes of images without labels: which files are found, and what is answered for each."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitopt.errors import BadImageError, DataError, MeasurementError
from vitopt.optimize.runtime import TorchRunnable
from vitopt.prediction import image_paths, predict
from vitopt.recipe import RunSpec


@pytest.fixture
def photos(shapes: Path, copy_of: Callable[[Path], Path]) -> Path:
    """Folders of images, and a text beside them."""
    folder = copy_of(shapes / "test")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_folders_files_and_patterns_stand_for_images_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = sorted(photos.rglob("*.png"))
    assert image_paths([str(photos)]) == every
    first = every[3]
    assert image_paths([str(first), str(photos)]) == [first, *(path for path in every if path != first)]
    assert image_paths([str(photos / "c*" / "*.png")]) == [path for path in every if path.parent.name[0] == "c"]
    assert image_paths([str(photos / "**" / "00.png")]) == [path for path in every if path.name == "00.png"]
    monkeypatch.chdir(photos)
    assert image_paths(["cross/0[01].png"]) == [Path("cross/00.png"), Path("cross/01.png")]


def test_a_folder_gives_files_and_links_to_files_in_order_of_their_names(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for name in ("a/x.JPG", "a.png", "a-b.png", "B.png", "a/b/0.png", ".png", "a/notes.txt", "c.png/z.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    elsewhere.mkdir()
    (elsewhere / "y.png").touch()
    (folder / "linked.png").symlink_to(elsewhere / "y.png")
    (folder / "to-a-folder").symlink_to(elsewhere)
    (folder / "broken.png").symlink_to(elsewhere / "nothing.png")
    found = [path.relative_to(folder).as_posix() for path in image_paths([str(folder)])]
    assert found == ["B.png", "a/b/0.png", "a/x.JPG", "a-b.png", "a.png", "c.png/z.png", "linked.png"]


def test_a_folder_that_cannot_be_read_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def denying(path: Path | str) -> object:
        if Path(path).name == "cross":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", denying)
    with pytest.raises(DataError, match=r"cross cannot be read: Permission denied"):
        image_paths([str(photos)])


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(photos: Path) -> None:
    odd = photos / "[a].png"
    (photos / "cross" / "00.png").rename(odd)
    assert image_paths([str(odd)]) == [odd]


@pytest.mark.parametrize("name", ["nothing.png", "~nobody-there/a.png", "~nobody-there/*.png", "a" * 5000, "a\0.png"])
def test_names_that_cannot_be_or_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(BadImageError, match="no image at"):
        image_paths([name])


@pytest.mark.parametrize(("name", "told"), [("*.jpg", r"no image at .*\.jpg"), ("empty", r"folder .*empty")])
def test_names_that_stand_for_nothing_are_refused(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadImageError, match=told):
        image_paths([str(tmp_path / name)])
    with pytest.raises(DataError, match="no images"):
        image_paths([])


def test_predictions_are_the_softmax_of_the_models_logits(tiny_checkpoint: Path, shapes: Path) -> None:
    from transformers import AutoModelForImageClassification

    paths = [shapes / "test" / "circle" / "00.png", shapes / "test" / "stripe" / "03.png"]
    got = list(predict(str(tiny_checkpoint), paths, top=3, device="cpu"))
    model = AutoModelForImageClassification.from_pretrained(tiny_checkpoint)
    for path, one in zip(paths, got, strict=True):
        pixels = np.asarray(Image.open(path).convert("RGB"), np.float32) / 127.5 - 1
        with torch.inference_mode():
            shares = model(torch.from_numpy(pixels).permute(2, 0, 1)[None]).logits.softmax(-1)[0].numpy()
        best = np.argsort(-shares)[:3]
        assert one["image"] == str(path)
        assert [c["index"] for c in one["classes"]] == best.tolist()
        assert [c["label"] for c in one["classes"]] == [model.config.id2label[index] for index in best]
        assert [c["percent"] for c in one["classes"]] == pytest.approx(100 * shares[best], rel=1e-4)


def test_more_classes_than_there_are_gives_all(tiny_checkpoint: Path, shapes: Path) -> None:
    (got,) = predict(str(tiny_checkpoint), [shapes / "test" / "circle" / "00.png"], top=50, device="cpu")
    assert len(got["classes"]) == 4
    assert sum(c["percent"] for c in got["classes"]) == pytest.approx(100, abs=1e-3)


def test_an_image_that_is_not_there_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match=r"no image at .*nothing.png"):
        next(predict(str(tiny_checkpoint), [tmp_path / "nothing.png"], top=1, device="cpu"))
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(BadImageError, match=r"image .*text.png cannot be decoded"):
        next(predict(str(tiny_checkpoint), [tmp_path / "text.png"], top=1, device="cpu"))


@pytest.mark.parametrize("batch_size", [5, 100])
def test_batches_give_each_image_its_own_answer(tiny_checkpoint: Path, photos: Path, batch_size: int) -> None:
    paths = image_paths([str(photos)])
    alone = list(predict(str(tiny_checkpoint), paths, top=4, device="cpu", batch_size=1))
    together = list(predict(str(tiny_checkpoint), paths, top=4, device="cpu", batch_size=batch_size))
    assert [one["image"] for one in together] == [str(path) for path in paths]
    for one, other in zip(alone, together, strict=True):
        assert [c["index"] for c in one["classes"]] == [c["index"] for c in other["classes"]]
        assert [c["percent"] for c in one["classes"]] == pytest.approx(
            [c["percent"] for c in other["classes"]], rel=1e-3
        )


def test_a_compiled_model_answers_the_same_over_a_last_batch_that_is_not_full(
    tiny_checkpoint: Path, photos: Path
) -> None:
    paths = image_paths([str(photos)])[:7]
    plain = list(predict(str(tiny_checkpoint), paths, top=1, device="cpu", batch_size=4))
    run = RunSpec(compile=True)
    compiled = list(predict(str(tiny_checkpoint), paths, top=1, run=run, device="cpu", batch_size=4))
    assert len(compiled) == 7
    for one, other in zip(plain, compiled, strict=True):
        assert one["classes"][0]["index"] == other["classes"][0]["index"]
        assert one["classes"][0]["percent"] == pytest.approx(other["classes"][0]["percent"], rel=1e-3)


def test_bad_images_keep_their_place_and_tell_why(tiny_checkpoint: Path, photos: Path) -> None:
    paths = image_paths([str(photos)])
    paths[2].write_text("text")
    with pytest.raises(BadImageError, match=paths[2].name):
        list(predict(str(tiny_checkpoint), paths, top=1, device="cpu"))
    answers = list(predict(str(tiny_checkpoint), paths, top=1, device="cpu", skip_bad=True, batch_size=2))
    assert [one["image"] for one in answers] == [str(path) for path in paths]
    assert [index for index, one in enumerate(answers) if "error" in one] == [2]
    assert answers[2]["classes"] == [] and "not an image" in answers[2]["error"]


def test_a_multi_label_head_gives_each_class_its_own_probability(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(tiny_checkpoint)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    path = shapes / "test" / "cross" / "00.png"
    (answer,) = predict(str(folder), [path], top=4, device="cpu")
    (plain,) = predict(str(tiny_checkpoint), [path], top=4, device="cpu")
    softmax = torch.tensor([c["percent"] / 100 for c in plain["classes"]], dtype=torch.float64)
    # Both come from the same logits, of which a softmax keeps the differences alone.
    logits = torch.logit(torch.tensor([c["percent"] / 100 for c in answer["classes"]], dtype=torch.float64))
    assert torch.allclose(logits - logits[0], softmax.log() - softmax[0].log(), atol=1e-3)


def test_logits_that_are_not_finite_are_refused(
    tiny_checkpoint: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchRunnable, "__call__", lambda self, pixels: torch.full((len(pixels), 4), float("nan")))
    with pytest.raises(MeasurementError, match="not finite"):
        next(predict(str(tiny_checkpoint), [shapes / "test" / "cross" / "00.png"], top=1, device="cpu"))


def test_scaled_decoding_gives_the_classes_of_the_image_at_a_fraction(tiny_checkpoint: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    large, fraction = tmp_path / "large.jpg", tmp_path / "fraction.png"
    Image.fromarray(noise).resize((600, 520)).save(large)
    with Image.open(large) as image:
        image.draft("RGB", (75, 65))
        image.save(fraction)
    run = RunSpec(scaled_decoding=True)
    scaled, whole = (next(predict(str(tiny_checkpoint), [large], top=4, run=one)) for one in (run, RunSpec()))
    assert scaled["classes"] == next(predict(str(tiny_checkpoint), [fraction], top=4))["classes"] != whole["classes"]
