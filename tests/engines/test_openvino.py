"""OpenVINO against torch in float64, its formats as they run, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitopt import threads
from vitopt.engines import package
from vitopt.errors import PatternError, UnsupportedError
from vitopt.models.checkpoint import load_model
from vitopt.recipe import VariantSpec

openvino = pytest.importorskip("openvino")
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def variant(format, **changes):
    return VariantSpec(name="v", format=format, engine="openvino", **changes)


def error(found, checkpoint, pixel_values):
    with torch.inference_mode():
        wanted = load_model(checkpoint, dtype=torch.float64)(pixel_values.double()).logits
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("format", "least", "most"), [("fp32", 0, 1e-5), ("bf16", 1e-4, 0.03)])
def test_floating_point_is_that_of_torch(format, least, most, checkpoint, run_with, pixel_values):
    if format == "bf16" and not HAS_BF16:
        pytest.skip("this processor has no bf16 arithmetic")
    runnable = run_with(checkpoint, variant(format))
    assert least <= error(runnable(pixel_values), checkpoint, pixel_values) < most
    assert set(runnable.describe()["layers"].values()) == {format}


def test_each_batch_size_gives_the_same_answers(checkpoint, run_with, pixel_values):
    runnable = run_with(checkpoint, variant("fp32"))
    together = runnable(pixel_values)
    assert torch.allclose(together, torch.cat([runnable(one[None]) for one in pixel_values]), atol=1e-5)
    kept = together.clone()
    runnable(torch.zeros_like(pixel_values))
    assert torch.equal(together, kept)  # no memory of the engine


def test_int8_rounds_the_layers_that_the_plan_names(checkpoint, calibration, run_with, pixel_values, tmp_path):
    pytest.importorskip("nncf")
    errors = {}
    for name, skip, images in (
        ("calls", [], None),
        ("fixed", [], calibration),
        ("calls, less", ["block.0", "fc2"], None),
        ("fixed, less", ["block.0", "fc2"], calibration),
    ):
        one = variant("w8a8", skip=skip)
        plan = package.make(checkpoint, one, tmp_path / name, images=images)
        runnable = run_with(tmp_path / name, one)
        errors[name] = error(runnable(pixel_values), checkpoint, pixel_values)
        int8 = "w8" if "w8" in (live := runnable.describe()["layers"]).values() else "w8a8"
        assert int8 == "w8a8" or images is None  # not every processor rounds activations in each call
        rest = "bf16" if HAS_BF16 else "fp32"
        assert live == {layer.layer.logical: int8 if layer.format == "w8a8" else rest for layer in plan.layers}
    assert 1e-3 < errors["calls, less"] < errors["calls"] < errors["fixed"] < 0.5
    assert errors["fixed, less"] < errors["fixed"]


def test_refusals_name_the_remedy(checkpoint, monkeypatch, tmp_path):
    with pytest.raises(PatternError, match=r"block\.9"):
        package.make(checkpoint, variant("w8a8", skip=["block.9"]), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setattr("vitopt.environment.support.installed", lambda name: name != "nncf")
    with pytest.raises(UnsupportedError, match=r"nncf.*pip install 'vitopt\[openvino\]'"):
        package.make(checkpoint, variant("w8a8"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_operator_that_it_lacks_is_told(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(openvino, "convert_model", lambda *args, **options: 1 / 0)
    with pytest.raises(UnsupportedError, match=r"ViTForImageClassification.*division"):
        package.make(checkpoint, variant("fp32"), tmp_path / "a")


def test_bf16_needs_a_processor_that_has_it(checkpoint, monkeypatch, run_with):
    monkeypatch.setattr(openvino.Core, "get_property", lambda *args: ["FP32"])
    with pytest.raises(UnsupportedError, match=r"bf16.*processor"):
        run_with(checkpoint, variant("bf16"))


BOUND = """
import os, sys
from pathlib import Path
from vitopt import threads
threads.bind(2)
import torch
torch.randn(512, 512) @ torch.randn(512, 512)  # OpenMP holds this thread on one CPU now
from vitopt.engines import openvino
assert openvino.why_not("fp32") is None
call = openvino.load(Path(sys.argv[1]), {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"})
call(torch.zeros(1, 3, 32, 32).numpy())
(request,) = call._compiled.values()
print(request.get_compiled_model().get_property("INFERENCE_NUM_THREADS"), len(os.sched_getaffinity(0)))
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(threads.physical_cores(os.sched_getaffinity(0))) < 2,
    reason="needs two cores that threads can be bound to",
)
def test_threads_that_are_bound_do_not_keep_it_on_one_core(checkpoint, tmp_path):
    package.make(checkpoint, variant("fp32"), tmp_path)
    (file,) = tmp_path.rglob("*.xml")
    command = [sys.executable, "-c", BOUND, str(file.parent)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["2", "1"]  # threads of OpenVINO; CPUs of the thread that OpenMP still holds
