"""Checkpoints: find, check, load, save. safetensors only, no pickle, no code from a checkpoint."""

import copy
import hashlib
import importlib.resources
import json
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ImageProcessingMixin,
    PretrainedConfig,
    PreTrainedModel,
    ViTImageProcessor,
)

from vitopt import storage
from vitopt.environment import libraries, support
from vitopt.errors import CheckpointError, MeasurementError
from vitopt.models import gate, hub, timm_models, weights
from vitopt.models.activations import ACTIVATIONS_FILE
from vitopt.models.architectures import RANDOM_PREFIX, explain_names, known_architecture
from vitopt.models.classes import name_input_embeddings
from vitopt.models.families import FAMILIES, TIMM
from vitopt.models.names import is_in_block
from vitopt.paths import existing

BUILT_IN = "vit-quickstart"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
_ADAPTER_FILE = "adapter_config.json"
_RANDOM_SEED = 0


@dataclass(frozen=True)
class Checkpoint:
    """An image classifier that can be opened: where it is and what its configuration says."""

    source: str
    location: str  # a folder or a hub id; `random:` sources have none
    config: PretrainedConfig = field(repr=False)
    weights: tuple[Path, ...] = field(default=(), repr=False)  # of a local folder
    revision: str | None = None  # of a hub id: the commit that was checked, and so the one to load from

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
        return image_size(self.config)

    @property
    def label_names(self) -> list[str]:
        """Class names in the order of the head's outputs."""
        return [str(self.config.id2label.get(index, f"LABEL_{index}")) for index in range(self.config.num_labels)]

    @property
    def is_quantized(self) -> bool:
        """Whether the weights on disk are already quantized."""
        return getattr(self.config, "quantization_config", None) is not None

    def fingerprint(self) -> str:
        """Hex digest that changes when a configuration, weight or observed scale does, not when the folder moves."""
        content = self.config.to_dict()
        content.pop("_name_or_path", None)
        digest = hashlib.sha256(json.dumps([content, self.revision], sort_keys=True, default=str).encode())
        others = [self.folder / name for name in (PREPROCESSOR_FILE, ACTIVATIONS_FILE)] if self.folder else []
        for path in (*self.weights, *filter(Path.is_file, others)):
            digest.update(storage.sha256_of_file(path).encode())
        return digest.hexdigest()


def image_size(config: PretrainedConfig) -> tuple[int, int]:
    """Height and width in pixels that a configuration is made for."""
    if config.model_type == TIMM:
        return timm_models.image_size(config)
    # Families with a text half keep it with the rest of the vision half.
    size = getattr(config, "vision_config", config).image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


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
            raise CheckpointError(f"no architecture {name!r}; {explain_names()}")
        if config.model_type == TIMM:
            timm_models.require_timm()
        gate.refuse_mistakes(source, "the architecture", gate.mistakes_of_config(config.to_dict()))
        return Checkpoint(source, source, config)
    path = built_in_path() if source == BUILT_IN else existing(source)
    if path is not None and path.is_dir():
        return _open_folder(source, path)
    if path is not None:
        raise CheckpointError(f"{source} is a file; a checkpoint is a folder with config.json and model.safetensors")
    if not _looks_like_hub_id(source):
        raise CheckpointError(f"no checkpoint at {source}: the folder does not exist")
    return _open_hub(source, config_only)


def _looks_like_hub_id(source: str) -> bool:
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _open_folder(source: str, path: Path) -> Checkpoint:
    if (path / _ADAPTER_FILE).is_file():
        raise gate.adapter_error(source)
    if not (path / CONFIG_FILE).is_file():
        if (path / "example.py").is_file():
            raise CheckpointError(f"{source} was exported to run alone: python {path / 'example.py'} photo.jpg")
        raise CheckpointError(f"{source} has no config.json, so it is not a Hugging Face checkpoint")
    files = weights.weight_files(source, path)
    config = _read_config(source, path / CONFIG_FILE)
    weights.read_headers(files)
    return Checkpoint(source, str(path), config, files)


def _open_hub(source: str, config_only: bool) -> Checkpoint:
    try:
        path = hub.fetch_config(source, CONFIG_FILE)
    except CheckpointError:
        shape = known_architecture(source) if config_only else None
        if shape is None:
            raise
        return Checkpoint(source, source, shape)
    revision = path.parent.name
    config = _read_config(source, path)
    # Small files that say which weights are opened; the weights themselves are fetched when they are loaded.
    if hub.fetch(source, _ADAPTER_FILE, revision) is not None:
        raise gate.adapter_error(source)
    index = hub.fetch(source, weights.INDEX_FILE, revision)
    if index is not None:
        weights.shards(source, index)
    return Checkpoint(source, source, config, revision=revision)


