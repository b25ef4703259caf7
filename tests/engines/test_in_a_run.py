"""Variants of an engine in a run: made once, on images that are not tested, by the plan of their row."""

import pytest

from vitopt import checks, storage
from vitopt.engines import package
from vitopt.errors import DataError
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import open_checkpoint
from vitopt.recipe import Recipe
from vitopt.stages import RunFolder
from vitopt.variants import VariantMaker


def recipe(checkpoint, shapes, **calibrate):
    row = {"name": "int8", "format": "w8a8", "engine": "openvino", "static_scales": True}
    row["steps"] = [{"calibrate": {"images": 8} | calibrate}]
    variants = [{"name": "torch", "format": "fp32"}, {"name": "fp32", "format": "fp32", "engine": "openvino"}, row]
    content = {"name": "r", "model": checkpoint.location, "data": str(shapes), "device": "cpu", "variants": variants}
    return Recipe.model_validate(content)


def make(asked, folder):
    said = []
    with storage.claimed(folder):
        maker = VariantMaker(RunFolder(folder, said.append), asked, None)
        base = open_checkpoint(asked.model)
        failures = [maker.make(maker.settle(variant, base)) for variant in asked.variants]
    return failures, said


def test_a_file_is_made_once_and_again_for_other_images(engine, checkpoint, shapes, tmp_path):
    run = tmp_path / "run"
    assert make(recipe(checkpoint, shapes), run)[0] == [None] * 3
    assert not (run / "variants" / "torch" / "openvino").exists()
    assert package.read_package(run / "variants" / "fp32" / "openvino").format == "fp32"
    made = package.read_package(run / "variants" / "int8" / "openvino")
    assert made.calibrated and made.settings == {"images": 8}
    assert [use.purpose for use in load_uses(run / "variants" / "int8")] == [package.CALIBRATED]
    assert load_uses(run / "variants" / "fp32") == ()
    assert all("up to date" in line for line in make(recipe(checkpoint, shapes), run)[1])
    said = make(recipe(checkpoint, shapes, images=12), run)[1]
    assert ["up to date" in line for line in said if line.startswith("variant")] == [True, True, False]
    assert package.read_package(run / "variants" / "int8" / "openvino").settings == {"images": 12}
    (run / "variants" / "fp32" / "openvino" / "model.bin").unlink()
    assert any("model.bin is missing" in line for line in make(recipe(checkpoint, shapes, images=12), run)[1])


def test_an_engine_that_is_not_installed_fails_its_rows_alone(checkpoint, shapes, monkeypatch, tmp_path):
    monkeypatch.setattr("vitopt.environment.support.installed", lambda name: name != "openvino")
    failures, _ = make(recipe(checkpoint, shapes), tmp_path / "run")
    assert failures[0] is None
    assert all("openvino is not installed (pip install 'vitopt[openvino]')" in failure for failure in failures[1:])


def test_tested_images_do_not_calibrate(checkpoint, shapes):
    asked = recipe(checkpoint, shapes, split="test")
    with pytest.raises(DataError, match="calibration images are also test images"):
        checks.require_images(asked, checkpoint, asked.data, checks.tested_images(asked, asked.data))
