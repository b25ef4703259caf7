"""Commands and choices that name an engine: its formats, its scales, and what they refuse."""

import pytest
from commands import printed, refusal

from vitopt.data.images import open_images
from vitopt.engines import package
from vitopt.models.calibration import load_uses
from vitopt.recipe import DataSpec, EvaluateSpec, FastestSpec
from vitopt.search import fastest

ENGINE = ["--engine", "openvino"]


@pytest.fixture
def everywhere(engine, monkeypatch):
    monkeypatch.setattr(fastest, "engine_module", lambda name: engine)
    return engine


def test_quantize_makes_the_file_of_an_engine(engine, checkpoint, shapes, tmp_path):
    int8 = ["quantize", checkpoint.location, "--format", "w8a8", *ENGINE, "--skip", "fc2"]
    found = printed(*int8, "--output", tmp_path / "calls")
    assert found["layer_plan"] == {"w8a8": 10, "bf16": 3}
    assert not package.read_package(tmp_path / "calls" / "openvino").calibrated
    printed(*int8, "--static-scales", "--data", shapes, "--limit", "6", "--output", tmp_path / "static")
    made = package.read_package(tmp_path / "static" / "openvino")
    assert made.calibrated and made.settings == {"images": 6}
    (use,) = load_uses(tmp_path / "static")
    assert use.purpose == package.CALIBRATED and len(use.images) == 6


def test_the_fastest_of_an_engine_is_chosen_among_its_formats(everywhere, checkpoint, shapes):
    images = open_images(DataSpec(source=str(shapes)), "train")
    quick = EvaluateSpec(batch_size=8, end_to_end=False, latency={"iterations": 4, "rounds": 2, "warmup_seconds": 0})
    spec = FastestSpec(min_agreement=0)
    scales = images.subset(range(4))
    choice = fastest.find_fastest(checkpoint, images, spec, quick, engine="openvino", scales=scales, device="cpu")
    names = ["fp32", "openvino-fp32", "openvino-bf16", "openvino-w8a8", "openvino-w8a8-static"]
    assert [record.variant.name for record in choice.records] == names
    assert [record.failure for record in choice.records] == [None] * 5
    ran = [record.variant.ran for record in choice.records]
    assert "engine" not in ran[0] and ran[4]["engine"] == "openvino" and ran[4]["static_scales"]
    assert choice.variant.name in names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--static-scales", "--data", "SHAPES"], ["--static-scales", "--engine"]),
        ([*ENGINE, "--static-scales"], ["--static-scales needs --data"]),
        ([*ENGINE, "--data", "SHAPES"], ["--data", "--static-scales"]),
        ([*ENGINE, "--half", "fp16"], ["openvino", "half"]),
    ],
)
def test_what_would_do_nothing_or_lacks_images_is_refused(options, words, checkpoint, shapes, tmp_path):
    given = [shapes if option == "SHAPES" else option for option in options]
    command = ["quantize", checkpoint.location, "--format", "w8a8", *given, "--output", tmp_path / "out"]
    text = refusal(*command)
    assert all(word in text for word in words)


def test_an_export_takes_names_and_leaves_the_choice_to_quantize(checkpoint, tmp_path):
    command = ["export", checkpoint.location, *ENGINE, "--format", "w8a8", "--skip", "auto", "--output", tmp_path / "x"]
    assert "vitopt quantize --skip auto --engine openvino" in refusal(*command)


def test_a_sensitivity_in_an_engine_has_no_batches(checkpoint, shapes, tmp_path):
    command = ["sensitivity", checkpoint.location, "--data", shapes, "--format", "w8a8", *ENGINE, "--batch-size", "4"]
    assert "one by one" in refusal(*command, "--output", tmp_path / "x")
