"""What a stranger's checkpoint may say, checked before a library acts on it.

transformers obeys `config.json`: it may name code to import (`auto_map`), an attention kernel to fetch, a file of
weights. Of such keys none reaches transformers, and weights are safetensors files of the checkpoint's own folder.
"""

import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

from vitopt.errors import CheckpointError
from vitopt.models import timm_models
from vitopt.models.classes import CLASSIFIERS
from vitopt.models.families import why_not_supported

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
_WHOLE_FILE = "model.safetensors"
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PACKED_BY = ("bitsandbytes", "torchao")
_CODE = "auto_map"
# What else of a configuration has transformers load something: kernels from the hub, weights under another name.
_LOADED_BY_NAME = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "transformers_weights",
)


def read_config(source: str, path: Path) -> dict[str, Any]:
    """The content of a config.json, without anything that transformers would load by its name.

    Code that is named beside a model type that transformers itself has is left out: the library's own class opens
    such a checkpoint, and a note says so.

    Raises:
        CheckpointError: not a JSON mapping, or not an image classifier of a supported family and packing.
    """
    content = timm_models.named_as_in_transformers(source, _read_mapping(source, path))
    model_type, architectures = content.get("model_type"), content.get("architectures") or []
    if not isinstance(model_type, str):
        raise CheckpointError(f"{source}: {path.name} has no model_type, so it is not a Hugging Face checkpoint")
    if not (isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)):
        raise CheckpointError(f"{source}: architectures in {path.name} is not a list of names: copy the file again")
    if reason := why_not_supported(model_type):
        own_code = f" and {_CODE} names code of its own, which vitopt never runs" if _CODE in content else ""
        raise CheckpointError(f"{source} is of model type {model_type!r}, which is not supported{own_code}: {reason}")
    if not any(name.endswith(CLASSIFIERS) for name in architectures):
        found = ", ".join(architectures) or f"{model_type} without a head"
        raise CheckpointError(
            f"{source} is not an image classifier (it is {found}); vitopt needs an ...ForImageClassification model"
        )
    packing = content.get("quantization_config") or {}
    packed_by = packing.get("quant_method", _PACKED_BY[0]) if isinstance(packing, dict) else packing
    if packed_by not in _PACKED_BY:
        raise CheckpointError(
            f"{source} is packed by {packed_by!r}; vitopt opens {' and '.join(_PACKED_BY)}: give the checkpoint it was "
            "made from"
        )
    if _CODE in content:
        _note_unused_code(source, model_type)
    return _plain(content)


def _read_mapping(source: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: {path.name} is not a valid JSON file ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source}: {path.name} is not a mapping of keys: copy it again")
    return content


@functools.cache
def _note_unused_code(source: str, model_type: str) -> None:
    logger.warning("%s names code of its own, which vitopt never runs: opened as transformers' %s", source, model_type)


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    return {
        # Each half of a model with a text half has a configuration of its own.
        key: _plain(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in content.items()
        if key not in (_CODE, *_LOADED_BY_NAME)
    }


def refuse_code(source: str, preprocessor: Any) -> None:
    """Refuse a preprocessor that names code: pixels made by other code than its own would be wrong without a word.

    Raises:
        CheckpointError: it does, or is not a mapping.
    """
    if not isinstance(preprocessor, dict):
        raise CheckpointError(f"{source}: the preprocessor is not a mapping of keys: copy it again")
    if _CODE in preprocessor:
        raise CheckpointError(
            f"{source}: the preprocessor names code of its own ({_CODE}), which vitopt never runs: replace it with "
            "that of a model which prepares images alike"
        )


def adapter_error(source: str) -> CheckpointError:
    """The error for a folder or repository with an adapter_config.json, which would have transformers open another."""
    return CheckpointError(f"{source} holds a peft adapter, not a whole model: merge it first (`vitopt finetune` does)")


def weight_files(source: str, folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a local checkpoint.

    Raises:
        CheckpointError: there are none, a link leads out of the folder, or the index names what it may not.
    """
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        pickled = sorted(file.name for file in folder.iterdir() if file.name.endswith(_PICKLE_ENDINGS))
        if pickled:
            raise CheckpointError(explain_pickle(source, pickled[0]))
        raise CheckpointError(f"{source} has no .safetensors file, so there are no weights to load")
    for file in files:
        if not _belongs_to(file, folder):
            raise CheckpointError(f"{file} is a link that leaves its folder: copy the file itself there")
    index = folder / INDEX_FILE
    if index.is_file() and not (folder / _WHOLE_FILE).is_file():  # beside the whole file it is not read
        present = {file.name for file in files}
        missing = [name for name in shards(source, index) if name not in present]
        if missing:
            raise CheckpointError(f"{source} lacks {missing[0]}, which {INDEX_FILE} names: copy all weight files")
    return files


def shards(source: str, index: Path) -> list[str]:
    """Names of the weight files that an index lists, sorted.

    Raises:
        CheckpointError: it is no index, or a name is not that of a safetensors file beside it.
    """
    weight_map = _read_mapping(source, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{source}: {index.name} has no weight_map: copy the file again")
    for name in weight_map.values():
        if not isinstance(name, str) or re.fullmatch(r"\w[\w.-]*\.safetensors", name) is None:
            raise CheckpointError(
                f"{source}: {index.name} names {name!r} as a weight file; vitopt opens .safetensors files of the "
                "checkpoint's own folder only"
            )
    return sorted(set(weight_map.values()))


def _belongs_to(file: Path, folder: Path) -> bool:
    home, target = folder.resolve(), file.resolve()
    # A snapshot in the hub's cache links to its repository's own blobs.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return target.is_relative_to(home) or target.is_relative_to(blobs)


def explain_pickle(source: str, name: str) -> str:
    """Why a pickled weight file is refused, and the command that converts one."""
    code = (
        "from transformers import AutoModelForImageClassification as M; "
        f"M.from_pretrained('{source}', use_safetensors=False).save_pretrained('converted')"
    )
    return (
        f"{source}: {name} is a pickle, which can run code when it is opened, so vitopt refuses it; "
        f'if you trust its origin, convert it with: python -c "{code}"'
    )