def _read_config(source: str, path: Path) -> PretrainedConfig:
    content = gate.read_config(source, path)
    if content["model_type"] == TIMM:
        timm_models.require_timm()
    try:
        config: PretrainedConfig = CONFIG_MAPPING[content["model_type"]].from_dict(content)
        image_size(config)
    except Exception as error:  # the libraries raise errors of any type on broken files
        raise CheckpointError(_explain_load_failure(source, error)) from error
    return config


def _explain_load_failure(source: str, error: Exception, on_hub: bool = False) -> str:
    if on_hub and isinstance(error, OSError):
        return hub.explain_no_network(source)
    text = " ".join(str(error).split())
    return f"cannot read the checkpoint {source}: {textwrap.shorten(text, 300, placeholder=' ...')}"


def empty_model(checkpoint: Checkpoint, classes: int | None = None) -> PreTrainedModel:
    """The model's modules on the meta device: names and shapes, no weights, no quantization.

    Raises:
        CheckpointError: transformers cannot make a model of the configuration.
    """
    config = _without_quantization(checkpoint.config)
    if classes is not None:
        config.num_labels = classes
    try:
        with torch.device("meta"):
            return AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # as above
        raise CheckpointError(_explain_load_failure(checkpoint.source, error)) from error


def _without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    content = config.to_dict()
    content.pop("quantization_config", None)
    plain = type(config).from_dict(content)
    plain.architectures = config.architectures
    return plain


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    attention: str | None = None,
    quantization: Any = None,
    label_names: list[str] | None = None,
) -> PreTrainedModel:
    """Load weights into a model in evaluation mode.

    `dtype` None keeps the type of the file, `attention` None takes sdpa where the family has it. `quantization` is
    a transformers quantization config that is applied while loading. `label_names` rename the head's outputs; a head
    of another width is a fresh one.

    Raises:
        CheckpointError: the weights do not fit the configuration, cannot be read, or are not all finite numbers.
        MeasurementError: weights that are finite in the file overflow `dtype`.
    """
    if quantization is not None or checkpoint.is_quantized:
        libraries.import_bitsandbytes() if support.installed("bitsandbytes") else None
    options: dict[str, Any] = {"dtype": dtype or "auto", "attn_implementation": attention}
    if checkpoint.is_random:
        return _random_model(checkpoint, options, device, quantization, label_names)
    if files := checkpoint.weights or _fetched_weights(checkpoint.source, checkpoint.revision):
        headers = weights.read_headers(files)
        weights.require_fitting(checkpoint.source, headers, empty_model(checkpoint), checkpoint.is_quantized)
    if quantization is not None:
        options["quantization_config"] = quantization
        name_input_embeddings(checkpoint.config)
    if device is not None and device.type != "cpu":
        options["device_map"] = {"": device}
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            checkpoint.location,
            config=_with_labels(checkpoint.config, label_names),
            revision=checkpoint.revision,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            # Weights that do not fit are left out here and refused below, where it can be said which.
            ignore_mismatched_sizes=True,
            **options,
        )
    except torch.OutOfMemoryError:
        raise  # of a device, which says nothing about the files
    except Exception as error:  # as above
        if "safetensors" in str(error) and checkpoint.folder is None:
            raise CheckpointError(weights.explain_pickle(checkpoint.source, "the only weight file")) from error
        explained = _explain_load_failure(checkpoint.source, error, on_hub=checkpoint.revision is not None)
        raise CheckpointError(explained) from error
    heads = FAMILIES[model.config.model_type].heads if label_names is not None else ()
    _require_all_weights(checkpoint, report, {f"{head}.{part}" for head in heads for part in ("weight", "bias")})
    if broken := weights.first_not_finite(model):
        if model.dtype is torch.float16 and checkpoint.config.dtype is not torch.float16:
            raise MeasurementError(f"{checkpoint.source} has weights that overflow fp16, first {broken}: take bf16")
        raise CheckpointError(f"{checkpoint.source} has NaN or infinite weights, first {broken}: copy it again")
    return model.eval()


def _fetched_weights(source: str, revision: str | None) -> tuple[Path, ...]:
    """The weight files of a hub id, in the cache; none where it has no safetensors."""
    if revision is None:
        return ()
    index = hub.fetch(source, weights.INDEX_FILE, revision)
    names = weights.shards(source, index) if index else [weights.WHOLE_FILE]
    files = [hub.fetch(source, name, revision) for name in names]
    return () if files[0] is None else weights.weight_files(source, files[0].parent)


