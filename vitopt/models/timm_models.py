"""timm's models, which transformers wraps: their config.json is timm's own, and holds the preprocessing too.

timm is optional (`vitopt[timm]`). It builds a model from a name and arguments, both from config.json, and some of
those would have it read other files or the hub: only plain names and plain numbers reach it.
"""

import functools
import importlib
import re
from typing import Any

from transformers import PretrainedConfig

from vitopt.errors import CheckpointError
from vitopt.models.families import FAMILIES, TIMM

# Plain Vision Transformers; a name with a colon or a slash would be one of the hub, or a folder.
_ARCHITECTURE = r"(vit|deit3?|flexivit|beit3)_\w+(\.\w+)?"


def named_as_in_transformers(source: str, content: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json; timm's own gets the model type and the class that transformers opens it with.

    Raises:
        CheckpointError: a timm model that is no plain Vision Transformer, or arguments that are not plain.
    """
    if content.get("model_type") is None and "architecture" in content and "pretrained_cfg" in content:
        content = content | {"model_type": TIMM}
    if content.get("model_type") != TIMM:
        return content
    architecture, arguments = content.get("architecture"), content.get("model_args") or {}
    if not isinstance(architecture, str) or re.fullmatch(_ARCHITECTURE, architecture) is None:
        raise CheckpointError(
            f"{source} is timm's {architecture!r}, which is not supported: of timm vitopt opens plain Vision "
            "Transformers (vit_*, deit_*, deit3_*, flexivit_*)"
        )
    if not isinstance(arguments, dict) or not all(_is_plain(key, value) for key, value in arguments.items()):
        raise CheckpointError(
            f"{source}: model_args in config.json holds more than numbers, which timm could read files by: "
            "leave them out"
        )
    return content | {"architectures": [*FAMILIES[TIMM].classes.values()][:1]}


def _is_plain(key: str, value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_plain(key, item) for item in value)
    return value is None or isinstance(value, int | float) or (key == "global_pool" and isinstance(value, str))


@functools.cache
def require_timm() -> None:
    """Import timm, for models that need it.

    Raises:
        CheckpointError: it is not installed.
    """
    for package in ("torchvision", "timm"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise CheckpointError(
                f"a timm model needs timm and torchvision, and {package} is missing: pip install 'vitopt[timm]'"
            ) from error


def image_size(config: PretrainedConfig) -> tuple[int, int]:
    """Height and width in pixels that a timm model is made for."""
    size = (config.model_args or {}).get("img_size") or _data_config(config)["input_size"][-2:]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _data_config(config: PretrainedConfig) -> dict[str, Any]:
    from timm.data import resolve_data_config

    return resolve_data_config(dict(config.pretrained_cfg), model=None, verbose=False)


def image_processor(config: PretrainedConfig) -> Any:
    """The preprocessing that a timm model's configuration holds, as plain transformers makes it."""
    from transformers import TimmWrapperImageProcessor

    return TimmWrapperImageProcessor(config.pretrained_cfg, architecture=config.architecture)
