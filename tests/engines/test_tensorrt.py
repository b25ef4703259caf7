"""The ONNX file that TensorRT is given against torch, and the calls of its Python API, played by a stand-in.

What only a GPU can show is in tests/test_gpu.py.
"""

import re
import sys
import types

import numpy as np
import pytest
import torch

from vitopt.data.pixels import Preprocessor, batches
from vitopt.engines import package, tensorrt
from vitopt.engines.runtime import prepare
from vitopt.environment import support
from vitopt.errors import MeasurementError, UnsupportedError
from vitopt.models.checkpoint import load_model, load_processor
from vitopt.optimize.quantize import plan_for
from vitopt.recipe import RunSpec, VariantSpec

CPU = torch.device("cpu")


def logits_of(checkpoint):
    return package.Logits(load_model(checkpoint, dtype=torch.float32)).eval()


def planned(checkpoint, format, **changes):
    return plan_for(checkpoint, VariantSpec(name="v", format=format, engine="tensorrt", **changes))


@pytest.fixture
def images(calibration, checkpoint):
    stream = batches(calibration, Preprocessor(load_processor(checkpoint)), 1)
    return [batch.pixel_values.numpy() for batch in stream]


@pytest.mark.parametrize(("format", "kept"), [("w8a8", ["fc2", "block.0"]), ("fp8", ["query"])])
def test_layers_of_the_plan_are_quantized_around_inputs_and_weights(
    format, kept, checkpoint, images, pixel_values, tmp_path
):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    plan = planned(checkpoint, format, skip=kept)
    tensorrt._export(tensorrt._typed(logits_of(checkpoint), plan, images), (32, 32), tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    eight = {"w8a8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}[format]
    weights = {
        name: held[name].data_type for name in held if name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))
    }
    asked = {f"model.{module}.weight" for module in plan.modules(format)}
    assert asked == {name for name, kind in weights.items() if kind == eight} and len(asked) == len(
        plan.modules(format)
    )
    assert set(weights.values()) <= {eight, onnx.TensorProto.BFLOAT16}
    kinds = [node.op_type for node in graph.node]
    # Query, key and value have one input, which is quantized once.
    inputs = {re.sub("[qk]_proj", "v_proj", module) for module in plan.modules(format)}
    assert kinds.count("QuantizeLinear") == len(inputs)
    assert kinds.count("DequantizeLinear") == kinds.count("QuantizeLinear") + len(asked)
    assert [one.type.tensor_type.elem_type for one in (*graph.input, *graph.output)] == [onnx.TensorProto.FLOAT] * 2


def test_what_is_written_computes_what_torch_does(checkpoint, images, pixel_values, monkeypatch, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(tensorrt.DTYPES, "bf16", torch.float32)  # onnxruntime computes no bf16 on a CPU
    with torch.inference_mode():
        wanted = load_model(checkpoint, dtype=torch.float64)(pixel_values.double()).logits.numpy()
    errors = {}
    for name in ("fp32", "w8a8", "fp8"):
        typed = tensorrt._typed(logits_of(checkpoint), planned(checkpoint, name), images)
        tensorrt._export(typed, (32, 32), tmp_path / "model.onnx")
        options = runtime.SessionOptions()
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it takes fp8 for int8
        session = runtime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
        found = session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0]
        errors[name] = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert errors["fp32"] < 1e-5
    assert 1e-3 < errors["w8a8"] < 0.3 and 1e-3 < errors["fp8"] < 0.5


class Recorder:
    """As much of TensorRT's Python API (10 and 11) as is used; notes every call with its arguments."""

    def __init__(self, parses=True, builds=True):
        self.calls, self.parses, self.builds = [], parses, builds

    def module(self):
        calls, recorder = self.calls, self

        class Noted:
            def __init__(self, *given):
                calls.append((type(self).__name__, given))

            def note(self, name, *given):
                calls.append((name, given))
                return True

        class Logger(Noted):
            ERROR = "error"

        class Network(Noted):
            pass

        class Profile(Noted):
            def set_shape(self, name, least, usual, most):
                self.note("set_shape", name, least, usual, most)

        class Config(Noted):
            def clear_flag(self, flag):
                self.note("clear_flag", flag)

            def add_optimization_profile(self, profile):
                self.note("add_optimization_profile", profile)

        class Builder(Noted):
            def create_network(self, flags):
                self.note("create_network", flags)
                return Network()

            def create_builder_config(self):
                return Config()

            def create_optimization_profile(self):
                return Profile()

            def build_serialized_network(self, network, config):
                self.note("build_serialized_network")
                return memoryview(b"plan") if recorder.builds else None

        class ParserError:
            def desc(self):
                return "no kernel for this"

            def node_operator(self):
                return "Erf"

        class OnnxParser(Noted):
            def parse_from_file(self, file):
                self.note("parse_from_file", file)
                return recorder.parses

            def get_error(self, index):
                return ParserError()

        class Context(Noted):
            def set_optimization_profile_async(self, index, stream):
                return self.note("set_optimization_profile_async", index, stream)

            def set_input_shape(self, name, shape):
                return self.note("set_input_shape", name, shape)

            def set_tensor_address(self, name, address):
                return self.note("set_tensor_address", name, address)

            def execute_async_v3(self, stream):
                self.note("execute_async_v3", stream)
                return recorder.builds

        class Engine(Noted):
            def create_execution_context(self, strategy):
                self.note("create_execution_context", strategy)
                return Context()

            def get_tensor_shape(self, name):
                return (-1, 4)

        class Runtime(Noted):
            def deserialize_cuda_engine(self, plan):
                self.note("deserialize_cuda_engine", plan)
                return Engine()

        return types.SimpleNamespace(
            Logger=Logger,
            Builder=Builder,
            OnnxParser=OnnxParser,
            Runtime=Runtime,
            NetworkDefinitionCreationFlag=types.SimpleNamespace(STRONGLY_TYPED=1),
            BuilderFlag=types.SimpleNamespace(TF32="tf32"),
            ExecutionContextAllocationStrategy=types.SimpleNamespace(ON_PROFILE_CHANGE="on change"),
            __spec__=types.SimpleNamespace(origin="tensorrt"),
        )

    def of(self, name):
        return [given for called, given in self.calls if called == name]


