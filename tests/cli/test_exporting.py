"""`vitopt export`: what it writes, takes and refuses."""

from pathlib import Path

import pytest
from commands import done, printed, refusal


def test_it_writes_what_the_engine_needs_and_tells(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    output = tmp_path / "export"
    asked = ["export", tiny_checkpoint, "--engine", "openvino", "--output", output]
    told = printed(*asked, "--format", "w8a8", "--skip", "fc2", "--data", shapes, "--limit", "8")
    wanted = {"model.xml", "model.bin", "engine.json", "example.py", "labels.json", "preprocessor_config.json"}
    assert set(told["files"]) == wanted | {"README.md", "origin.json", "calibration.json"} and told["format"] == "w8a8"
    card = (output / "README.md").read_text()
    assert "library_name: openvino" in card and "Converted to w8a8 for openvino, fc2 kept in bf16" in card
    assert "pip install openvino numpy pillow" in card and str(tmp_path) not in card and "vitopt evaluate" not in card

    result = done(*asked)  # in the format of the checkpoint, in place of what stands there
    assert "fp32 for openvino" in result.stderr and "example.py photo.jpg" in result.stderr
    assert not (output / "calibration.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "openvino", "--format", "nf4"], ["openvino", "nf4", "fp32, bf16, w8a8"]),
        (["--engine", "onnxruntime", "--format", "bf16"], ["onnxruntime", "bf16"]),
        (["--engine", "openvino", "--skip", "fc2"], ["fp32", "`skip`"]),
        (["--engine", "openvino", "--data", "digits"], ["--data", "quantized --format"]),
        (["--engine", "openvino", "--format", "w8a8", "--data", "absent"], ["absent"]),
        (["--engine", "aoti", "--format", "w8a8", "--data", "digits"], ["--data", "aoti", "vitopt calibrate"]),
    ],
)
def test_what_would_do_nothing_or_cannot_be_is_refused(
    options: list[str], words: list[str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    line = refusal("export", tiny_checkpoint, "--output", tmp_path / "export", *options)
    assert all(word in line for word in words), line
    assert not (tmp_path / "export").exists()


def test_an_engine_that_is_not_installed_is_named_with_the_remedy(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vitopt.environment.support.installed", lambda name: name != "onnxruntime")
    line = refusal("export", tiny_checkpoint, "--engine", "onnxruntime", "--output", tmp_path / "export")
    assert "onnxruntime is not installed (pip install 'vitopt[onnx]')" in line
