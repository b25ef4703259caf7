"""What transformers' own class of a checkpoint can do: it differs from family to family."""

import inspect

import torch
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PretrainedConfig, PreTrainedModel

from vitopt.environment import support
from vitopt.models.families import FAMILIES
from vitopt.recipe import Attention, SdpaKernel

# How the names of image classifiers end.
CLASSIFIERS = ("ForImageClassification", "ForImageClassificationWithTeacher")

_SUPPORT: dict[Attention, str] = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that a checkpoint of an image classifier opens with: of several, as DeiT has, the one it names."""
    known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    by_name = {classifier.__name__: classifier for classifier in (known if isinstance(known, tuple) else (known,))}
    return next((by_name[name] for name in config.architectures or () if name in by_name), next(iter(by_name.values())))


def why_not_attention(
    config: PretrainedConfig, attention: Attention, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a checkpoint cannot run an attention implementation here, or None when it can."""
    return _lacks(config, attention) or support.why_not_attention(attention, device, dtype)


def why_not_kernel(
    config: PretrainedConfig, kernel: SdpaKernel, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why a checkpoint cannot run a kernel of scaled dot product attention here, or None when it can."""
    if kernel != "auto" and FAMILIES[config.model_type].own_attention:
        return f"the attention of {model_class(config).__name__} is its own, with the kernel that torch chooses"
    return (_lacks(config, "sdpa") if kernel != "auto" else None) or support.why_not_kernel(kernel, device, dtype)


def best_attention(config: PretrainedConfig) -> Attention:
    """What runs on every machine: sdpa where the family has it."""
    return "eager" if _lacks(config, "sdpa") else "sdpa"


def _lacks(config: PretrainedConfig, attention: Attention) -> str | None:
    classifier = model_class(config)
    if attention == "eager" and FAMILIES[config.model_type].own_attention:
        return f"the attention of {classifier.__name__} is its own, which is sdpa"
    if attention not in _SUPPORT or getattr(classifier, _SUPPORT[attention]):
        return None
    return f"transformers has no {attention} for {classifier.__name__}"


def why_not_trained(config: PretrainedConfig) -> str | None:
    """Why a model cannot be trained, or None when it can."""
    classifier = model_class(config)
    if "labels" in inspect.signature(classifier.forward).parameters:
        return None
    return f"transformers has {classifier.__name__} for inference only, without a loss"


def name_input_embeddings(config: PretrainedConfig) -> None:
    """Tell transformers where a model's input embeddings are, which its loader asks before torchao quantizes.

    CLIP's classifier is the one class that does not know (transformers 5.23): the loader raises NotImplementedError.
    """
    if module := FAMILIES[config.model_type].input_embeddings:
        model_class(config)._input_embed_layer = module
