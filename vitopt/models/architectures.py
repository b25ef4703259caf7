"""Shapes of the standard Vision Transformers, for plans and timings that need no weights.

`random:vit-large-patch16-224` is a model of that shape with random weights. The shapes are those of
"An Image is Worth 16x16 Words" (arXiv 2010.11929, table 1) and, for tiny and small, of DeiT (arXiv 2012.12877).
"""

from transformers import ViTConfig

RANDOM_PREFIX = "random:"
IMAGENET_CLASSES = 1000

# name -> (hidden size, blocks, heads, intermediate size)
_SHAPES = {
    "vit-tiny": (192, 12, 3, 768),
    "vit-small": (384, 12, 6, 1536),
    "vit-base": (768, 12, 12, 3072),
    "vit-large": (1024, 24, 16, 4096),
    "vit-huge": (1280, 32, 16, 5120),
}


def known_architecture(name: str) -> ViTConfig | None:
    """Configuration of `vit-SIZE-patchP-R` (any owner before a slash is ignored), None for other names."""
    words = name.rsplit("/", 1)[-1].split("-")
    if len(words) < 4 or "-".join(words[:2]) not in _SHAPES:
        return None
    patch, resolution = words[2].removeprefix("patch"), words[3]
    if not (patch.isdecimal() and resolution.isdecimal() and 0 < int(patch) <= int(resolution)):
        return None
    hidden, blocks, heads, intermediate = _SHAPES["-".join(words[:2])]
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        patch_size=int(patch),
        image_size=int(resolution),
        num_labels=IMAGENET_CLASSES,
    )
    config.architectures = ["ViTForImageClassification"]
    return config


def architecture_names() -> list[str]:
    """Examples of names that `known_architecture` understands."""
    return [f"{size}-patch16-224" for size in _SHAPES]
