"""Quantized checkpoints: they follow the plan, open without vitopt, and are complete or absent."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from vitopt.data.pixels import random_pixels
from vitopt.errors import CheckpointError, MeasurementError, PatternError, RecipeError, StorageError, UnsupportedError
from vitopt.models.checkpoint import disk_bytes, load_model, open_checkpoint
from vitopt.optimize import quantize as module
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.quantize import plan_for, quantize
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.ownership import LIST_FILE
from vitopt.recipe import VariantSpec

CPU = torch.device("cpu")

VARIANTS = [
    {"name": "fp32", "format": "fp32"},
    {"name": "fp16", "format": "fp16"},
    {"name": "bf16", "format": "bf16"},
    {"name": "nf4", "format": "nf4"},
    {"name": "nf4-skip", "format": "nf4", "skip": ["block.1", "block.*.fc2"]},
    {"name": "nf4-fp16", "format": "nf4", "half": "fp16"},
    {"name": "int8", "format": "int8"},
    {"name": "int8-skip", "format": "int8", "skip": ["block.0.query"]},
    {"name": "w8a8", "format": "w8a8"},
    {"name": "w8a8-skip", "format": "w8a8", "skip": ["block.2", "block.0.fc1"]},
    {"name": "bf16-some-w8a8", "format": "bf16", "layers": {"block.1": "w8a8"}},
]
NAMES = [variant["name"] for variant in VARIANTS]

# Opens every folder with nothing but transformers and saves its logits.
PLAIN = """
import sys, numpy, torch
from pathlib import Path
sys.modules["kernels"] = None  # bitsandbytes would ask the network for CPU kernels
root, threads = Path(sys.argv[1]), int(sys.argv[2])
from transformers import AutoImageProcessor, AutoModelForImageClassification
torch.set_num_threads(threads)
pixels, logits = torch.from_numpy(numpy.load(root / "pixels.npy")), {}
for name in sys.argv[3:]:
    model = AutoModelForImageClassification.from_pretrained(root / name)
    AutoImageProcessor.from_pretrained(root / name)
    with torch.inference_mode():
        logits[name] = model(pixels.to(model.dtype)).logits.float().numpy()
assert not [name for name in sys.modules if name.split(".")[0] == "vitopt"], "vitopt was imported"
numpy.savez(root / "plain.npz", **logits)
"""


def spec(variant: dict[str, object]) -> VariantSpec:
    return VariantSpec(**variant)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def plans(tiny_checkpoint: Path, root: Path) -> dict[str, LayerPlan]:
    """One folder per variant below `root`, and the plans that `quantize` says it carried out."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    return {v["name"]: quantize(checkpoint, spec(v), root / v["name"], "cpu") for v in VARIANTS}


@pytest.fixture(scope="module")
def runnables(plans: dict[str, LayerPlan], root: Path) -> dict[str, TorchRunnable]:
    return {name: prepare(open_checkpoint(str(root / name)), name=name, device=CPU) for name in plans}


@pytest.fixture(scope="module")
def plain_logits(plans: dict[str, LayerPlan], root: Path) -> dict[str, np.ndarray]:
    np.save(root / "pixels.npy", random_pixels(5, (32, 32)).numpy())
    command = [sys.executable, "-c", PLAIN, str(root), str(torch.get_num_threads()), *plans]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, HF_HUB_OFFLINE="1"), cwd=root)
    assert done.returncode == 0, done.stderr
    return dict(np.load(root / "plain.npz"))


@pytest.mark.parametrize("name", NAMES)
def test_live_layers_are_what_the_plan_says(
    name: str, tiny_checkpoint: Path, plans: dict[str, LayerPlan], runnables: dict[str, TorchRunnable]
) -> None:
    variant = next(v for v in VARIANTS if v["name"] == name)
    planned = plan_for(open_checkpoint(str(tiny_checkpoint)), spec(variant))
    assert plans[name] == planned
    assert runnables[name].layers == {one.layer.logical: one.format for one in planned.layers}


@pytest.mark.parametrize("name", NAMES)
def test_plain_transformers_gives_the_same_logits_to_the_bit(
    name: str, plain_logits: dict[str, np.ndarray], runnables: dict[str, TorchRunnable]
) -> None:
    runnable = runnables[name]
    pixels = random_pixels(5, (32, 32)).to(runnable.model.dtype)
    np.testing.assert_array_equal(runnable(pixels).float().numpy(), plain_logits[name])


