"""ONNX against torch in float64, and a file that other tools can read."""

import pytest
import torch

from vitopt.engines import package
from vitopt.errors import UnsupportedError
from vitopt.models.checkpoint import load_model
from vitopt.recipe import VariantSpec

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)
FP32 = VariantSpec(name="v", format="fp32", engine="onnxruntime")


def test_it_computes_what_torch_does_at_every_batch_size(checkpoint, run_with, pixel_values, tmp_path):
    import onnx

    package.make(checkpoint, FP32, tmp_path / "made")
    runnable = run_with(tmp_path / "made", FP32)
    with torch.inference_mode():
        wanted = load_model(checkpoint, dtype=torch.float64)(pixel_values.double()).logits
    for count in (1, 2, 3):
        assert torch.allclose(runnable(pixel_values[:count]).double(), wanted[:count], atol=1e-5)
    assert set(runnable.describe()["layers"].values()) == {"fp32"} and not runnable.fixed_shapes
    graph = onnx.load(tmp_path / "made" / "onnxruntime" / "model.onnx").graph
    assert ([one.name for one in graph.input], [one.name for one in graph.output]) == (["pixel_values"], ["logits"])
    batch, *rest = graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param and [size.dim_value for size in rest] == [3, 32, 32]


def test_what_cannot_be_exported_is_told(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: 1 / 0)
    with pytest.raises(UnsupportedError, match=r"ViTForImageClassification as ONNX.*division"):
        package.make(checkpoint, FP32, tmp_path / "a")


def test_what_exports_must_be_installed(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("vitopt.environment.support.installed", lambda name: name != "onnxscript")
    with pytest.raises(UnsupportedError, match=r"onnxscript.*pip install 'vitopt\[onnx\]'"):
        package.make(checkpoint, FP32, tmp_path / "a")
