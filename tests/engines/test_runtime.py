"""Preparing a checkpoint for an engine: whose file is taken, what is refused, what is told of it."""

import logging

import pytest
import torch

from vitopt import inference
from vitopt.data.images import open_images
from vitopt.engines import note, package, runtime
from vitopt.engines.runtime import prepare
from vitopt.errors import CheckpointError, MeasurementError, UnsupportedError
from vitopt.inference import Candidate
from vitopt.measure.memory import peak_memory
from vitopt.models.checkpoint import load_model, load_processor, open_checkpoint, save_checkpoint
from vitopt.recipe import DataSpec, EvaluateSpec, RunSpec, VariantSpec

QUICK = {"end_to_end": False, "look_alikes": False}
RUN = RunSpec(engine="openvino")
FP32 = VariantSpec(name="v", format="fp32", engine="openvino")
INT8 = VariantSpec(name="v", format="w8a8", engine="openvino")


def opened(folder, asked=None):
    return prepare(open_checkpoint(str(folder)), name="x", device=torch.device("cpu"), run=RUN, asked=asked)


def test_a_checkpoint_without_a_file_gets_one_for_this_time(engine, checkpoint, pixel_values):
    runnable = prepare(checkpoint, name="x", device=torch.device("cpu"), run=RUN)
    assert torch.allclose(runnable(pixel_values), load_model(checkpoint)(pixel_values).logits, atol=1e-5)
    told = runnable.describe()
    expected = {"engine": "openvino", "scaled_decoding": False, "static_scales": False}
    assert told["variant"].ran == told["variant"].asked == expected
    assert told["size"].weight_bytes == 4 * told["model"].parameters and told["size"].disk_bytes is None


def test_the_file_beside_a_checkpoint_is_taken(engine, checkpoint, calibration, tmp_path, caplog):
    package.make(checkpoint, INT8, tmp_path / "v", images=calibration)
    for asked in (INT8, None):
        runnable = opened(tmp_path / "v", asked)
        assert runnable.describe()["variant"].format == "w8a8"
        assert len(runnable.images_seen()[0].image_sha256) == len(calibration)
        files = (tmp_path / "v" / "openvino").iterdir()
        assert runnable.describe()["size"].disk_bytes == sum(file.stat().st_size for file in files)
    assert not caplog.records


@pytest.mark.parametrize("change", ["version", "weights"])
def test_a_file_that_no_longer_fits_is_made_anew_or_refused(change, engine, checkpoint, tmp_path, caplog):
    for variant in (FP32, INT8):
        package.make(checkpoint, variant, tmp_path / variant.format)
    if change == "version":
        engine.version[0] = "2"
    else:
        for format in ("fp32", "w8a8"):
            model = load_model(checkpoint)
            model.classifier.bias.data += 1
            save_checkpoint(model, load_processor(checkpoint), tmp_path / format)
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path / "fp32", FP32).package.version == engine.version[0]
    assert "made anew" in caplog.text and ("1 made it, this is 2" if change == "version" else "changed") in caplog.text
    with pytest.raises(UnsupportedError, match=r"vitopt export --engine openvino --format w8a8"):
        opened(tmp_path / "w8a8", INT8)


def test_pixels_of_another_size_are_refused(engine, checkpoint):
    runnable = prepare(checkpoint, name="x", device=torch.device("cpu"), run=RUN)
    with pytest.raises(UnsupportedError, match="32 x 32 pixels, not 48 x 32"):
        runnable(torch.zeros(1, 3, 48, 32))


def test_what_cannot_run_says_why(engine, checkpoint, monkeypatch, tmp_path):
    with pytest.raises(UnsupportedError, match=r"openvino.*runs on cpu, not on meta"):
        prepare(checkpoint, name="x", device=torch.device("meta"), run=RUN)
    half = tmp_path / "fp16"
    half.mkdir()
    save_checkpoint(load_model(checkpoint, dtype=torch.float16), load_processor(checkpoint), half)
    with pytest.raises(UnsupportedError, match=r"fp16.*fp32, bf16, w8a8"):
        opened(half)
    monkeypatch.setattr("vitopt.environment.support.installed", lambda name: False)
    with pytest.raises(UnsupportedError, match=r"openvino is not installed \(pip install 'vitopt\[openvino\]'\)"):
        prepare(checkpoint, name="x", device=torch.device("cpu"), run=RUN)


