"""What a checkpoint from outside may say, checked before a library acts on it; all that does not fit is told at once.

transformers obeys `config.json`: it may name code to import (`auto_map`), an attention kernel to fetch, a file of
weights. Of such keys none reaches transformers. Sizes are bounded, since a few digits can ask for all memory there is.
"""

import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from vitopt.errors import CheckpointError
from vitopt.models import timm_models
from vitopt.models.classes import CLASSIFIERS
from vitopt.models.families import why_not_supported

logger = logging.getLogger(__name__)

MAX_SIDE = 4096  # pixels
_MAX_FILE_BYTES = 2**26
_MAX_PATCHES = 2**16
_MAX_NUMBER = 1e12
_PACKED_BY = ("bitsandbytes", "torchao")
_CODE = "auto_map"
# What of a configuration has transformers load something (kernels from the hub, weights under another name), and
# what changes the kind of answer that a model gives. Keys that start with `_` are transformers' own notes.
_LEFT_OUT = (
    "attn_implementation",
    "experts_implementation",
    "transformers_weights",
    "return_dict",
    "torchscript",
    "output_attentions",
    "output_hidden_states",
)
# The largest published models have a few times less: ViT-22B is 6,144 wide, with 48 blocks of 48 heads.
_SIZES = {
    "hidden_size": (1, 32_768),
    "embed_dim": (1, 32_768),
    "intermediate_size": (1, 131_072),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 512),
    "image_size": (1, MAX_SIDE),
    "patch_size": (1, MAX_SIDE),
    "window_size": (1, MAX_SIDE),
    "num_channels": (3, 3),
    "num_labels": (1, 200_000),
    "num_register_tokens": (0, 4_096),
    "depths": (1, 256),
    "num_heads": (1, 512),
    "vocab_size": (1, 10_000_000),
    "max_position_embeddings": (1, 1_000_000),
}
_SHARES = {"hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate"}
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def read_config(source: str, path: Path) -> dict[str, Any]:
    """The content of a config.json, without anything that transformers would load by its name.

    Code that is named beside a model type that transformers itself has is left out: the library's own class opens
    such a checkpoint, and a note says so.

    Raises:
        CheckpointError: not a JSON mapping, not an image classifier of a supported family and packing, or of sizes,
            types or labels that no model has.
    """
    content = timm_models.named_as_in_transformers(source, read_mapping(source, path))
    _require_classifier(source, path.name, content)
    refuse_mistakes(source, path.name, mistakes_of_config(content))
    if _CODE in content:
        _note_unused_code(source, content["model_type"])
    return _plain(content)


def read_mapping(source: str, path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds a mapping.

    Raises:
        CheckpointError: it does not, or is too long, too deep, a pipe or a device.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{source}: {path.name} is not a plain file: copy it again")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{source}: {path.name} has more than {_MAX_FILE_BYTES:,} bytes: copy it again")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: {path.name} is not a valid JSON file ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: {path.name} is not a mapping of keys: copy it again")
    return content


def refuse_mistakes(source: str, file: str, mistakes: Sequence[str]) -> None:
    """Raise one CheckpointError with all mistakes of a file, if there are any."""
    if len(mistakes) == 1:
        raise CheckpointError(f"{source}: {file}: {mistakes[0]}; copy the file again")
    if mistakes:
        lines = "\n".join(f"  {mistake}" for mistake in mistakes)
        raise CheckpointError(f"{source}: {len(mistakes)} mistakes in {file}, copy it again\n{lines}")


def _require_classifier(source: str, file: str, content: dict[str, Any]) -> None:
    model_type, architectures = content.get("model_type"), content.get("architectures") or []
    if not isinstance(model_type, str):
        raise CheckpointError(f"{source}: {file} has no model_type, so it is not a Hugging Face checkpoint")
    if not (isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)):
        raise CheckpointError(f"{source}: architectures in {file} is not a list of names: copy the file again")
    if reason := why_not_supported(model_type):
        own_code = f" and {_CODE} names code of its own, which vitopt never runs" if _CODE in content else ""
        raise CheckpointError(
            f"{source} is of model type {model_type[:80]!r}, which is not supported{own_code}: {reason}"
        )
    known = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[CONFIG_MAPPING[model_type]]
    known_names = [kind.__name__ for kind in (known if isinstance(known, tuple) else (known,))]
    if not any(name.endswith(CLASSIFIERS) for name in architectures):
        given = ", ".join(architectures) or f"{model_type} without a head"
        raise CheckpointError(
            f"{source} is not an image classifier (it is {given}); vitopt needs an ...ForImageClassification model"
        )
    if not set(known_names) & set(architectures):
        raise CheckpointError(
            f"{source}: {file} names the architecture {architectures[0][:80]} and the model type {model_type}, whose "
            f"classifiers are {', '.join(known_names)}: copy the file again"
        )
    _require_packing(source, content.get("quantization_config"))