def test_formats_lose_what_is_known_of_them(plain_logits: dict[str, np.ndarray], tiny_checkpoint: Path) -> None:
    with torch.inference_mode():
        exact = load_model(open_checkpoint(str(tiny_checkpoint)))(random_pixels(5, (32, 32))).logits.numpy()
    error = {name: np.linalg.norm(logits - exact) / np.linalg.norm(exact) for name, logits in plain_logits.items()}
    assert error["fp32"] == 0
    assert 0 < error["fp16"] < error["bf16"] < 0.05
    assert 0 < error["int8"] < 0.05 and 0 < error["w8a8"] < 0.05
    assert 0.05 < error["nf4"] < 0.3  # four bits: an order of magnitude more than eight


def test_a_quantized_folder_holds_a_whole_checkpoint(plans: dict[str, LayerPlan], root: Path) -> None:
    for name in plans:
        held = {path.name for path in (root / name).iterdir()}
        assert held == {"config.json", "model.safetensors", "preprocessor_config.json", "origin.json", LIST_FILE}
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


# The sixteen values of NormalFloat 4: QLoRA, arXiv 2305.14314, appendix E.
NF4_VALUES = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)  # fmt: skip


def blocks_of_64(checkpoint: Path, linear: str) -> np.ndarray:
    """(blocks, 64): the weights of a layer as bitsandbytes gets them."""
    weight = load_model(open_checkpoint(str(checkpoint)), dtype=torch.bfloat16).get_submodule(linear).weight
    return weight.detach().double().numpy().reshape(-1, 64)


# module -> its name in the file, which transformers has kept since before it renamed the modules
@pytest.mark.parametrize(
    ("linear", "stored"),
    [
        ("vit.layers.0.attention.q_proj", "vit.encoder.layer.0.attention.attention.query.weight"),
        ("vit.layers.2.mlp.fc2", "vit.encoder.layer.2.output.dense.weight"),
    ],
)
def test_nf4_weights_are_the_nearest_of_16_values_in_blocks_of_64(
    linear: str, stored: str, tiny_checkpoint: Path, plans: dict[str, LayerPlan], root: Path
) -> None:
    original = blocks_of_64(tiny_checkpoint, linear)
    tensors = load_file(root / "nf4" / "model.safetensors")
    held = {name.removeprefix(stored): tensor for name, tensor in tensors.items() if name.startswith(stored)}
    packed = held[""].numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1, 64)
    largest = np.abs(original).max(axis=1, keepdims=True)
    nearest = np.abs(original[..., None] / largest[..., None] - NF4_VALUES).argmin(axis=-1)
    assert (codes == nearest).mean() > 0.999  # the rest lie half-way within rounding
    assert np.abs(codes.astype(int) - nearest).max() <= 1

    # Double quantization: block maxima in 8 bit, less their mean, themselves in blocks of 256.
    state = json.loads(bytes(held[".quant_state.bitsandbytes__nf4"].numpy()).decode())
    assert state["blocksize"] == 64 and state["nested_blocksize"] == 256
    scale = np.repeat(held[".nested_absmax"].double().numpy(), 256)[: len(original), None]
    maxima = (
        held[".nested_quant_map"].double().numpy()[held[".absmax"].numpy()][:, None] * scale + state["nested_offset"]
    )
    spread = np.abs(largest - largest.mean()).max()
    assert np.abs(maxima - largest).max() < 0.05 * spread
    np.testing.assert_allclose(held[".quant_map"].double().numpy(), NF4_VALUES, atol=1e-6)


def test_live_nf4_weights_are_close_to_an_nf4_round_trip(
    tiny_checkpoint: Path, runnables: dict[str, TorchRunnable]
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    blocks = blocks_of_64(tiny_checkpoint, "vit.layers.1.mlp.fc1")
    # Loaded afresh: the first call of a model on the CPU repacks its weights.
    fresh = load_model(runnables["nf4"].checkpoint).get_submodule("vit.layers.1.mlp.fc1")
    live = dequantize_4bit(fresh.weight.data, fresh.weight.quant_state).double().numpy()
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = np.abs(blocks[..., None] / largest[..., None] - NF4_VALUES).argmin(axis=-1)
    round_trip = (NF4_VALUES[nearest] * largest).reshape(live.shape)
    bound = 0.05 * np.abs(largest - largest.mean()).max() + 2**-8 * largest.max()  # 8-bit maxima, bf16 result
    assert np.abs(live - round_trip).max() < bound


def test_norms_and_embeddings_are_not_quantized(plans: dict[str, LayerPlan], root: Path) -> None:
    for name, half in (("nf4", torch.bfloat16), ("nf4-fp16", torch.float16), ("int8", torch.bfloat16)):
        tensors = load_file(root / name / "model.safetensors")
        wide = [key for key in tensors if "norm" in key or "embeddings" in key or key.startswith("classifier")]
        assert len(wide) > 10
        assert {tensors[key].dtype for key in wide} == {half}, name


def test_nf4_is_well_under_half_of_bf16_on_disk_where_linear_layers_dominate(tmp_path: Path) -> None:
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=1024, num_labels=4,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "wide")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "wide")
    wide = open_checkpoint(str(tmp_path / "wide"))
    sizes = {}
    for format in ("bf16", "nf4", "int8"):
        quantize(wide, VariantSpec(name=format, format=format), tmp_path / format, "cpu")
        sizes[format] = disk_bytes(tmp_path / format)
    assert sizes["nf4"] < 0.4 * sizes["bf16"]
    assert sizes["int8"] < 0.6 * sizes["bf16"]


