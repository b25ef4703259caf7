"""ONNX against torch in float64, and a file that other tools can read."""

import numpy as np
import pytest
import torch

from vitopt.engines import package
from vitopt.errors import UnsupportedError
from vitopt.models.checkpoint import load_model
from vitopt.recipe import VariantSpec

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)
FP32 = VariantSpec(name="v", format="fp32", engine="onnxruntime")
LINEARS = ("MatMul", "Gemm")


def variant(format, **changes):
    return VariantSpec(name="v", format=format, engine="onnxruntime", **changes)


def error(found, checkpoint, pixel_values):
    with torch.inference_mode():
        wanted = load_model(checkpoint, dtype=torch.float64)(pixel_values.double()).logits
    return float((found.double() - wanted).norm() / wanted.norm())


def graph_of(folder):
    import onnx

    return onnx.load(folder / "onnxruntime" / "model.onnx").graph


def test_it_computes_what_torch_does_at_every_batch_size(checkpoint, run_with, pixel_values, tmp_path):
    package.make(checkpoint, FP32, tmp_path / "made")
    runnable = run_with(tmp_path / "made", FP32)
    for count in (1, 2, 3):
        some = pixel_values[:count]
        assert error(runnable(some), checkpoint, some) < 1e-5
    assert set(runnable.describe()["layers"].values()) == {"fp32"} and not runnable.fixed_shapes
    graph = graph_of(tmp_path / "made")
    assert ([one.name for one in graph.input], [one.name for one in graph.output]) == (["pixel_values"], ["logits"])
    batch, *rest = graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param and [size.dim_value for size in rest] == [3, 32, 32]
    modules = {layer.module for layer in runnable._layers}
    assert modules <= {node.name for node in graph.node if node.op_type in LINEARS}  # a reader finds the layers


def test_formats_are_told_of_a_file_that_was_made_for_this_time(checkpoint, run_with):
    assert set(run_with(checkpoint, FP32).describe()["layers"].values()) == {"fp32"}


def test_fp16_is_stored_and_told_as_what_computes(checkpoint, run_with, pixel_values, tmp_path):
    package.make(checkpoint, variant("fp16"), tmp_path / "made")
    weights = {one.data_type for one in graph_of(tmp_path / "made").initializer if len(one.dims) == 2}
    assert weights == {10}  # float16
    runnable = run_with(tmp_path / "made", variant("fp16"))
    assert 1e-6 < error(runnable(pixel_values), checkpoint, pixel_values) < 0.01
    told = runnable.describe()
    (computed,) = set(told["layers"].values())
    assert computed in ("fp32", "fp16") and ("format" in told["variant"].reasons) == (computed == "fp32")


def test_int8_rounds_the_layers_that_the_plan_names(checkpoint, calibration, run_with, pixel_values, tmp_path):
    errors = {}
    for name, skip, images in (
        ("calls", [], None),
        ("static", [], calibration),
        ("calls, less", ["block.0", "fc2"], None),
        ("static, less", ["block.0", "fc2"], calibration),
    ):
        one = variant("w8a8", skip=skip)
        plan = package.make(checkpoint, one, tmp_path / name, images=images)
        runnable = run_with(tmp_path / name, one)
        errors[name] = error(runnable(pixel_values), checkpoint, pixel_values)
        live = runnable.describe()["layers"]
        assert live == {p.layer.logical: "w8a8" if p.format == "w8a8" else "fp32" for p in plan.layers}
        nodes = graph_of(tmp_path / name).node
        assert ("QuantizeLinear" in {node.op_type for node in nodes}) == (images is not None)
        int8 = [node for node in nodes if node.op_type == ("MatMulInteger" if images is None else "DequantizeLinear")]
        assert int8
    assert 1e-3 < errors["calls, less"] < errors["calls"] < 0.5 and errors["static, less"] < errors["static"] < 0.5


def test_weights_of_2_gb_are_beside_the_file(checkpoint, calibration, monkeypatch, run_with, pixel_values, tmp_path):
    monkeypatch.setattr("vitopt.engines.onnxruntime._LARGEST", 1000)
    for format, images in (("fp32", None), ("w8a8", None), ("w8a8", calibration)):
        folder = tmp_path / f"{format}{images is None}"
        package.make(checkpoint, variant(format), folder, images=images)
        names = {file.name for file in (folder / "onnxruntime").iterdir()}
        assert "model.onnx.data" in names
        assert error(run_with(folder, variant(format))(pixel_values), checkpoint, pixel_values) < 0.5


def test_each_output_channel_has_its_scale(checkpoint, tmp_path):
    package.make(checkpoint, variant("w8a8"), tmp_path / "made")
    scales = [one for one in graph_of(tmp_path / "made").initializer if one.name.endswith("_scale")]
    assert scales and all(np.prod(one.dims) > 1 for one in scales)


def test_what_cannot_be_exported_is_told(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: 1 / 0)
    with pytest.raises(UnsupportedError, match=r"ViTForImageClassification as ONNX.*division"):
        package.make(checkpoint, FP32, tmp_path / "a")


def test_what_exports_must_be_installed(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr("vitopt.environment.support.installed", lambda name: name != "onnxscript")
    with pytest.raises(UnsupportedError, match=r"onnxscript.*pip install 'vitopt\[onnx\]'"):
        package.make(checkpoint, FP32, tmp_path / "a")