def test_a_kept_file_tells_its_memory_without_torch(checkpoint, tmp_path):
    pytest.importorskip("openvino")
    package.make(checkpoint, FP32, tmp_path / "v")
    memory = peak_memory(opened(tmp_path / "v", FP32), batch_size=2)
    assert 2**20 < memory.peak_bytes < 250 * 2**20 and memory.kind == "resident_set"  # torch alone takes more
    with pytest.raises(MeasurementError, match="openvino"):
        opened(checkpoint.location).alone(1)


def test_a_broken_note_is_an_error(engine, checkpoint, tmp_path):
    package.make(checkpoint, FP32, tmp_path / "v")
    (tmp_path / "v" / "openvino" / "engine.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"engine\.json"):
        opened(tmp_path / "v", FP32)


def test_it_is_measured_beside_torch(engine, checkpoint, shapes):
    spec = EvaluateSpec.model_validate({"latency": {"iterations": 4, "rounds": 2, "warmup_seconds": 0}} | QUICK)
    candidates = [
        Candidate("torch", checkpoint.location),
        Candidate("engine", checkpoint.location, RUN),
        Candidate("lacking", checkpoint.location, RUN, INT8),
    ]
    images = open_images(DataSpec(source=str(shapes)), "test")
    measured = inference.measure(candidates, spec, images=images, baseline="torch")
    second, third = measured[1].record, measured[2].record
    assert second.versus_baseline.agreement_percent == 100 and second.versus_baseline.mean_kl_divergence < 1e-6
    assert "w8a8" in third.failure


class FakeGraphs:
    """Stands in for CUDA graphs, which a CPU does not have."""

    def __init__(self, call, cast):
        self.call, self.cast, self.error = call, cast, None

    def __call__(self, pixel_values):
        if self.error is not None:
            raise self.error
        return self.call(self.cast(pixel_values)).clone()

    def peak_bytes(self, shape):
        return 7


class OnDevice:
    """A call that takes and gives tensors."""

    fixed_shapes = False

    def __call__(self, pixel_values):
        assert isinstance(pixel_values, torch.Tensor)
        return pixel_values.flatten(1)[:, :4] + 1


@pytest.fixture
def on_gpu(checkpoint, monkeypatch):
    monkeypatch.setattr(runtime, "Graphs", FakeGraphs)
    held = note.Package("tensorrt", "11", "bf16", checkpoint.fingerprint(), False, {})
    made = {"device": torch.device("cuda"), "run": RunSpec(engine="tensorrt")}
    return runtime.EngineRunnable("x", checkpoint, held, OnDevice(), **made)


def test_calls_on_a_gpu_are_captured_and_stay_on_the_device(on_gpu, pixel_values):
    assert torch.equal(on_gpu(pixel_values.double()), pixel_values.flatten(1)[:, :4] + 1)
    assert on_gpu.fixed_shapes and on_gpu.graph_bytes(pixel_values.shape) == 7


def test_what_cannot_be_captured_runs_without_a_graph_and_says_so(on_gpu, pixel_values, caplog):
    on_gpu._graphs.error = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        on_gpu(pixel_values)
    on_gpu._graphs.error = RuntimeError("operation not permitted when stream is capturing")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(on_gpu(pixel_values), pixel_values.flatten(1)[:, :4] + 1)
    assert not on_gpu.fixed_shapes and on_gpu.graph_bytes(pixel_values.shape) == 0
    assert "not permitted" in caplog.text and "not permitted" in on_gpu.reasons["cuda graph"]
