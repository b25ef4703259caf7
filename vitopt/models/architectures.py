"""Shapes of the standard Vision Transformers, for plans and timings that need no weights.

`random:vit-large-patch16-224` is a model of that shape with random weights; every family has every size. The shapes
are those of "An Image is Worth 16x16 Words" (arXiv 2010.11929, table 1) and, for tiny and small, of DeiT (arXiv
2012.12877); with stages those of Swin (arXiv 2103.14030, section 3.3). Micro is made up, for tests.
"""

import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from vitopt.models.families import FAMILIES

RANDOM_PREFIX = "random:"
IMAGENET_CLASSES = 1000

# size -> (hidden size, blocks, heads, intermediate size)
_PLAIN = {
    "micro": (64, 2, 2, 128),
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
}
# size -> (width of the first stage, blocks and heads of each stage)
_STAGES = {
    "micro": (32, (2, 2), (2, 2)),
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
_WINDOW = 7

# vit-base -> (model type, class, size)
_NAMES = {
    name.replace("SIZE", size): (model_type, architecture, size)
    for model_type, family in FAMILIES.items()
    for name, architecture in family.classes.items()
    for size in (_STAGES if family.shape == "stages" else _PLAIN)
}


def known_architecture(name: str, **settings: Any) -> PretrainedConfig | None:
    """Configuration of a name such as `vit-base-patch16-224` or `swin-tiny-patch4-window7-224`, with `settings`.

    Any owner before a slash and any further words are ignored. None for other names.
    """
    match = re.fullmatch(r"(.+)-patch(\d+)(?:-window(\d+))?-(\d+)(?:-.*)?", name.rsplit("/", 1)[-1])
    if match is None or match[1] not in _NAMES:
        return None
    model_type, architecture, size = _NAMES[match[1]]
    patch, window, resolution = (int(number or 0) for number in match.groups()[1:])
    shape = FAMILIES[model_type].shape
    if not 0 < patch <= resolution or (window and shape != "stages"):
        return None
    if shape == "stages":
        made = _stages(size, patch, resolution, window or _WINDOW)
    elif shape == "timm":
        made = _timm(size, patch, resolution, "distilled" in match[1])
    else:
        made = _plain(size, patch, resolution)
        made = {"vision_config": made} if shape == "vision" else made
    config = CONFIG_MAPPING[model_type](**{"num_labels": IMAGENET_CLASSES} | made | settings)
    config.architectures = [architecture]
    return config


def _plain(size: str, patch: int, resolution: int) -> dict[str, Any]:
    hidden, blocks, heads, intermediate = _PLAIN[size]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "patch_size": patch,
        "image_size": resolution,
    }


def _stages(size: str, patch: int, resolution: int, window: int) -> dict[str, Any]:
    width, blocks, heads = _STAGES[size]
    return {
        "embed_dim": width,
        "depths": list(blocks),
        "num_heads": list(heads),
        "patch_size": patch,
        "image_size": resolution,
        "window_size": window,
    }


def _timm(size: str, patch: int, resolution: int, distilled: bool) -> dict[str, Any]:
    hidden, blocks, heads, intermediate = _PLAIN[size]
    return {
        "architecture": "deit_base_distilled_patch16_224" if distilled else "vit_base_patch16_224",
        "model_args": {
            "embed_dim": hidden,
            "depth": blocks,
            "num_heads": heads,
            "mlp_ratio": intermediate / hidden,
            "patch_size": patch,
            "img_size": resolution,
        },
        "pretrained_cfg": {
            "input_size": [3, resolution, resolution],
            "crop_pct": 1.0,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
    }


def explain_names() -> str:
    """What a name that `known_architecture` understands looks like."""
    names = ", ".join(name for family in FAMILIES.values() for name in family.classes)
    return f"give NAME-patch16-224, NAME one of {names}, SIZE one of {', '.join(_PLAIN)} (stages: not huge)"
