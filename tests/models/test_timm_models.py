"""timm's own checkpoints: config.json as timm writes it, and what of it never reaches timm."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitopt.data.pixels import Preprocessor, random_pixels
from vitopt.errors import CheckpointError
from vitopt.models import timm_models
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint
from vitopt.models.families import TIMM

OWN = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 4,
    "label_names": ["circle", "cross", "square", "stripe"],
    "model_args": {"depth": 2, "img_size": 32, "patch_size": 8},
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
}


def named(**changes: Any) -> dict[str, Any]:
    return timm_models.named_as_in_transformers("folder", OWN | changes)


def test_timms_own_configuration_gets_transformers_names() -> None:
    found = named()
    assert found["model_type"] == TIMM and found["architectures"] == ["TimmWrapperForImageClassification"]
    assert {key: found[key] for key in OWN} == OWN
    other = {"model_type": "vit", "architecture": "resnet50", "pretrained_cfg": {}}
    assert timm_models.named_as_in_transformers("folder", other) == other


@pytest.mark.parametrize(
    "architecture",
    [
        "resnet50",
        "swin_base_patch4_window7_224",
        "eva02_base_patch14_224",
        "hf_hub:owner/vit_base",
        "",
        None,
        1,
        "hf-hub:vit_a/b",
        "local-dir:/vit_base",
        "vit_base/../x",
        "VIT_base",
    ],
)
def test_what_is_no_plain_vision_transformer_is_refused_by_its_name(architecture: Any) -> None:
    with pytest.raises(CheckpointError, match=r"timm's .*plain Vision Transformers"):
        named(architecture=architecture)


@pytest.mark.parametrize(
    "arguments",
    [{"checkpoint_path": "x.bin"}, {"pretrained_cfg": {"file": "x"}}, {"embed_dim": [1, "x"]}, ["depth"]],
)
def test_arguments_that_timm_could_read_files_by_are_refused(arguments: Any) -> None:
    with pytest.raises(CheckpointError, match="model_args"):
        named(model_args=arguments)


def test_plain_arguments_pass() -> None:
    arguments = {"img_size": [32, 64], "depth": 2, "qkv_bias": False, "init_values": None, "global_pool": "avg"}
    assert named(model_args=arguments)["model_args"] == arguments


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_without_timm_its_models_are_refused_with_the_line_that_installs_it(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm_models.require_timm.cache_clear()
    # For the other package any module will do.
    monkeypatch.setitem(sys.modules, "timm", sys)
    monkeypatch.setitem(sys.modules, "torchvision", sys)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "config.json").write_text(json.dumps(OWN))
    shutil.copy(Path(__file__).parents[2] / "vitopt/assets/vit-quickstart/model.safetensors", tmp_path)
    for source in (str(tmp_path), "random:timm-vit-micro-patch8-32"):
        with pytest.raises(CheckpointError, match=rf"{package} is missing: pip install 'vitopt\[timm\]'"):
            open_checkpoint(source)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as timm's `save_for_hf` writes it: config.json of timm's own, weights under timm's names."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    model = timm.create_model(OWN["architecture"], num_classes=4, **OWN["model_args"])
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(OWN))
    return folder


def test_timms_own_folder_answers_as_in_timm(own: Path) -> None:
    import timm

    checkpoint = open_checkpoint(str(own))
    assert checkpoint.image_size == (32, 32)
    assert checkpoint.label_names == OWN["label_names"]
    original = timm.create_model(OWN["architecture"], num_classes=4, **OWN["model_args"])
    timm.models.load_checkpoint(original, str(own / "model.safetensors"))
    pixels = random_pixels(2, (32, 32))
    with torch.no_grad():
        expected = original.eval()(pixels)
        torch.testing.assert_close(load_model(checkpoint)(pixel_values=pixels).logits, expected, rtol=0, atol=0)


def test_its_preprocessing_is_timms(own: Path) -> None:
    import timm

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    settings = timm.data.resolve_data_config(OWN["pretrained_cfg"])
    expected = timm.data.create_transform(**settings)(image)
    preprocess = Preprocessor(load_processor(open_checkpoint(str(own))))
    assert preprocess.size == (32, 32)
    torch.testing.assert_close(preprocess(image), expected, rtol=0, atol=0)


def test_a_fresh_head_has_the_classes_asked_for(make_family: Callable[..., Checkpoint]) -> None:
    model = load_model(make_family(TIMM), label_names=["a", "b"])
    assert model.timm_model.head.out_features == 2 and model.config.id2label == {0: "a", 1: "b"}