@pytest.mark.parametrize("format", ["nf4", "int8", "w8a8"])
def test_linear_layers_between_the_blocks_stay_in_16_bit(format: str, tmp_path: Path) -> None:
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=64, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=4
    )  # fmt: skip
    torch.manual_seed(0)
    SwinForImageClassification(config).save_pretrained(tmp_path / "swin")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "swin")
    checkpoint = open_checkpoint(str(tmp_path / "swin"))
    plan = quantize(checkpoint, VariantSpec(name="v", format=format), tmp_path / "out", "cpu")
    assert plan.counts() == {format: 12, "bf16": 1}
    assert plan.unlisted == ("swin.encoder.layers.0.downsample.reduction",)
    runnable = prepare(open_checkpoint(str(tmp_path / "out")), name="v", device=CPU)
    between = runnable.model.get_submodule(plan.unlisted[0])
    assert type(between) is torch.nn.Linear and between.weight.dtype == torch.bfloat16
    logits = runnable(random_pixels(2, (32, 32))).float()
    with torch.inference_mode():
        exact = load_model(checkpoint)(random_pixels(2, (32, 32))).logits
    assert (logits - exact).norm() < 0.3 * exact.norm()


@pytest.mark.parametrize("name", ["nf4", "int8", "w8a8"])
def test_a_quantized_checkpoint_is_not_quantized_again(
    name: str, plans: dict[str, LayerPlan], root: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(root / name))
    with pytest.raises(CheckpointError, match=r"is quantized already; start from the 16- or 32-bit checkpoint"):
        quantize(checkpoint, VariantSpec(name="v", format="int8"), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_int4_on_the_cpu_is_refused_with_the_nearest_format(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"format int4 cannot run on cpu: .* the nearest that can is nf4"):
        quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="v", format="int4"), tmp_path / "out", "cpu")


def test_fp8_on_the_cpu_is_refused_with_the_nearest_format(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"format fp8 cannot run on cpu: .* the nearest that can is w8a8"):
        quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="v", format="fp8"), tmp_path / "out", "cpu")
    # also where only one layer asks for it
    with pytest.raises(UnsupportedError, match="format fp8 cannot run on cpu"):
        variant = VariantSpec(name="v", format="w8a8", layers={"block.0.fc1": "fp8"})
        quantize(open_checkpoint(str(tiny_checkpoint)), variant, tmp_path / "out", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_nf4_and_w8a8_are_not_mixed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    variant = VariantSpec(name="v", format="nf4", layers={"block.0": "w8a8"})
    with pytest.raises(RecipeError, match="formats nf4 and w8a8 cannot be mixed in one checkpoint"):
        quantize(open_checkpoint(str(tiny_checkpoint)), variant, tmp_path / "out", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_skip_pattern_that_matches_nothing_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PatternError, match=r"pattern 'block.21' matches no layer; this model has block.0 to block.2"):
        variant = VariantSpec(name="v", format="nf4", skip=["block.21"])
        quantize(open_checkpoint(str(tiny_checkpoint)), variant, tmp_path / "out", "cpu")


def test_random_weights_are_quantized_as_if_they_had_been_in_a_file(tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    source = open_checkpoint("random:vit-tiny-patch16-32")
    plan = quantize(source, VariantSpec(name="v", format="nf4", skip=["block.1"]), tmp_path / "out", "cpu")
    assert plan.counts() == {"nf4": 66, "bf16": 7}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "origin.json",
        LIST_FILE,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    held = load_model(open_checkpoint(str(tmp_path / "out")))
    exact = load_model(source, dtype=torch.float32)
    for planned in plan.layers:
        weight = exact.get_submodule(planned.layer.module).weight.detach().bfloat16()
        live = held.get_submodule(planned.layer.module).weight
        if planned.format == "bf16":
            assert torch.equal(live, weight), planned.layer.logical
            continue
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        expected = dequantize_4bit(packed, state)
        assert torch.equal(dequantize_4bit(live.data, live.quant_state), expected), planned.layer.logical


@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "w8a8"])
def test_random_weights_of_every_format_come_from_the_same_numbers(format: str, tmp_path: Path) -> None:
    source = open_checkpoint("random:vit-tiny-patch16-32")
    quantize(source, VariantSpec(name="v", format=format), tmp_path / "out", "cpu")
    runnable = prepare(open_checkpoint(str(tmp_path / "out")), name="v", device=CPU)
    assert {name for name, live in runnable.layers.items() if live != format} <= {"classifier"}
    expected = prepare(source, name="v", device=CPU)(random_pixels(2, (32, 32)))
    assert (runnable(random_pixels(2, (32, 32))).float() - expected).norm() < 0.05 * expected.norm()