def _with_labels(config: PretrainedConfig, names: list[str] | None) -> PretrainedConfig:
    config = copy.deepcopy(config)
    if names is not None:
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
        config.update({"num_labels": len(names), **labels})
    return config


def _require_all_weights(checkpoint: Checkpoint, report: dict[str, Any], fresh: set[str]) -> None:
    """Refuse a model of which transformers has drawn some weights at random, other than those of a fresh head, or of
    whose blocks it has left some out."""
    source = checkpoint.source
    more = sorted(name for name in report["unexpected_keys"] if is_in_block(name, checkpoint.config.model_type))
    if more:
        raise CheckpointError(
            f"{source} holds weights that its config.json has no layer for, first {more[0]}: copy both from one model"
        )
    missing = sorted(set(report["missing_keys"]) - fresh)
    if missing:
        raise CheckpointError(
            f"{source} lacks weights that its config.json asks for, first {missing[0]}: copy both from one model"
        )
    misfits = sorted(misfit for misfit in report["mismatched_keys"] if misfit[0] not in fresh)
    if misfits:
        name, held, wanted = misfits[0]
        raise CheckpointError(
            f"the weights of {source} do not fit its config.json, first {name}: its shape is {tuple(held)}, "
            f"the configuration asks for {tuple(wanted)}; copy both from one model"
        )


def _random_model(
    checkpoint: Checkpoint,
    options: dict[str, Any],
    device: torch.device | None,
    quantization: Any,
    label_names: list[str] | None,
) -> PreTrainedModel:
    if quantization is not None:
        raise CheckpointError(f"{checkpoint.source} must be saved before it is quantized")
    from transformers import set_seed  # whose module imports peft and bitsandbytes, a second of each start

    set_seed(_RANDOM_SEED)
    dtype = torch.float32 if options["dtype"] == "auto" else options["dtype"]
    config = _with_labels(checkpoint.config, label_names)
    # Drawn in fp32 and rounded, so that the same source has the same weights in every type.
    options |= {"dtype": torch.float32, "trust_remote_code": False}
    model = AutoModelForImageClassification.from_config(config, **options)
    model.config.dtype = dtype
    return model.to(device or "cpu", dtype).eval()


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's own image processor; a plain ViT one for random weights.

    Raises:
        CheckpointError: preprocessor_config.json is missing, unreadable, names code, or makes no pixels that the
            model takes.
    """
    if checkpoint.config.model_type == TIMM:
        return timm_models.image_processor(checkpoint.config)
    if checkpoint.is_random:
        height, width = checkpoint.image_size
        return ViTImageProcessor(size={"height": height, "width": width}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    try:
        content, _ = ImageProcessingMixin.get_image_processor_dict(checkpoint.location, revision=checkpoint.revision)
        gate.check_preprocessor(checkpoint.source, content)
        processor = AutoImageProcessor.from_pretrained(
            checkpoint.location, config=checkpoint.config, revision=checkpoint.revision, trust_remote_code=False
        )
        gate.require_pixels(checkpoint.source, processor, checkpoint.image_size, lambda: empty_model(checkpoint))
        return processor
    except CheckpointError:
        raise
    except ImportError as error:
        raise CheckpointError(
            f"the installed transformers reads {PREPROCESSOR_FILE} with torchvision only: install torchvision, "
            "or a newer transformers"
        ) from error
    except Exception as error:  # as above
        if checkpoint.folder and not (checkpoint.folder / PREPROCESSOR_FILE).is_file():
            raise CheckpointError(
                f"{checkpoint.source} has no {PREPROCESSOR_FILE}: copy it from the model it was made from"
            ) from error
        raise CheckpointError(
            _explain_load_failure(checkpoint.source, error, on_hub=checkpoint.revision is not None)
        ) from error


def save_checkpoint(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write config, safetensors and preprocessor into an existing folder."""
    storage.require_space(folder.parent, weight_bytes(model))
    model.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        weights.order_header(file)  # so that the same weights are the same bytes
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    if model.config.model_type != TIMM:  # whose config.json holds it
        processor.save_pretrained(folder)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers as held, quantization constants included."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in weights.named_tensors(model))


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
    needed += [folder / "config.json", folder / PREPROCESSOR_FILE]
    return sum(path.stat().st_size for path in needed if path.is_file())