def _require_packing(source: str, packing: Any) -> None:
    if packing is None:
        return
    packed_by = packing.get("quant_method", _PACKED_BY[0]) if isinstance(packing, dict) else packing
    if not isinstance(packing, dict) or packed_by not in _PACKED_BY:
        raise CheckpointError(
            f"{source} is packed by {str(packed_by)[:80]!r}; vitopt opens {' and '.join(_PACKED_BY)}: give the "
            "checkpoint it was made from"
        )


def mistakes_of_config(content: dict[str, Any]) -> list[str]:
    """What of a configuration no model has, one line each."""
    mistakes = [*_mistakes_of_sizes(content), *_mistakes_of_labels(content)]
    mistakes += [
        f"{_named(key)} is {_shown(value)}, which no model can have"
        for key, value in _numbers(content)
        if not _bounded(value)
    ]
    for key in ("dtype", "torch_dtype"):
        if (dtype := content.get(key)) is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
            mistakes.append(f"{key} is {str(dtype)[:80]!r}, not one of {', '.join(_DTYPES)}")
    for half, part in content.items():
        if half.endswith("_config") and half != "quantization_config" and part is not None:
            if not isinstance(part, dict):
                mistakes.append(f"{_named(half)} is not a mapping of keys")
            else:
                mistakes += [f"{_named(half)}.{mistake}" for mistake in _mistakes_of_sizes(part)]
    return mistakes


