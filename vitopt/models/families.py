"""The families of Vision Transformers, in one table: how the modules of each are named, and what sets it apart.

A family is one entry of `FAMILIES`. Everything that differs between families is read from here; the tests run each
through the whole of vitopt, and `scripts/families_table.py` makes README's table of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vitopt.layers import QKV

HEAD = "classifier"
FUSED_LEAF = "qkv_proj"  # query, key and value stacked into one layer while running
TIMM = "timm_wrapper"

Linears = Mapping[str, tuple[str, ...]]

# How a module's name ends -> its logical names, over all versions of transformers known; the longest ending that is
# listed counts.
_OF_TRANSFORMERS: Linears = {
    "query": ("query",),  # Swin v2, and DINOv2 in transformers before its modules were renamed, as all that follow
    "key": ("key",),
    "value": ("value",),
    "attention.output.dense": ("output",),
    "intermediate.dense": ("fc1",),
    "output.dense": ("fc2",),
    "q_proj": ("query",),
    "k_proj": ("key",),
    "v_proj": ("value",),
    FUSED_LEAF: ("query", "key", "value"),
    "o_proj": ("output",),
    "out_proj": ("output",),
    "fc1": ("fc1",),
    "fc2": ("fc2",),
}
_OF_TIMM: Linears = {
    "attn.qkv": (QKV,),
    "attn.q_proj": ("query",),
    "attn.k_proj": ("key",),
    "attn.v_proj": ("value",),
    "attn.proj": ("output",),
    "mlp.fc1": ("fc1",),
    "mlp.fc2": ("fc2",),
}

_PLAIN = r"layers\.\d+"
_ENCODER = r"encoder\.layers?\.\d+"


@dataclass(frozen=True)
class Family:
    """What vitopt knows of one `config.model_type`."""

    title: str
    # Name of its random models, in which SIZE stands for one of `architectures.py` -> transformers' class.
    classes: Mapping[str, str]
    # How the full name of a block starts. Stages are flattened: block.0 is the first block of the first stage.
    block: str
    linears: Linears = field(default_factory=lambda: _OF_TRANSFORMERS)
    # Endings of linear layers inside a block that have no logical name and stay in 16 bit.
    unnamed: tuple[str, ...] = ()
    # Module -> logical name. Of two heads the logits are averaged; the pattern `classifier` names both.
    heads: Mapping[str, str] = field(default_factory=lambda: {"classifier": HEAD})
    # How its configuration says its shape: at its top, in `vision_config`, by stages, or by timm's arguments.
    shape: Literal["plain", "vision", "stages", "timm"] = "plain"
    # Its attention is its own: always scaled dot product, with the kernel that torch chooses.
    own_attention: bool = False
    # In a block, the LayerNorms whose outputs alone query, key and value, and fc1, take; None where it has no such.
    norms: tuple[str, str] | None = ("layernorm_before", "layernorm_after")
    # Module of the input embeddings, where transformers' own class does not know it.
    input_embeddings: str | None = None
    # Why its models cannot be made for another image size, where they cannot.
    fixed_size: str = ""
    note: str = ""  # what a user should know, for README


_TWO_HEADS = {"cls_classifier": f"{HEAD}.class", "distillation_classifier": f"{HEAD}.distillation"}
_WINDOWS = "the windows of its attention are made for one size"
_NARROW = "layers too narrow for NF4 (its first stage) stay in 16 bit"

FAMILIES: Mapping[str, Family] = {
    "vit": Family("ViT, MAE after fine-tuning", {"vit-SIZE": "ViTForImageClassification"}, rf"vit\.{_PLAIN}"),
    "deit": Family(
        "DeiT",
        {
            "deit-SIZE": "DeiTForImageClassification",
            "deit-SIZE-distilled": "DeiTForImageClassificationWithTeacher",
        },
        rf"deit\.{_PLAIN}",
        heads={"classifier": HEAD, **_TWO_HEADS},
        note="with a distillation head: not fine-tuned, transformers has no loss for it",
    ),
    "vit_msn": Family("ViT-MSN", {"vit-msn-SIZE": "ViTMSNForImageClassification"}, rf"vit\.{_PLAIN}"),
    "ijepa": Family("I-JEPA", {"ijepa-SIZE": "IJepaForImageClassification"}, rf"ijepa\.{_PLAIN}"),
    "beit": Family(
        "BEiT",
        {"beit-SIZE": "BeitForImageClassification"},
        rf"beit\.{_PLAIN}",
        fixed_size="its relative position biases are made for one size",
    ),
    "dinov2": Family(
        "DINOv2",
        {"dinov2-SIZE": "Dinov2ForImageClassification"},
        rf"dinov2\.{_ENCODER}",
        norms=("norm1", "norm2"),
        note="not the giant, whose MLP is gated",
    ),
    "dinov2_with_registers": Family(
        "DINOv2 with registers",
        {"dinov2-with-registers-SIZE": "Dinov2WithRegistersForImageClassification"},
        rf"dinov2_with_registers\.{_ENCODER}",
        norms=("norm1", "norm2"),
        note="not the giant, whose MLP is gated",
    ),
    "siglip": Family(
        "SigLIP, SigLIP 2 of fixed resolution",
        {"siglip-SIZE": "SiglipForImageClassification"},
        rf"vision_model\.{_ENCODER}",
        norms=("layer_norm1", "layer_norm2"),
        shape="vision",
        note="its pooling head stays in 16 bit",
    ),
    "clip": Family(
        "CLIP",
        {"clip-SIZE": "CLIPForImageClassification"},
        rf"vision_model\.{_ENCODER}",
        norms=("layer_norm1", "layer_norm2"),
        shape="vision",
        input_embeddings="vision_model",
    ),
    "swin": Family(
        "Swin",
        {"swin-SIZE": "SwinForImageClassification"},
        r"swin\.encoder\.layers\.\d+\.blocks\.\d+",
        shape="stages",
        fixed_size=_WINDOWS,
        note=_NARROW,
    ),
    "swinv2": Family(
        "Swin v2",
        {"swinv2-SIZE": "Swinv2ForImageClassification"},
        r"swinv2\.encoder\.layers\.\d+\.blocks\.\d+",
        unnamed=("continuous_position_bias_mlp.0", "continuous_position_bias_mlp.2"),
        norms=None,  # they come after attention and MLP
        shape="stages",
        fixed_size=_WINDOWS,
        note=f"{_NARROW}; eager attention, transformers has no other for it",
    ),
    TIMM: Family(
        "timm's ViT, DeiT, DeiT III and their kind",
        {
            "timm-vit-SIZE": "TimmWrapperForImageClassification",
            "timm-deit-SIZE-distilled": "TimmWrapperForImageClassification",
        },
        r"timm_model\.blocks\.\d+",
        linears=_OF_TIMM,
        heads={
            "timm_model.head": HEAD,
            "timm_model.head_dist": f"{HEAD}.distillation",
        },
        norms=("norm1", "norm2"),
        shape="timm",
        own_attention=True,
        fixed_size="timm's models are made for the size that `model_args` names",
        note="needs `pip install 'vitopt[timm]'`; query, key and value are one layer `qkv`; sdpa without a choice of "
        "its kernel",
    ),
}

# Model types that people will try -> why they cannot work, and what to use.
_REFUSED = {
    "vit_mae": "transformers has it for pre-training alone, without a classifier; an MAE that was fine-tuned is a "
    "checkpoint of model type 'vit' (ViTForImageClassification)",
    "dinov3_vit": "transformers has no image classifier for it; use DINOv2, or timm's vit_*_dinov3 with a head",
    "siglip2": "it takes patches of any number instead of images (NaFlex); use a SigLIP 2 of fixed resolution, which "
    "is a checkpoint of model type 'siglip'",
}


def why_not_supported(model_type: str) -> str | None:
    """Why checkpoints of a model type cannot be opened, and what can, or None when they can."""
    if model_type in FAMILIES:
        return None
    return _REFUSED.get(model_type, f"vitopt opens {', '.join(sorted(FAMILIES))}")
