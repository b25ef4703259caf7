"""Small random checkpoints of every supported family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor

from vitopt.models.checkpoint import Checkpoint, open_checkpoint

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
_STAGES = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
}

# model type -> (start of the architecture's name, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", _SMALL),
    "deit": ("DeiT", _SMALL),
    "vit_msn": ("ViTMSN", _SMALL),
    "ijepa": ("IJepa", _SMALL),
    "beit": ("Beit", _SMALL),
    "dinov2": ("Dinov2", _SMALL),
    "dinov2_with_registers": ("Dinov2WithRegisters", _SMALL),
    "siglip": ("Siglip", {"vision_config": _SMALL}),
    "clip": ("CLIP", {"vision_config": _SMALL}),
    "swin": ("Swin", _STAGES),
}


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """Makes a model of 32 x 32 pixels and 4 classes whose biases and norms are random too, so that none is idle."""

    def make(model_type: str, **changes: Any) -> Checkpoint:
        architecture, settings = FAMILIES[model_type]
        config = AutoConfig.for_model(model_type, num_labels=4, **settings | changes)
        config.architectures = [f"{architecture}ForImageClassification"]
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp("families") / model_type
        model.save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return open_checkpoint(str(folder))

    return make
