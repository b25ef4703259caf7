"""The table of families, and what is refused instead."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from vitopt.errors import CheckpointError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.models.families import FAMILIES, why_not_supported


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_classes_of_a_family_are_those_that_transformers_opens_it_with(model_type: str) -> None:
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type]
    assert set(FAMILIES[model_type].classes.values()) == ({found} if isinstance(found, str) else set(found))
    assert why_not_supported(model_type) is None


def test_no_two_families_share_a_name() -> None:
    names = [name for family in FAMILIES.values() for name in family.classes]
    assert len(names) == len(set(names)) and all("SIZE" in name for name in names)


@pytest.mark.parametrize(
    ("model_type", "architecture", "remedy"),
    [
        ("vit_mae", "ViTMAEForPreTraining", "model type 'vit'"),
        ("dinov3_vit", "DINOv3ViTModel", "DINOv2"),
        ("siglip2", "Siglip2ForImageClassification", "model type 'siglip'"),
        ("convnext", "ConvNextForImageClassification", "vitopt opens beit"),
    ],
)
def test_what_cannot_work_is_refused_with_its_reason_and_what_to_use(
    model_type: str, architecture: str, remedy: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    content: dict[str, Any] = {"model_type": model_type, "architectures": [architecture]}
    assert model_type in CONFIG_MAPPING
    (tmp_path / "config.json").write_text(json.dumps(content))
    shutil.copy(tiny_checkpoint / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=rf"{model_type}.* not supported: .*{re.escape(remedy)}"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model_type", ["vit_mae", "dinov3_vit"])
def test_transformers_has_no_classifier_for_those_that_are_said_to_have_none(model_type: str) -> None:
    assert model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
