"""Checkpoints: find, check, load, save. safetensors only, no pickle, no code from a checkpoint."""

import hashlib
import importlib.resources
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
    set_seed,
)

from vitopt import environment, storage
from vitopt.errors import CheckpointError
from vitopt.models.architectures import RANDOM_PREFIX, architecture_names, known_architecture

BUILT_IN = "vit-quickstart"
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_RANDOM_SEED = 0


@dataclass(frozen=True)
class Checkpoint:
    """An image classifier that can be opened: where it is and what its configuration says."""

    source: str
    location: str  # a folder or a hub id; `random:` sources have none
    config: PretrainedConfig
    weights: tuple[Path, ...] = ()  # of a local folder

    @property
    def is_random(self) -> bool:
        """Whether the weights are drawn at load instead of read."""
        return self.source.startswith(RANDOM_PREFIX)

    @property
    def folder(self) -> Path | None:
        """The local folder, None for hub ids and random weights."""
        return self.weights[0].parent if self.weights else None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.config.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def label_names(self) -> list[str]:
        """Class names in the order of the head's outputs."""
        return [str(self.config.id2label[index]) for index in range(self.config.num_labels)]

    @property
    def is_quantized(self) -> bool:
        """Whether the weights on disk are already quantized."""
        return getattr(self.config, "quantization_config", None) is not None

    def fingerprint(self) -> str:
        """Hex digest that changes when the configuration or a weight changes."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True, default=str).encode())
        for path in self.weights:
            digest.update(storage.sha256_of_file(path).encode())
        return digest.hexdigest()


def built_in_path() -> Path:
    """Folder of the small ViT that ships with vitopt (scripts/pretrain_quickstart.py made it)."""
    return Path(str(importlib.resources.files("vitopt") / "assets" / BUILT_IN))


def open_checkpoint(source: str, config_only: bool = False) -> Checkpoint:
    """Check that `source` is an image classifier in safetensors and read its configuration.

    `source` is a folder, a hub id, `vit-quickstart` or `random:ARCHITECTURE`. With `config_only`, a hub id
    that cannot be reached takes the published shape of its name, if vitopt knows it.

    Raises:
        CheckpointError: missing, unreadable, pickled, or not an image classifier.
    """
    if source.startswith(RANDOM_PREFIX):
        name = source.removeprefix(RANDOM_PREFIX)
        config = known_architecture(name)
        if config is None:
            raise CheckpointError(f"no architecture {name!r}; use one like {', '.join(architecture_names())}")
        return Checkpoint(source, source, config)
    path = built_in_path() if source == BUILT_IN else Path(source).expanduser()
    if path.is_dir():
        return _open_folder(source, path)
    if path.is_file():
        raise CheckpointError(f"{source} is a file; a checkpoint is a folder with config.json and model.safetensors")
    if not _looks_like_hub_id(source):
        raise CheckpointError(f"no checkpoint at {source}: the folder does not exist")
    return _open_hub(source, config_only)


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") <= 1 and not source.startswith((".", "/", "~"))


def _open_folder(source: str, path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{source} holds a peft adapter, not a whole model: merge it first (`vitopt finetune` does)"
            )
        raise CheckpointError(f"{source} has no config.json, so it is not a Hugging Face checkpoint")
    weights = tuple(sorted(path.glob("*.safetensors")))
    if not weights:
        pickled = sorted(file.name for file in path.iterdir() if file.name.endswith(_PICKLE_ENDINGS))
        if pickled:
            raise CheckpointError(_refuse_pickle(source, pickled[0]))
        raise CheckpointError(f"{source} has no .safetensors file, so there are no weights to load")
    config = _read_config(source, lambda: AutoConfig.from_pretrained(path, local_files_only=True))
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a complete safetensors file ({error}): copy it again") from error
    return Checkpoint(source, str(path), config, weights)


def _refuse_pickle(source: str, name: str) -> str:
    code = (
        "from transformers import AutoModelForImageClassification as M; "
        f"M.from_pretrained('{source}', use_safetensors=False).save_pretrained('converted')"
    )
    return (
        f"{source}: {name} is a pickle, which can run code when it is opened, so vitopt refuses it; "
        f'if you trust its origin, convert it with: python -c "{code}"'
    )


def _open_hub(source: str, config_only: bool) -> Checkpoint:
    try:
        config = _read_config(source, lambda: AutoConfig.from_pretrained(source))
    except CheckpointError:
        shape = known_architecture(source) if config_only else None
        if shape is None:
            raise
        return Checkpoint(source, source, shape)
    return Checkpoint(source, source, config)


def _read_config(source: str, read: Callable[[], Any]) -> PretrainedConfig:
    try:
        config: PretrainedConfig = read()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(_explain_load_failure(source, error)) from error
    architectures = config.architectures or []
    if not any(name.endswith("ForImageClassification") for name in architectures):
        found = ", ".join(architectures) or f"{config.model_type} without a head"
        raise CheckpointError(
            f"{source} is not an image classifier (it is {found}); vitopt needs an ...ForImageClassification model"
        )
    return config


def _explain_load_failure(source: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if not Path(source).expanduser().exists() and source != BUILT_IN:
        if "not a valid model identifier" in text or "404" in text:
            return f"no folder and no hub model named {source!r}: check the spelling, or log in with `hf auth login`"
        return (
            f"cannot fetch {source!r} from the Hugging Face hub: no network, and it is not in the local cache; "
            f"on a connected machine run `hf download {source} --local-dir FOLDER`, then pass that folder"
        )
    return f"cannot read the checkpoint {source}: {text[:300]}"


def empty_model(checkpoint: Checkpoint, classes: int | None = None) -> PreTrainedModel:
    """The model's modules on the meta device: names and shapes, no weights, no quantization."""
    config = _without_quantization(checkpoint.config)
    if classes is not None:
        config.num_labels = classes
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(config)


