"""One scale for all inputs of a layer: against a reference in float64, and what it costs a real model."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from vitopt.data.images import ImageSet, open_images
from vitopt.data.pixels import random_pixels
from vitopt.errors import CheckpointError, DataError, UnsupportedError
from vitopt.measure import accuracy
from vitopt.models.activations import ACTIVATIONS_FILE, LayerInputs, load_activations, save_activations
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint
from vitopt.optimize.calibrate import calibrate
from vitopt.optimize.formats import QUANTIZES
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import prepare
from vitopt.optimize.static import StaticLinear
from vitopt.recipe import DataSpec, RunSpec, VariantSpec
from vitopt.steps import CalibrateSpec

CPU = torch.device("cpu")
STATIC = RunSpec(static_scales=True)


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "train")


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint: Path, images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("calibrated") / "tiny"
    calibrate(open_checkpoint(str(tiny_checkpoint)), CalibrateSpec(), folder, "cpu", images=images)
    return open_checkpoint(str(folder))


@pytest.fixture
def w8a8(calibrated: Checkpoint, tmp_path: Path) -> Checkpoint:
    quantize(calibrated, VariantSpec(name="w8a8", format="w8a8"), tmp_path / "w8a8", "cpu")
    return open_checkpoint(str(tmp_path / "w8a8"))


def without_noise(checkpoint: Checkpoint) -> None:
    """Let all layers run with static scales, whatever these lose."""
    observed = load_activations(checkpoint.folder)
    save_activations(
        {name: dataclasses.replace(one, noise={"w8a8": 0.0}) for name, one in observed.items()},
        Path(str(checkpoint.folder)),
    )


@pytest.mark.parametrize(("format", "bias"), [("w8a8", True), ("w8a8", False), ("fp8", True)])
def test_products_are_those_of_the_rounded_values(fp8_on_the_cpu: None, format: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).to(torch.bfloat16)
    quantize_(linear, QUANTIZES[format]())
    inputs = 3 * torch.randn(2, 5, 64, dtype=torch.bfloat16)
    # Of the first token and of all others; some inputs are larger than these, and cut off.
    middle, reach = torch.randn(2, 64), torch.tensor([[2.0], [6.0]]) * (1 + torch.rand(2, 64)) / 2
    found = StaticLinear(linear, LayerInputs(middle - reach, middle + reach, {}))(inputs)
    rounded = torch.empty(2, 5, 64, dtype=torch.float64)
    for token in range(5):
        shift, half = middle[min(token, 1)].double(), reach[min(token, 1)].double()
        if format == "w8a8":
            step = half.max() / 127
            steps = ((inputs[:, token].double() - shift) / step).round().clamp(-127, 127)
            rounded[:, token] = steps * step + shift
        else:
            step = (shift.abs() + half).max() / 448
            steps = (inputs[:, token].double() / step).clamp(-448, 448)
            rounded[:, token] = steps.to(torch.float8_e4m3fn).double() * step
    expected = rounded @ (linear.weight.qdata.double() * linear.weight.scale.double()).T
    expected = expected if linear.bias is None else expected + linear.bias.double()
    assert found.dtype == torch.bfloat16 and found.shape == (2, 5, 48)
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-2)  # a tie may round either way


def test_calibration_sees_the_largest_input_of_every_layer(calibrated: Checkpoint, images: ImageSet) -> None:
    model, processor = load_model(calibrated), load_processor(calibrated)
    pixels = processor([images.image(index) for index in range(len(images))], return_tensors="pt")["pixel_values"]
    layer, taken = model.vit.layers[1].mlp.fc2, list[torch.Tensor]()
    layer.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    with torch.inference_mode():
        model(pixels.to(model.dtype))
    found = load_activations(calibrated.folder)
    assert set(found) == {f"block.{b}.{n}" for b in range(3) for n in ("query", "key", "value", "output", "fc1", "fc2")}
    one, first, patches = found["block.1.fc2"], taken[0][:, 0], taken[0][:, 1:].flatten(0, 1)
    for group, rows in enumerate((first, patches)):
        torch.testing.assert_close(one.largest[group], rows.amax(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.smallest[group], rows.amin(0), rtol=1e-3, atol=1e-6)
    assert 1e-6 < one.noise["w8a8"] < 0.1 and 1e-5 < one.noise["fp8"] < 0.1
    assert found["block.1.query"] is not found["block.1.output"] and found["block.1.key"] is found["block.1.query"]


def test_its_images_are_noted_and_its_scales_reach_what_is_quantized(w8a8: Checkpoint, images: ImageSet) -> None:
    (use,) = load_uses(w8a8.folder)
    assert use.image_sha256 == images.image_hashes and "scales" in use.purpose
    runnable = prepare(w8a8, name="static", device=CPU, run=STATIC)
    replaced = [name for name, module in runnable.model.named_modules() if isinstance(module, StaticLinear)]
    assert replaced and runnable.describe()["variant"].ran["static_scales"] == f"{len(replaced)} layers"
    assert prepare(w8a8, name="dynamic", device=CPU).describe()["variant"].ran["static_scales"] is False


def test_layers_that_lose_much_by_one_scale_keep_those_of_their_rows(w8a8: Checkpoint) -> None:
    observed = load_activations(w8a8.folder)
    lossy = {
        name: dataclasses.replace(one, noise={"w8a8": 1.0 if name.endswith("fc2") else 0.0})
        for name, one in observed.items()
    }
    save_activations(lossy, Path(str(w8a8.folder)))
    model = prepare(w8a8, name="static", device=CPU, run=STATIC).model
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            assert isinstance(module, StaticLinear) is not name.endswith("fc2")


def test_stacked_projections_and_a_class_token_alone_run_with_them(w8a8: Checkpoint) -> None:
    pixels = random_pixels(2, (32, 32))
    without_noise(w8a8)
    run = STATIC.model_copy(update={"fuse_qkv": True, "class_token_last": True, "carry_residual": True})
    rewritten = prepare(w8a8, name="rewritten", device=CPU, run=run)
    expected = prepare(w8a8, name="static", device=CPU, run=STATIC)(pixels)
    torch.testing.assert_close(rewritten(pixels), expected, rtol=0, atol=0.02)
    assert any(name.endswith("qkv_proj") for name, m in rewritten.model.named_modules() if isinstance(m, StaticLinear))


def test_one_compiled_block_serves_all_whatever_their_scales(w8a8: Checkpoint) -> None:
    without_noise(w8a8)
    runnable, pixels = prepare(w8a8, name="static", device=CPU, run=STATIC), random_pixels(1, (32, 32))
    expected, compiled = runnable(pixels), list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in runnable.model.vit.layers:
        layer.compile(fullgraph=True, dynamic=False, backend=backend)
    torch.testing.assert_close(runnable(pixels), expected, rtol=0, atol=0)
    assert len(compiled) == 1


def test_without_calibration_there_is_nothing_to_run_with(tiny_checkpoint: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(str(tiny_checkpoint))
    quantize(opened, VariantSpec(name="w8a8", format="w8a8"), tmp_path / "w8a8", "cpu")
    with pytest.raises(UnsupportedError, match="calibrate"):
        prepare(open_checkpoint(str(tmp_path / "w8a8")), name="static", device=CPU, run=STATIC)
    with pytest.raises(DataError, match="calibration images"):
        calibrate(opened, CalibrateSpec(), tmp_path / "calibrated", "cpu")


def test_random_weights_have_scales_of_random_pixels(tmp_path: Path) -> None:
    quantize(
        open_checkpoint("random:vit-tiny-patch16-32"), VariantSpec(name="v", format="w8a8"), tmp_path / "out", "cpu"
    )
    runnable = prepare(open_checkpoint(str(tmp_path / "out")), name="static", device=CPU, run=STATIC)
    assert any(isinstance(module, StaticLinear) for module in runnable.model.modules())
    assert torch.isfinite(runnable(random_pixels(1, (32, 32)))).all() and load_uses(tmp_path / "out") == ()


def test_an_unquantized_model_has_no_inputs_to_quantize(calibrated: Checkpoint) -> None:
    runnable = prepare(calibrated, name="fp32", device=CPU, run=STATIC)
    assert "w8a8" in runnable.reasons["static_scales"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schema": "vitopt.activations/1", "layers": {}}',
        '{"schema": "vitopt.activations/2", "inputs": 3}',
        '{"schema": "vitopt.activations/2", "inputs": [{"layers": ["a"], "smallest": [[2]], "largest": [[1]], '
        '"noise": {}}]}',
        '{"schema": "vitopt.activations/2", "inputs": [{"layers": ["a"], "smallest": [[0]], "largest": [[1]], '
        '"noise": {"w8a8": -1}}]}',
    ],
)
def test_scales_that_cannot_be_read_are_an_error_with_the_file(w8a8: Checkpoint, content: str) -> None:
    (Path(str(w8a8.folder)) / ACTIVATIONS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=ACTIVATIONS_FILE):
        prepare(w8a8, name="static", device=CPU, run=STATIC)


def test_scales_of_another_shape_are_refused_with_the_layer(w8a8: Checkpoint) -> None:
    observed = load_activations(w8a8.folder)
    save_activations(observed | {"block.0.fc2": observed["block.0.fc1"]}, Path(str(w8a8.folder)))
    with pytest.raises(CheckpointError, match=r"block\.0\.fc2"):
        prepare(w8a8, name="static", device=CPU, run=STATIC)


def test_other_scales_are_another_checkpoint(calibrated: Checkpoint, tiny_checkpoint: Path, tmp_path: Path) -> None:
    variant = VariantSpec(name="w8a8", format="w8a8")
    digests = set()
    for name, source in (("with", calibrated), ("without", open_checkpoint(str(tiny_checkpoint)))):
        quantize(source, variant, tmp_path / name, "cpu")
        digests.add(open_checkpoint(str(tmp_path / name)).fingerprint())
    assert len(digests) == 2


def test_a_real_model_agrees_on_photos_that_did_not_calibrate_it(shared: Path, tmp_path: Path) -> None:
    photos = open_images(DataSpec(source=str(shared / "data" / "imagenet-compatible-400"), labels="index"), "all")
    seen, held_out = (photos.subset(range(start, start + count)) for start, count in ((0, 8), (200, 12)))
    opened = open_checkpoint(str(shared / "models" / "vit-tiny-patch16-224"))
    calibrate(opened, CalibrateSpec(), tmp_path / "calibrated", "cpu", images=seen)
    quantize(
        open_checkpoint(str(tmp_path / "calibrated")), VariantSpec(name="w8a8", format="w8a8"), tmp_path / "w8a8", "cpu"
    )
    w8a8 = open_checkpoint(str(tmp_path / "w8a8"))
    variants = [
        prepare(opened, name="fp32", device=CPU),
        prepare(w8a8, name="dynamic", device=CPU),
        prepare(w8a8, name="static", device=CPU, run=STATIC),
    ]
    answers = accuracy.predict(variants, held_out, batch_size=12).predictions
    found = {name: accuracy.compare("fp32", answers["fp32"], answers[name]) for name in ("dynamic", "static")}
    layers = sum(isinstance(module, StaticLinear) for module in variants[2].model.modules())
    # Few images and columns that are not alike: layers behind GELU and more keep scales of their rows.
    assert 15 <= layers < 72
    assert found["static"].mean_kl_divergence < found["dynamic"].mean_kl_divergence + 0.005