@pytest.fixture
def record(monkeypatch):
    def recorded(**ways):
        recorder = Recorder(**ways)
        monkeypatch.setitem(sys.modules, "tensorrt", recorder.module())
        stream = types.SimpleNamespace(cuda_stream=77)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        return recorder

    return recorded


def test_the_network_is_strongly_typed_and_has_a_profile_for_one_few_and_many(record):
    recorder = record()
    assert tensorrt._build("model.onnx", (32, 48), "ViT") == b"plan"
    assert recorder.of("create_network") == [(2,)] and recorder.of("parse_from_file") == [("model.onnx",)]
    assert recorder.of("clear_flag") == [("tf32",)]  # fp32 is fp32
    shapes = [[shape[0] for shape in given] for _, *given in recorder.of("set_shape")]
    assert shapes == [[1, 1, 1], [2, 8, 32], [33, 64, 256]]
    assert len(recorder.of("add_optimization_profile")) == 3


def test_an_operator_that_it_lacks_is_named(record):
    record(parses=False)
    with pytest.raises(UnsupportedError, match="tensorrt cannot take this ViT: Erf: no kernel"):
        tensorrt._build("model.onnx", (32, 32), "ViT")
    record(builds=False)
    with pytest.raises(UnsupportedError, match="cannot build this ViT"):
        tensorrt._build("model.onnx", (32, 32), "ViT")


def test_a_call_hands_over_memory_and_the_current_stream(record, tmp_path):
    recorder = record()
    (tmp_path / "model.engine").write_bytes(b"plan")
    call = tensorrt.load(tmp_path, {"batches": [1, 32, 256], "layers": {"a": "fp8"}})
    pixels = torch.zeros(2, 3, 32, 32)
    logits = call(pixels)
    call(pixels)
    assert logits.shape == (2, 4) and logits.dtype == torch.float32
    assert recorder.of("deserialize_cuda_engine") == [(b"plan",)]
    assert recorder.of("create_execution_context") == [("on change",)]
    assert recorder.of("set_optimization_profile_async") == [(1, 77)]
    assert recorder.of("set_input_shape") == [("pixel_values", (2, 3, 32, 32))]
    addresses = recorder.of("set_tensor_address")
    assert addresses[:2] == [("pixel_values", pixels.data_ptr()), ("logits", logits.data_ptr())]
    assert recorder.of("execute_async_v3") == [(77,), (77,)]
    assert call.formats(["a", "b"]) == {"a": "fp8", "b": "unknown"}


def test_more_images_than_the_largest_profile_are_several_calls(record, tmp_path):
    recorder = record()
    (tmp_path / "model.engine").write_bytes(b"plan")
    call = tensorrt.load(tmp_path, {"batches": [1, 2, 4], "layers": {}})
    assert call(torch.zeros(9, 3, 8, 8)).shape == (9, 4)
    assert [shape[0] for _, shape in recorder.of("set_input_shape")] == [4, 1]
    assert len(recorder.of("execute_async_v3")) == 3


def test_a_call_that_fails_is_an_error(record, tmp_path):
    record(builds=False)
    (tmp_path / "model.engine").write_bytes(b"plan")
    with pytest.raises(MeasurementError, match="batch of 1"):
        tensorrt.load(tmp_path, {"batches": [1], "layers": {}})(torch.zeros(1, 3, 8, 8))


def test_8_bit_without_images_names_the_remedy(checkpoint):
    with pytest.raises(UnsupportedError, match="fp8 by scales that calibration images fix: set `static_scales`"):
        tensorrt._typed(logits_of(checkpoint), planned(checkpoint, "fp8"), None)


def test_elsewhere_it_is_refused_with_the_reason(checkpoint, monkeypatch):
    with pytest.raises(UnsupportedError, match="tensorrt cannot run on cpu: it runs on cuda, not on cpu"):
        prepare(checkpoint, name="x", device=CPU, run=RunSpec(engine="tensorrt"))
    monkeypatch.setattr(support, "installed", lambda package: False)
    why = support.why_not_engine("tensorrt", torch.device("cuda"))
    assert why == "tensorrt is not installed (pip install 'vitopt[tensorrt]')"


def test_a_format_asks_for_a_card_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(support, "compute_capability", lambda device: (8, 0))
    assert "8.9" in (tensorrt.why_not("fp8") or "") and tensorrt.why_not("bf16") is None