def _without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    content = config.to_dict()
    content.pop("quantization_config", None)
    copy = type(config).from_dict(content)
    copy.architectures = config.architectures
    return copy


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    attention: str = "sdpa",
    quantization: Any = None,
    label_names: list[str] | None = None,
) -> PreTrainedModel:
    """Load weights into a model in evaluation mode.

    `dtype` None keeps the type of the file. `quantization` is a transformers quantization config that is
    applied while loading. `label_names` other than the checkpoint's replace the head by a fresh one.

    Raises:
        CheckpointError: the weights do not fit the configuration or cannot be read.
    """
    if quantization is not None or checkpoint.is_quantized:
        environment.import_bitsandbytes() if environment.installed("bitsandbytes") else None
    options: dict[str, Any] = {"dtype": dtype or "auto", "attn_implementation": attention}
    if checkpoint.is_random:
        return _random_model(checkpoint, options, device, quantization)
    if quantization is not None:
        options["quantization_config"] = quantization
    if device is not None and device.type != "cpu":
        options["device_map"] = {"": device}
    if label_names is not None:
        options |= {
            "num_labels": len(label_names),
            "id2label": dict(enumerate(label_names)),
            "label2id": {name: index for index, name in enumerate(label_names)},
            "ignore_mismatched_sizes": True,
        }
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            checkpoint.location, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if "safetensors" in str(error) and checkpoint.folder is None:
            raise CheckpointError(_refuse_pickle(checkpoint.source, "the only weight file")) from error
        raise CheckpointError(_explain_load_failure(checkpoint.source, error)) from error
    missing = sorted(
        set(report["missing_keys"]) - (set() if label_names is None else {"classifier.weight", "classifier.bias"})
    )
    if missing:
        raise CheckpointError(f"{checkpoint.source} lacks weights that its config.json asks for, first {missing[0]}")
    return model.eval()


def _random_model(
    checkpoint: Checkpoint, options: dict[str, Any], device: torch.device | None, quantization: Any
) -> PreTrainedModel:
    if quantization is not None:
        raise CheckpointError(f"{checkpoint.source} must be saved before it is quantized")
    set_seed(_RANDOM_SEED)
    if options["dtype"] == "auto":
        options["dtype"] = torch.float32
    model = AutoModelForImageClassification.from_config(checkpoint.config, **options)
    return model.to(device or "cpu").eval()


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own image processor; a plain ViT one for random weights.

    Raises:
        CheckpointError: preprocessor_config.json is missing or unreadable.
    """
    if checkpoint.is_random:
        height, width = checkpoint.image_size
        return ViTImageProcessor(size={"height": height, "width": width}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    try:
        return AutoImageProcessor.from_pretrained(checkpoint.location)
    except (OSError, ValueError, KeyError) as error:
        if checkpoint.folder and not (checkpoint.folder / "preprocessor_config.json").is_file():
            raise CheckpointError(
                f"{checkpoint.source} has no preprocessor_config.json: copy it from the model it was made from"
            ) from error
        raise CheckpointError(_explain_load_failure(checkpoint.source, error)) from error


def save_checkpoint(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write config, safetensors and preprocessor into an existing folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers as held, quantization constants included."""
    return sum(_tensor_bytes(tensor) for tensor in _state_tensors(model))


def _state_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        # bitsandbytes keeps block scales and row scales beside the packed weight.
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            tensors += [value for value in (state.absmax, state.code, state.offset) if torch.is_tensor(value)]
            state = getattr(state, "state2", None)
        tensors += [value for value in (getattr(parameter, "SCB", None),) if torch.is_tensor(value)]
    return tensors


def _tensor_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not torch.nn.Parameter:
        # torchao's tensor subclasses wrap the tensors that are really stored.
        names, _ = tensor.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def parameter_count(model: torch.nn.Module) -> int:
    """Number of weights that the model stands for: packed matrices count their original elements."""
    total = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = isinstance(module, torch.nn.Linear) and name == "weight"
            total += module.in_features * module.out_features if packed else parameter.numel()
    return total


def disk_bytes(folder: Path) -> int:
    """Bytes of the files that transformers needs: weights, configuration, preprocessor."""
    needed = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    needed += [folder / "config.json", folder / "preprocessor_config.json"]
    return sum(path.stat().st_size for path in needed if path.is_file())
