"""Every supported family in every format that runs on a CPU: fine-tune, quantize, evaluate, sensitivity, predict.

A small random model of each family is held in each format; what is measured is compared with plain transformers.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open

from vitopt import inference
from vitopt.data.images import ImageSet, open_images
from vitopt.data.pixels import Preprocessor, random_pixels
from vitopt.environment.support import why_not_format
from vitopt.errors import CheckpointError
from vitopt.inference import Candidate
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint
from vitopt.models.families import FAMILIES, TIMM
from vitopt.models.forward import flops_per_image
from vitopt.models.names import linear_layers
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import prepare
from vitopt.prediction import predict
from vitopt.recipe import (
    QUANTIZED_FORMATS,
    DataSpec,
    EvaluateSpec,
    FinetuneSpec,
    Format,
    LatencySpec,
    RunSpec,
    VariantSpec,
)
from vitopt.search import analysis, costs
from vitopt.training.finetune import finetune

CPU = torch.device("cpu")
FORMATS: list[Format] = [format for format in get_args(Format) if why_not_format(format, CPU) is None]
# Every family, and every class of it: as `random:` calls it -> model type, whether it has a head for a teacher
MODELS = {
    name.replace("-SIZE", ""): (model_type, bool(number))
    for model_type, family in FAMILIES.items()
    if model_type != TIMM or find_spec("timm")
    for number, name in enumerate(family.classes)
}
BRIEFLY = LatencySpec(iterations=2, rounds=2, warmup_seconds=0)

# Opens every folder with nothing but transformers and saves its logits for the same images.
PLAIN = """
import sys, numpy, torch
from pathlib import Path
sys.modules["kernels"] = None  # bitsandbytes would ask the network for CPU kernels
from transformers import AutoModelForImageClassification
torch.set_num_threads(int(sys.argv[2]))
logits = {}
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    pixels = torch.from_numpy(numpy.load(folder.with_name(folder.name.rpartition("-")[0] + ".npy")))
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.inference_mode():
        logits[folder.name] = model(pixels.to(model.dtype)).logits.float().numpy()
