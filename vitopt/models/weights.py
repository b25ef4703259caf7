"""Weights from outside: which files are opened, what their headers say, and whether loaded values are finite.

Weights are safetensors files of the checkpoint's own folder. A header names tensors, their shapes and their types
before any of them is read.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vitopt.errors import CheckpointError
from vitopt.models.gate import read_mapping

INDEX_FILE = "model.safetensors.index.json"
WHOLE_FILE = "model.safetensors"
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATING = ("F64", "F32", "F16", "BF16")
# What is asked for and not held is drawn at random before it is refused by name: at most as much again.
_MOST_ASKED = 2
_PACKED_PER_BYTE = 2


def weight_files(source: str, folder: Path) -> tuple[Path, ...]:
    """The safetensors files that a local checkpoint is loaded from: one, or those that its index lists.

    Raises:
        CheckpointError: there are none, a link leads out of the folder, or the index names what it may not.
    """
    names = [WHOLE_FILE]
    if not _is_there(folder / WHOLE_FILE) and (folder / INDEX_FILE).is_file():  # beside the whole file it is not read
        names = shards(source, folder / INDEX_FILE)
        missing = [name for name in names if not _is_there(folder / name)]
        if missing:
            raise CheckpointError(f"{source} lacks {missing[0]}, which {INDEX_FILE} names: copy all weight files")
    elif not _is_there(folder / WHOLE_FILE):
        pickled = sorted(file.name for file in folder.iterdir() if file.name.endswith(_PICKLE_ENDINGS))
        if pickled:
            raise CheckpointError(explain_pickle(source, pickled[0]))
        raise CheckpointError(f"{source} has no {WHOLE_FILE}, so there are no weights to load")
    files = tuple(folder / name for name in names)
    for file in files:
        if not _belongs_to(file, folder):
            raise CheckpointError(f"{file} is a link that leaves its folder: copy the file itself there")
        if not file.is_file():
            raise CheckpointError(f"{file} is not a plain file: copy it again")
    return files


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def shards(source: str, index: Path) -> list[str]:
    """Names of the weight files that an index lists, sorted.

    Raises:
        CheckpointError: it is no index, or a name is not that of a safetensors file beside it.
    """
    weight_map = read_mapping(source, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{source}: {index.name} has no weight_map: copy the file again")
    for name in weight_map.values():
        if not isinstance(name, str) or re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name) is None:
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


@dataclass(frozen=True)
class Stored:
    """One tensor as a header describes it; `dtype` in the words of safetensors, as `BF16`."""

    shape: tuple[int, ...]
    dtype: str


def read_headers(files: tuple[Path, ...]) -> dict[str, Stored]:
    """What the weight files say that they hold, by name of the tensor; no weight is read.

    Raises:
        CheckpointError: one is no complete safetensors file.
    """
    tensors: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is not a mapping)
                    stored = opened.get_slice(name)
                    tensors[name] = Stored(tuple(stored.get_shape()), stored.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a complete safetensors file ({error}): copy it again") from error
    return tensors


def require_fitting(source: str, tensors: dict[str, Stored], model: torch.nn.Module, packed: bool) -> None:
    """Compare headers with the `model` that config.json describes, before its memory is taken.

    Names are compared when the weights are loaded, as transformers knows their older names.

    Raises:
        CheckpointError: fewer weights than the model has, no floating-point numbers, or not packed as it is said.
    """
    wanted = sum(parameter.numel() for parameter in model.parameters())
    held = sum(math.prod(stored.shape) for stored in tensors.values())
    if wanted > _MOST_ASKED * held * (_PACKED_PER_BYTE if packed else 1):
        raise CheckpointError(
            f"{source} lacks weights: its config.json asks for {wanted:,}, the files hold {held:,}; copy both from one "
            "model"
        )
    if packed and all(stored.dtype in _FLOATING for stored in tensors.values()):
        raise CheckpointError(f"{source}: config.json says quantization_config, and no weight is packed: copy it again")
    kinds = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    for name, stored in tensors.items():
        if not packed and stored.dtype not in _FLOATING and name.rpartition(".")[2] in kinds:
            raise CheckpointError(
                f"{source} holds {name} as {stored.dtype}, which is not a floating-point type, and its config.json has "
                "no quantization_config: copy both from one model"
            )


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors that are really held: parameters and buffers, and what packed ones keep beside them."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield from _plain_tensors(name, tensor)
        # bitsandbytes keeps block scales and row scales beside the packed weight.
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            beside = (state.absmax, state.code, state.offset)
            yield from ((name, scales) for scales in beside if torch.is_tensor(scales))
            state = getattr(state, "state2", None)
        if torch.is_tensor(scales := getattr(tensor, "SCB", None)):
            yield name, scales
    for name, module in model.named_modules():
        # The first call of an int8 layer moves its row scales from the weight to the layer.
        if torch.is_tensor(scales := getattr(getattr(module, "state", None), "SCB", None)):
            yield name, scales


def _plain_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not torch.nn.Parameter:
        # torchao's tensor subclasses wrap the tensors that are really stored.
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(name, getattr(tensor, inner))
    else:
        yield name, tensor


@torch.no_grad()
def first_not_finite(model: torch.nn.Module) -> str | None:
    """Name of the first tensor with NaN or infinity; read once, nothing is copied. None where all are numbers."""
    floating = [
        (name, tensor.detach())
        for name, tensor in named_tensors(model)
        if tensor.is_floating_point() and tensor.numel()
    ]
    # Types of 8 bit cannot be compared; both limits are NaN where one element is.
    limits = [
        torch.stack(torch.aminmax(tensor if tensor.itemsize > 1 else tensor.to(torch.bfloat16)))
        for _, tensor in floating
    ]
    if not limits:
        return None
    finite = torch.stack([limit.float() for limit in limits]).isfinite().all(1).tolist()
    return next((name for (name, _), good in zip(floating, finite, strict=True) if not good), None)


def order_header(file: Path) -> None:
    """Sort the metadata of a safetensors file, which its writer puts there in an order of its own each time."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
        if "__metadata__" not in header:
            return
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # else it is written otherwise than expected, which changes nothing of its meaning
            stream.seek(8)
            stream.write(text.ljust(length))