def _mistakes_of_sizes(content: dict[str, Any]) -> Iterator[str]:
    good: dict[str, list[int]] = {}
    for key, (least, most) in _SIZES.items():
        if key not in content or (content[key] is None and key not in ("image_size", "patch_size")):
            continue
        value = content[key]
        numbers = value if isinstance(value, list) and 0 < len(value) <= 32 else [value]
        if all(type(number) is int and least <= number <= most for number in numbers):
            good[key] = numbers
        else:
            between = f"{least:,} to {most:,}" if least < most else str(least)
            yield f"{key} is {_shown(value)}, not {between}"
    for key in _SHARES & set(content):
        value = content[key]
        if not (isinstance(value, int | float) and 0 <= value <= 1):
            yield f"{key} is {_shown(value)}, not a share from 0 to 1"
    epsilon = content.get("layer_norm_eps", 1e-6)
    if not (isinstance(epsilon, int | float) and 0 <= epsilon <= 1):
        yield f"layer_norm_eps is {_shown(epsilon)}, not a small number"
    ratio = content.get("mlp_ratio", 4)
    if not (isinstance(ratio, int | float) and 0 < ratio <= 64):
        yield f"mlp_ratio is {_shown(ratio)}, not a number up to 64"
    act = content.get("hidden_act", "gelu")
    if not (isinstance(act, str) and act in ACT2FN):
        yield f"hidden_act is {_shown(act)}, which transformers does not know"
    if "hidden_size" in good and "num_attention_heads" in good:
        width, heads = good["hidden_size"][0], good["num_attention_heads"][0]
        if width % heads:
            yield f"hidden_size {width} is not a multiple of num_attention_heads {heads}"
    if "image_size" in good and "patch_size" in good:
        sides, patches = (
            good[key] if len(good[key]) == 2 else good[key][:1] * 2 for key in ("image_size", "patch_size")
        )
        count = math.prod(side // patch for side, patch in zip(sides, patches, strict=True))
        if not 1 <= count <= _MAX_PATCHES:
            yield f"image_size and patch_size make {count:,} patches, not 1 to {_MAX_PATCHES:,}"


def _mistakes_of_labels(content: dict[str, Any]) -> Iterator[str]:
    names = content.get("id2label")
    if names is None:
        return
    if not isinstance(names, dict) or not names:
        yield f"id2label is {_shown(names)}, not a mapping of each output to its name"
        return
    if set(map(str, names)) != {str(index) for index in range(len(names))}:
        yield f"id2label does not name the outputs 0 to {len(names) - 1}, each once"
    for index, name in names.items():
        if not isinstance(name, str | int | float):
            yield f"id2label names output {_shown(index)} {_shown(name)}, which is not text"
            break
    if content.get("num_labels", len(names)) != len(names):
        yield f"num_labels is {_shown(content['num_labels'])}, and id2label names {len(names)} outputs"


def _numbers(content: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _numbers(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _numbers(value, key)
    elif isinstance(content, int | float):
        yield key, content


def _bounded(value: float) -> bool:
    return -_MAX_NUMBER <= value <= _MAX_NUMBER  # not so for NaN


def _named(key: str) -> str:
    return key if key.isidentifier() else _shown(key)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _note_unused_code(source: str, model_type: str) -> None:
    logger.warning("%s names code of its own, which vitopt never runs: opened as transformers' %s", source, model_type)


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    return {
        # Each half of a model with a text half has a configuration of its own.
        key: _plain(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in content.items()
        # A key that is called as a method of the configuration is would take its place.
        if not key.startswith("_")
        and key not in (_CODE, *_LEFT_OUT)
        and not callable(getattr(PretrainedConfig, key, None))
    }


def check_preprocessor(source: str, content: Any) -> None:
    """Refuse a preprocessor that names code (pixels made by other code than its own would be wrong without a word), or
    numbers that make no pixels.

    Raises:
        CheckpointError: it does, or is not a mapping; all mistakes at once.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: the preprocessor is not a mapping of keys: copy it again")
    if _CODE in content:
        raise CheckpointError(
            f"{source}: the preprocessor names code of its own ({_CODE}), which vitopt never runs: replace it with "
            "that of a model which prepares images alike"
        )
    refuse_mistakes(source, "the preprocessor", list(_mistakes_of_preprocessor(content)))


def _mistakes_of_preprocessor(content: dict[str, Any]) -> Iterator[str]:
    for key in ("size", "crop_size"):
        value = content.get(key)
        sides = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if value is not None and not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
            yield f"{key} is {_shown(value)}, not sides of 1 to {MAX_SIDE:,} pixels"
    for key in ("image_mean", "image_std"):
        value = content.get(key)
        channels = value if isinstance(value, list) else [value] * 3
        if value is None and key in content and content.get("do_normalize", True):
            yield f"{key} is null, and do_normalize needs it"
        elif value is not None and not (
            len(channels) == 3 and all(isinstance(number, int | float) and _bounded(number) for number in channels)
        ):
            yield f"{key} is {_shown(value)}, not a number for each of 3 channels"
        elif key == "image_std" and value is not None and min(channels) <= 0:
            yield f"image_std is {_shown(value)}, and must be above 0"
    factor = content.get("rescale_factor")
    if factor is not None and not (isinstance(factor, int | float) and 0 < factor <= 1e6):
        yield f"rescale_factor is {_shown(factor)}, not a positive number"
    resample = content.get("resample")
    if resample is not None and not (type(resample) is int and 0 <= resample <= 5):
        yield f"resample is {_shown(resample)}, not a filter from 0 to 5"
    for key in ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"):
        if content.get(key) not in (None, True, False):
            yield f"{key} is {_shown(content[key])}, not true or false"


def require_pixels(
    source: str, processor: Any, image_size: tuple[int, int], make_model: Callable[[], PreTrainedModel]
) -> None:
    """Prepare two images of different shapes, and show pixels of another size to a model on the meta device.

    Raises:
        CheckpointError: the pixels are not those of one image each, of one size, finite, and of a size for the model.
    """
    shapes = set()
    for size in ((40, 30), (30, 40)):
        pixels = processor(Image.new("RGB", size, (90, 120, 150)), return_tensors="pt")["pixel_values"]
        shapes.add(tuple(pixels.shape))
        if not torch.isfinite(pixels).all():
            raise CheckpointError(f"{source}: the preprocessor makes pixels that are not finite: copy it again")
    shape = shapes.pop()
    if shapes or len(shape) != 4 or shape[:2] != (1, 3):
        raise CheckpointError(
            f"{source}: the preprocessor does not make (1, 3, height, width) of one size from any image: use that of a "
            "model which prepares images alike"
        )
    if shape[2:] == image_size:
        return
    model = make_model()
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model(pixel_values=torch.empty(shape, dtype=model.dtype, device="meta"))
    except Exception as error:  # each family refuses in its own way
        height, width = image_size
        raise CheckpointError(
            f"{source}: the preprocessor makes {shape[2]} x {shape[3]} pixels, and the model takes {height} x {width}: "
            "copy both from one model"
        ) from error


def adapter_error(source: str) -> CheckpointError:
    """The error for a folder or repository with an adapter_config.json, which would have transformers open another."""
    return CheckpointError(f"{source} holds a peft adapter, not a whole model: merge it first (`vitopt finetune` does)")