assert not [name for name in sys.modules if name.split(".")[0] == "vitopt"], "vitopt was imported"
numpy.savez(Path(sys.argv[1]) / "plain.npz", **logits)
"""


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes), limit=4), "test")


@pytest.fixture(scope="module")
def originals(make_family: Callable[..., Checkpoint]) -> dict[str, Checkpoint]:
    return {name: make_family(model_type, with_teacher=second) for name, (model_type, second) in MODELS.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("held")


@pytest.fixture(scope="module")
def plans(originals: dict[str, Checkpoint], root: Path) -> dict[tuple[str, Format], LayerPlan]:
    """Every model in every format, as the folder MODEL-FORMAT below `root`."""
    return {
        (name, format): quantize(checkpoint, VariantSpec(name=format, format=format), root / f"{name}-{format}", "cpu")
        for name, checkpoint in originals.items()
        for format in FORMATS
    }


@pytest.fixture(scope="module")
def plain(
    plans: dict[tuple[str, Format], LayerPlan], originals: dict[str, Checkpoint], images: ImageSet, root: Path
) -> dict[str, np.ndarray]:
    """Logits of all images from plain transformers, by name of the folder."""
    for name, checkpoint in originals.items():
        preprocess = Preprocessor(load_processor(checkpoint))
        np.save(root / f"{name}.npy", np.stack([preprocess(images.image(index)) for index in range(len(images))]))
    command = [sys.executable, "-c", PLAIN, str(root), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, HF_HUB_OFFLINE="1"), cwd=root)
    assert done.returncode == 0, done.stderr
    return dict(np.load(root / "plain.npz"))


def test_all_formats_but_those_that_need_a_gpu_are_tested() -> None:
    assert set(get_args(Format)) - set(FORMATS) <= {"int4", "fp8"}


@pytest.mark.parametrize("name", MODELS)
def test_is_held_as_planned_and_keeps_its_heads(name: str, plans: dict[tuple[str, Format], LayerPlan]) -> None:
    for format in FORMATS:
        plan = plans[name, format]
        heads = [planned for planned in plan.layers if planned.layer.is_head]
        assert len(heads) == (2 if name.endswith("distilled") else 1)
        if format not in QUANTIZED_FORMATS:
            assert plan.counts() == {format: len(plan.layers)}
            continue
        assert {planned.format for planned in heads} == {"bf16"}
        narrow = name.startswith("swin") and format == "nf4"
        inside = [planned for planned in plan.layers if not planned.layer.is_head]
        assert {planned.format for planned in inside} == ({format, "bf16"} if narrow else {format})
        assert list(plan.misfits()) == (["in_features 32 is no multiple of 64, as nf4 needs"] if narrow else [])


@pytest.mark.parametrize("name", MODELS)
def test_evaluates_in_every_format_to_the_logits_of_plain_transformers(
    name: str,
    plain: dict[str, np.ndarray],
    originals: dict[str, Checkpoint],
    images: ImageSet,
    root: Path,
) -> None:
    candidates = [
        Candidate(name=format, source=str(root / f"{name}-{format}"), run=RunSpec(), asked=None) for format in FORMATS
    ]
    spec = EvaluateSpec(batch_size=len(images), latency=BRIEFLY, end_to_end=False)
    measured = inference.measure(candidates, spec, images=images, baseline="fp32", device="cpu")
    flops = flops_per_image(originals[name])
    exact = plain[f"{name}-fp32"]
    for format, one in zip(FORMATS, measured, strict=True):
        assert one.record.failure is None and one.predictions is not None
        expected = plain[f"{name}-{format}"]
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(one.predictions.logits, expected)
        loss = np.linalg.norm(expected - exact) / np.linalg.norm(exact)
        assert loss < (0.75 if format == "nf4" else 0.2), format  # unrelated logits would give 1.4
        assert one.record.accuracy is not None and one.record.accuracy.images == len(images)
        correct = (expected.argmax(axis=1) == np.array(images.labels)).mean()
        assert one.record.accuracy.top1_percent == pytest.approx(100 * correct)
        assert [row.iterations for row in one.record.latency] == [BRIEFLY.iterations]
        assert one.record.model.flops_per_image == flops > 0
        assert one.record.variant.ran.get("attention") == ("eager" if name == "swinv2" else "sdpa")


@pytest.mark.parametrize("name", MODELS)
def test_predicts_in_every_format_what_plain_transformers_does(
    name: str, plain: dict[str, np.ndarray], images: ImageSet, shapes: Path, root: Path
) -> None:
    file = shapes / images.ids[0] if (shapes / images.ids[0]).is_file() else shapes / "test" / images.ids[0]
    for format in FORMATS:
        (found,) = predict(str(root / f"{name}-{format}"), [file], top=4, device="cpu")
        logits = torch.from_numpy(plain[f"{name}-{format}"][0])
        best = found["classes"][0]
        assert best["index"] == int(logits.argmax())
        # LLM.int8 looks for outliers over the whole batch, which is one image here.
        near = 5 if format == "int8" else 0.5
        assert best["percent"] == pytest.approx(100 * float(logits.softmax(-1).max()), abs=near)


@pytest.mark.parametrize("name", MODELS)
def test_a_skip_list_holds_in_the_file(name: str, originals: dict[str, Checkpoint], tmp_path: Path) -> None:
    plan = quantize(originals[name], VariantSpec(name="v", format="int8", skip=("block.1",)), tmp_path / "v", "cpu")
    packed = {f"{layer.layer.module}.weight" for layer in plan.layers if layer.layer.block not in (1, None)}
    with safe_open(tmp_path / "v" / "model.safetensors", framework="pt") as file:
        found = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    # transformers stores some families under the names of older versions.
    assert sum(dtype == "I8" for key, dtype in found.items() if key.endswith("weight")) == len(packed) > 0


@pytest.mark.parametrize("name", [name for name in MODELS if name != "deit-distilled"])
def test_lora_trains_the_linear_layers_of_the_blocks_and_the_head(
    name: str, originals: dict[str, Checkpoint], images: ImageSet, tmp_path: Path
) -> None:
    spec = FinetuneSpec(epochs=1, batch_size=4, rank=2, warmup_fraction=0, augment=False)
    finetune(originals[name], spec, tmp_path / "out", "cpu", images=images)
    before, after = (load_model(checkpoint) for checkpoint in (originals[name], open_checkpoint(str(tmp_path / "out"))))
    old, new = before.state_dict(), after.state_dict()
    layers = linear_layers(after, after.config.model_type)
    heads = {f"{layer.module}.bias" for layer in layers if layer.is_head}
    assert {key for key in new if not torch.equal(old[key], new[key])} == heads | {
        f"{layer.module}.weight" for layer in layers
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_scored_in_every_quantized_format(
    name: str, originals: dict[str, Checkpoint], images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "LATENCY", BRIEFLY)
    for format in set(FORMATS) & set(QUANTIZED_FORMATS):
        found = analysis.analyse(originals[name], images, format, tmp_path / f"{format}.json", device="cpu")
        blocks = 4 if name.startswith("swin") else 2
        assert [unit.unit for unit in found.units] == [f"block.{block}" for block in range(blocks)]
        assert found.quantized.kl > 0
        for unit in found.units:
            assert unit.damage.kl > 0 and unit.recovery.kl >= 0
            assert unit.extra_bytes > 0
            assert unit.extra_ms is not None  # the block itself could be called


def test_a_linear_layer_that_stays_in_16_bit_anyway_is_no_unit(
    originals: dict[str, Checkpoint], images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "LATENCY", BRIEFLY)
    found = analysis.analyse(originals["swin"], images, "nf4", tmp_path / "s.json", granularity="linear", device="cpu")
    # Of the first stage only fc2, 128 wide, is quantized.
    first_stage = [unit.unit for unit in found.units if unit.unit.startswith(("block.0.", "block.1."))]
    assert first_stage == ["block.0.fc2", "block.1.fc2"]
    assert len(found.units) == 2 + 2 * 6


def test_compiled_without_sdpa_it_answers_the_same(make_family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    variant = VariantSpec(name="v", format="bf16")
    quantize(make_family("swinv2", depths=[1], num_heads=[2]), variant, tmp_path / "held", device="cpu")
    checkpoint = open_checkpoint(str(tmp_path / "held"))
    plain = prepare(checkpoint, name="plain", device=CPU)
    compiled = prepare(checkpoint, name="compiled", device=CPU, run=RunSpec(compile=True))
    pixels = random_pixels(2, (32, 32))
    found, expected = compiled(pixels).float(), plain(pixels).float()
    assert compiled.reasons.get("compile") is None and compiled.fixed_shapes
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_a_head_with_a_teacher_is_not_trained(
    originals: dict[str, Checkpoint], images: ImageSet, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="DeiTForImageClassificationWithTeacher for inference only"):
        finetune(originals["deit-distilled"], FinetuneSpec(), tmp_path / "out", "cpu", images=images)
    assert not list(tmp_path.iterdir())
