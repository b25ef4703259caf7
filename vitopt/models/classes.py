"""What transformers' own class of a checkpoint can do: it differs from family to family."""

import inspect

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from vitopt.recipe import Attention

# How the names of image classifiers end.
CLASSIFIERS = ("ForImageClassification", "ForImageClassificationWithTeacher")

_SUPPORT: dict[Attention, str] = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint of an image classifier opens with."""
    name = next(name for name in config.architectures or () if name.endswith(CLASSIFIERS))
    found: type[PreTrainedModel] = getattr(transformers, name)
    return found


def why_not_attention(config: PretrainedConfig, attention: Attention) -> str | None:
    """Why a family cannot run an attention implementation on any machine, or None when it can."""
    found = model_class(config)
    if attention not in _SUPPORT or getattr(found, _SUPPORT[attention]):
        return None
    return f"transformers has no {attention} for {found.__name__}"


def why_not_trained(config: PretrainedConfig) -> str | None:
    """Why a model cannot be trained, or None when it can."""
    found = model_class(config)
    if "labels" in inspect.signature(found.forward).parameters:
        return None
    return f"transformers has {found.__name__} for inference only, without a loss"


def name_input_embeddings(config: PretrainedConfig) -> None:
    """Tell transformers where a model's input embeddings are, which its loader asks before torchao quantizes.

    CLIP's classifier is the one class that does not know (transformers 5.23): the loader raises NotImplementedError.
    """
    if config.model_type == "clip":
        model_class(config)._input_embed_layer = "vision_model"
