"""What lies beside a checkpoint, what is exported, and how an export runs where nothing else is installed."""

import json

import pytest
import torch

from vitopt.engines import package
from vitopt.engines.package import CALIBRATED
from vitopt.errors import CheckpointError, UnsupportedError
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import open_checkpoint
from vitopt.models.origin import load_origin
from vitopt.recipe import VariantSpec

FP32 = VariantSpec(name="v", format="fp32", engine="openvino")


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_export_classifies_a_photo_with_the_engine_alone(engine, checkpoint, classes_of, shapes, tmp_path):
    pytest.importorskip(engine)
    if engine == "onnxruntime":
        pytest.importorskip("onnxscript")
    output = tmp_path / "export"
    made = package.export(checkpoint, FP32.model_copy(update={"engine": engine}), output, as_it_is=True)
    assert (made.engine, made.format) == (engine, "fp32")
    photo = next((shapes / "test").rglob("*.png"))
    found = classes_of(output / "example.py", photo, without="vitopt,torch,transformers")
    from vitopt.prediction import predict

    (wanted,) = predict(checkpoint.location, [photo], top=4)
    assert [name for name, _ in found] == [guess["label"] for guess in wanted["classes"]]
    assert all(abs(share - guess["percent"]) < 0.1 for (_, share), guess in zip(found, wanted["classes"], strict=True))
    assert json.loads((output / "labels.json").read_text()) == checkpoint.label_names
    assert load_origin(output).steps[-1]["engine"] == engine


def test_calibration_images_reach_the_engine_and_are_noted(engine, checkpoint, calibration, tmp_path):
    int8 = VariantSpec(name="v", format="w8a8", engine="openvino", skip=["block.0"])
    package.make(checkpoint, int8, tmp_path / "v", images=calibration)
    made = package.read_package(tmp_path / "v" / "openvino")
    assert made.settings == {"images": len(calibration)} and made.calibrated
    (use,) = load_uses(tmp_path / "v")
    assert use.purpose == CALIBRATED and use.image_sha256 == tuple(calibration.image_hashes)
    assert open_checkpoint(str(tmp_path / "v")).config.dtype == torch.float32  # opens in plain transformers


def test_an_export_takes_the_file_that_was_measured(engine, checkpoint, calibration, tmp_path):
    int8 = VariantSpec(name="v", format="w8a8", engine="openvino")
    package.make(checkpoint, int8, tmp_path / "v", images=calibration)
    package.export(open_checkpoint(str(tmp_path / "v")), FP32, tmp_path / "export", as_it_is=True)
    made, exported = (package.read_package(tmp_path / name) for name in ("v/openvino", "export"))
    assert made == exported and exported.format == "w8a8"


def test_logits_that_are_not_those_of_torch_are_refused(engine, checkpoint, tmp_path):
    from vitopt.errors import MeasurementError

    engine.factor = 1.01
    with pytest.raises(MeasurementError, match="openvino computes other logits"):
        package.make(checkpoint, FP32, tmp_path / "v")
    engine.factor = float("nan")
    with pytest.raises(MeasurementError, match="not finite"):
        package.make(checkpoint, FP32, tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_preprocessing_that_the_example_cannot_do_is_refused(engine, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(package, "pixels", lambda image, settings: torch.zeros(1, 3, 32, 32).numpy())
    with pytest.raises(UnsupportedError, match=r"example\.py"):
        package.make(checkpoint, FP32, tmp_path / "v")


def test_a_note_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "engine.json").write_text('{"schema": "other"}')
    with pytest.raises(CheckpointError, match=r"engine\.json.*make it again"):
        package.read_package(tmp_path)


def test_quantized_checkpoints_are_refused(engine, checkpoint, tmp_path):
    from vitopt.optimize.quantize import quantize

    quantize(checkpoint, VariantSpec(name="q", format="nf4"), tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"quantized.*16- or 32-bit"):
        package.make(open_checkpoint(str(tmp_path / "q")), FP32, tmp_path / "v")
