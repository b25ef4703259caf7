"""The note of calibration images in a checkpoint's folder."""

import json
from pathlib import Path

import pytest

from vitopt import storage
from vitopt.data.images import open_images
from vitopt.errors import CheckpointError
from vitopt.models.calibration import calibration_hashes, save_calibration
from vitopt.models.checkpoint import open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.recipe import DataSpec, VariantSpec


def test_the_note_names_images_by_content(shapes: Path, tmp_path: Path) -> None:
    images = open_images(DataSpec(source=str(shapes)), "train").limited(5)
    assert calibration_hashes(tmp_path) == set()
    save_calibration(tmp_path, images, "skip list")
    assert calibration_hashes(tmp_path) == set(images.image_hashes)
    assert json.loads((tmp_path / "calibration.json").read_text()) == {
        "schema": "vitopt.calibration/1",
        "purpose": "skip list",
        "dataset": str(shapes),
        "split": "train",
        "image_sha256": sorted(images.image_hashes),
    }


def test_a_second_purpose_is_added(shapes: Path, tmp_path: Path) -> None:
    first, second = (open_images(DataSpec(source=str(shapes)), split).limited(4) for split in ("train", "test"))
    save_calibration(tmp_path, first, "format")
    save_calibration(tmp_path, second, "skip list")
    save_calibration(tmp_path, second, "skip list")
    assert calibration_hashes(tmp_path) == {*first.image_hashes, *second.image_hashes}
    note = json.loads((tmp_path / "calibration.json").read_text())
    assert (note["purpose"], note["dataset"], note["split"]) == ("format, skip list", str(shapes), "train, test")


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"schema": "vitopt.calibration/9", "image_sha256": []}'])
def test_what_is_no_note_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"calibration\.json"):
        calibration_hashes(tmp_path)


def test_quantize_keeps_the_note_of_its_source_and_its_own(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    first, second = (open_images(DataSpec(source=str(shapes)), split).limited(4) for split in ("train", "test"))
    half, packed = VariantSpec(name="half", format="bf16"), VariantSpec(name="packed", format="nf4", skip="block.0")
    quantize(open_checkpoint(str(tiny_checkpoint)), half, tmp_path / "bf16", calibration=(first, "format"))
    assert calibration_hashes(tmp_path / "bf16") == set(first.image_hashes)
    source = open_checkpoint(str(tmp_path / "bf16"))
    quantize(source, packed, tmp_path / "nf4", calibration=(second, "skip list"))
    assert calibration_hashes(tmp_path / "nf4") == {*first.image_hashes, *second.image_hashes}
    quantize(source, packed, tmp_path / "plain")
    assert calibration_hashes(tmp_path / "plain") == set(first.image_hashes)
    storage.copy_folder(tmp_path / "nf4", tmp_path / "copy")
    assert calibration_hashes(tmp_path / "copy") == calibration_hashes(tmp_path / "nf4")


def test_a_checkpoint_without_calibration_has_no_note(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="x", format="nf4"), tmp_path / "nf4")
    assert not (tmp_path / "nf4" / "calibration.json").exists()
