"""A compiled file against torch in float64: formats, batch sizes, options, and where it is not used."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from vitopt.engines import aoti, note, package
from vitopt.engines.runtime import prepare
from vitopt.environment import devices, support
from vitopt.errors import UnsupportedError
from vitopt.measure.memory import peak_memory
from vitopt.models.checkpoint import load_model, open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.prediction import predict
from vitopt.recipe import RunSpec, VariantSpec

CPU = torch.device("cpu")
if reason := support.why_not_compile(CPU):
    pytest.skip(reason, allow_module_level=True)


def variant(format="fp32", **changes):
    return VariantSpec(name="v", format=format, engine="aoti", **changes)


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """An exact variant in fp32."""
    folder = tmp_path_factory.mktemp("aoti") / "made"
    package.make(checkpoint, variant(fuse_qkv=True), folder)
    return folder


def error(found, checkpoint, pixel_values):
    with torch.inference_mode():
        wanted = load_model(checkpoint, dtype=torch.float64)(pixel_values.double()).logits
    return float((found.double() - wanted).norm() / wanted.norm())


def test_it_computes_what_torch_does_at_every_batch_size(made, checkpoint, run_with, pixel_values):
    runnable = run_with(made, variant(fuse_qkv=True))
    for count in (1, 2, 3):
        assert error(runnable(pixel_values[:count]), checkpoint, pixel_values[:count]) < 1e-5
    told = runnable.describe()
    assert set(told["layers"].values()) == {"fp32"} and not runnable.fixed_shapes
    assert told["variant"].ran["fuse_qkv"] and told["variant"].ran["engine"] == "aoti"
    assert told["size"].weight_bytes == 4 * told["model"].parameters


def test_torch_formats_and_rewrites_are_compiled_in(checkpoint, run_with, pixel_values, tmp_path):
    exact = dict.fromkeys(("class_token_last", "carry_residual", "patch_product"), True)
    asked = variant("w8a8", skip=["block.0"], **exact)
    package.make(checkpoint, asked, tmp_path / "v")
    runnable = run_with(tmp_path / "v", asked)
    plain = prepare(open_checkpoint(str(tmp_path / "v")), name="x", device=CPU)
    assert runnable.describe()["layers"] == plain.layers and {"w8a8", "bf16"} <= set(plain.layers.values())
    of_torch = error(plain(pixel_values), checkpoint, pixel_values)
    assert 1e-3 < error(runnable(pixel_values), checkpoint, pixel_values) < 1.5 * of_torch
    assert exact.items() <= runnable.describe()["variant"].ran.items()


def test_merged_tokens_are_compiled_in(checkpoint, pixel_values):
    fewer = RunSpec(engine="aoti", merge_tokens="4")
    runnable, plain = (prepare(checkpoint, name="x", device=CPU, run=run) for run in (fewer, RunSpec(merge_tokens="4")))
    assert error(plain(pixel_values), checkpoint, pixel_values) > 1e-3
    for count in (1, 3):
        torch.testing.assert_close(runnable(pixel_values[:count]), plain(pixel_values[:count]), rtol=1e-4, atol=1e-5)
    assert runnable.describe()["variant"].ran["merge_tokens"] == "4"


def test_an_export_classifies_a_photo_with_torch_alone(made, checkpoint, classes_of, shapes, tmp_path):
    output = tmp_path / "export"
    exported = package.export(open_checkpoint(str(made)), variant(), output, "cpu", as_it_is=True)
    assert exported == package.read_package(made / "aoti")
    photo, script = next((shapes / "test").rglob("*.png")), output / "example.py"
    found = classes_of(script, photo, without="vitopt,transformers,torchao")
    (wanted,) = predict(checkpoint.location, [photo], top=4)
    assert [name for name, _ in found] == [guess["label"] for guess in wanted["classes"]]
    content = json.loads((output / "engine.json").read_text())
    (output / "engine.json").unlink()  # it may be a link to that of the checkpoint
    content["settings"]["torch"] = "1.0"
    (output / "engine.json").write_text(json.dumps(content))
    done = subprocess.run([sys.executable, script, photo], capture_output=True, text=True)
    assert done.returncode == 1 and "torch 1.0" in done.stderr


def test_its_memory_is_that_of_a_process_of_its_own(made, run_with):
    memory = peak_memory(run_with(made, variant(fuse_qkv=True)), batch_size=2)
    assert memory.peak_bytes > 2**20 and memory.kind == "resident_set"


@pytest.mark.parametrize("change", ["device", "options", "version", "user"])
def test_a_file_that_does_not_fit_is_made_anew_and_said(change, made, monkeypatch, caplog, tmp_path):
    run = RunSpec(engine="aoti", fuse_qkv=True, patch_product=change == "options")
    if change == "device":
        monkeypatch.setattr(devices, "kind", lambda device: "another processor")
    if change == "version":
        monkeypatch.setattr(note, "installed_version", lambda engine: "9.9")

    if change == "user":
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    class Anew(Exception):
        pass

    def write(model, *_):
        assert model.fused_attentions == 2
        raise Anew

    monkeypatch.setattr(aoti, "write", write)
    monkeypatch.setattr(aoti, "load", lambda *_: pytest.fail("a file that does not fit was opened"))
    with caplog.at_level(logging.WARNING), pytest.raises(Anew):
        prepare(open_checkpoint(str(made)), name="x", device=CPU, run=run)
    told = {"device": "this is another processor", "options": "other run options", "version": "this is 9.9"}
    assert "made anew" in caplog.text
    assert told.get(change, "machine code that this user's vitopt did not write") in caplog.text


def test_without_options_the_file_is_taken_as_it_was_made(made, monkeypatch):
    monkeypatch.setattr(aoti, "write", lambda *_: pytest.fail("it is there"))
    runnable = prepare(open_checkpoint(str(made)), name="x", device=CPU, run=RunSpec(engine="aoti"))
    assert runnable.describe()["variant"].asked["fuse_qkv"]


def test_pixels_of_another_size_are_refused(made, run_with):
    with pytest.raises(UnsupportedError, match="aoti file was made for 32 x 32 pixels, not 48 x 32"):
        run_with(made, variant(fuse_qkv=True))(torch.zeros(1, 3, 48, 32))


def test_what_cannot_be_compiled_is_told(checkpoint, run_with, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: 1 / 0)
    with pytest.raises(UnsupportedError, match=r"ViTForImageClassification to a file: ZeroDivisionError"):
        run_with(checkpoint, variant())
    monkeypatch.setattr(support, "why_not_compile", lambda device: "no C++ compiler is found")
    with pytest.raises(UnsupportedError, match=r"aoti cannot run on cpu: no C\+\+ compiler"):
        package.make(checkpoint, variant(), tmp_path / "v")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("format", ["nf4", "int4", "int8"])
def test_packed_formats_are_refused_by_name(format, checkpoint, tmp_path):
    with pytest.raises(ValidationError, match=rf"aoti` has no {format}; it has fp32"):
        variant(format)


def test_a_packed_checkpoint_is_refused_with_what_runs(checkpoint, tmp_path):
    quantize(checkpoint, VariantSpec(name="q", format="nf4"), tmp_path / "q")
    with pytest.raises(UnsupportedError, match=r"nf4, which aoti does not run; it runs fp32"):
        prepare(open_checkpoint(str(tmp_path / "q")), name="x", device=CPU, run=RunSpec(engine="aoti"))


@pytest.mark.parametrize("option", ["compile", "gelu_epilogue", "sdpa_kernel"])
def test_options_that_it_cannot_keep_are_refused(option):
    with pytest.raises(ValidationError, match=rf"aoti.*`{option}`"):
        RunSpec(engine="aoti", **{option: "math" if option == "sdpa_kernel" else True})