def test_a_library_that_ignores_the_plan_is_caught(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What transformers did when it renamed its modules: the skip list matched nothing and was ignored.
    config = module.quantization_config

    def forgetful(*args: object) -> object:
        made = config(*args)
        made.llm_int8_skip_modules = ["encoder.layer.1", "classifier"]
        return made

    monkeypatch.setattr(module, "quantization_config", forgetful)
    variant = VariantSpec(name="v", format="nf4", skip=["block.1"])
    with pytest.raises(
        CheckpointError, match=r"did not follow the layer plan \(6 layers; first: block.1.query is nf4, planned bf16\)"
    ):
        quantize(open_checkpoint(str(tiny_checkpoint)), variant, tmp_path / "out", "cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("kernel"), OSError(28, "No space left on device")])
def test_failing_half_way_leaves_what_was_there_before(
    error: BaseException, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_way(model: object, processor: object, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    variant = VariantSpec(name="v", format="bf16")
    quantize(open_checkpoint(str(tiny_checkpoint)), variant, tmp_path / "earlier", "cpu")
    before = (tmp_path / "earlier" / "model.safetensors").read_bytes()
    monkeypatch.setattr(module, "save_checkpoint", half_way)
    full = isinstance(error, OSError)
    for output in ("new", "earlier"):
        with pytest.raises(StorageError if full else type(error), match="the disk is full" if full else None):
            quantize(open_checkpoint(str(tiny_checkpoint)), variant, tmp_path / output, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    assert (tmp_path / "earlier" / "model.safetensors").read_bytes() == before


def test_what_does_not_run_is_not_written(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel(model: object, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.shape == (1, 3, 32, 32)
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr(module, "logits", kernel)
    with pytest.raises(UnsupportedError, match="nf4 does not run on cpu: AssertionError: N must be divisible"):
        quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="v", format="nf4"), tmp_path / "out", "cpu")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_finite_are_not_written(copy_of: Callable[[Path], Path], tiny_checkpoint: Path) -> None:
    folder = copy_of(tiny_checkpoint)
    model = load_model(open_checkpoint(str(folder)))
    with torch.no_grad():
        model.vit.layers[1].mlp.fc2.weight.mul_(3e5)  # within the range of bf16, beyond that of fp16
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    quantize(checkpoint, VariantSpec(name="v", format="bf16"), folder.parent / "bf16", "cpu")
    with pytest.raises(MeasurementError, match=r"overflow fp16, first vit\.layers\.1.*bf16"):
        quantize(checkpoint, VariantSpec(name="v", format="fp16"), folder.parent / "fp16", "cpu")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bf16", folder.name]


def test_the_proof_that_it_runs_leaves_the_file_as_it_was(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # bitsandbytes repacks weights in the first call on a CPU, and packs them back with rounded scales.
    from bitsandbytes.functional import quantize_4bit

    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="v", format="nf4"), tmp_path / "out", "cpu")
    held = load_file(tmp_path / "out" / "model.safetensors")["vit.encoder.layer.0.attention.attention.query.weight"]
    exact = load_model(open_checkpoint(str(tiny_checkpoint)), dtype=torch.bfloat16).vit.layers[0].attention.q_proj
    packed, _ = quantize_4bit(exact.weight.detach(), quant_type="nf4", compress_statistics=True)
    assert torch.equal(held.view(-1), packed.view(-1))


@pytest.mark.parametrize("format", ["nf4", "w8a8"])
def test_the_same_weights_are_the_same_bytes(tiny_checkpoint, tmp_path, format):
    written = []
    for name in ("first", "second"):
        variant = VariantSpec(name=format, format=format)
        quantize(open_checkpoint(str(tiny_checkpoint)), variant, tmp_path / name, device="cpu")
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert written[0] == written[1]
    assert load_model(open_checkpoint(str(tmp_path / "first"))) is not None
