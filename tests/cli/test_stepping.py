"""Commands that are made of the table of steps."""

from pathlib import Path

import pytest
from commands import done, printed, refusal

from vitopt.models.activations import load_activations
from vitopt.models.checkpoint import open_checkpoint
from vitopt.steps import STEPS


def test_smooth_and_calibrate_lead_to_static_scales(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    told = done("smooth", tiny_checkpoint, "--data", shapes, "--limit", 4, "--output", tmp_path / "smooth")
    assert "9 of 12 inputs" in told.stderr and "4 images" in told.stderr
    found = printed("calibrate", tmp_path / "smooth", "--data", f"{shapes}:train", "--output", tmp_path / "calibrated")
    assert found["images"] > 4 and "18 layers" in found["summary"]
    done("quantize", tmp_path / "calibrated", "--format", "w8a8", "--output", tmp_path / "w8a8")
    assert len(load_activations(open_checkpoint(str(tmp_path / "w8a8")).folder)) == 18
    assert (tmp_path / "calibrated" / "README.md").is_file()


@pytest.mark.parametrize("name", [name for name, kind in STEPS.items() if kind.images == "calibration"])
def test_each_step_on_calibration_images_has_a_command(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    told = done(name, "--help").stdout
    assert "--data" in told and "--limit" in told and "--split" not in told
    needed = ("--depth", 1) if name == "prune" else ()
    asked = (name, tiny_checkpoint, *needed, "--output", tmp_path / "out", "--data")
    assert "absent" in refusal(*asked, tmp_path / "absent")
    assert "images" in refusal(*asked, "digits", "--limit", 0)
    assert not (tmp_path / "out").exists()


def test_a_step_without_images_has_a_command_without_data(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert "--data" not in done("rotate", "--help").stdout
    found = printed("rotate", tiny_checkpoint, "--seed", 3, "--output", tmp_path / "rotated")
    assert "channels" in found["summary"] and "images" not in found
    before, after = (open_checkpoint(str(folder)).fingerprint() for folder in (tiny_checkpoint, tmp_path / "rotated"))
    assert before != after
