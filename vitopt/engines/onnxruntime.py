"""ONNX Runtime on CPUs: fp32, from torch's own exporter (https://docs.pytorch.org/docs/stable/onnx.html).

The file is one that other tools take: any number of images at a time, inputs and outputs by name.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitopt import threads
from vitopt.environment import support
from vitopt.errors import UnsupportedError
from vitopt.formats import Format
from vitopt.optimize.plan import LayerPlan

MODEL_FILE = "model.onnx"
EXAMPLE = """
session = onnxruntime.InferenceSession(FOLDER / "model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {"pixel_values": values})[0]
"""
_OPSET = 18  # the first that the exporter writes without converting


def why_not(format: Format) -> str | None:
    """Why this processor cannot compute in a format, or None when it can: fp32 runs everywhere."""
    return None


def write(
    model: nn.Module,
    size: tuple[int, int],
    plan: LayerPlan,
    images: Sequence[np.ndarray] | None,
    folder: Path,
) -> dict[str, str]:
    """Write the model in fp32, weights of 2 GB and more in a file beside it, and check it by `onnx.checker`.

    Raises:
        UnsupportedError: what exports is not installed, or ONNX has no such operator.
    """
    for package in ("onnx", "onnxscript"):
        if not support.installed(package):
            raise UnsupportedError(f"an ONNX file takes {package}, which is not installed (pip install 'vitopt[onnx]')")
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    large = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) >= 2**31 - 2**24
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (torch.zeros(2, 3, *size),),
                folder / MODEL_FILE,
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
                opset_version=_OPSET,
                external_data=large,
                dynamo=True,
                verbose=False,
            )
        onnx.checker.check_model(folder / MODEL_FILE)
    except Exception as error:  # the exporter raises whatever it runs into
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"torch cannot write this {type(model.model).__name__} as ONNX: {reason}") from error
    return {}


def load(folder: Path, settings: Mapping[str, Any]) -> "OnnxCall":
    """Open the model file."""
    return OnnxCall(folder / MODEL_FILE)


class OnnxCall:
    """A session of ONNX Runtime on the CPU, for any number of images."""

    fixed_shapes = False

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with threads.unbound():  # else its threads would share the core of this one
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """`pixel_values`: (batch, 3, height, width). Returns logits (batch, classes)."""
        logits: np.ndarray = self._session.run(["logits"], {"pixel_values": pixel_values})[0]
        return logits

    def formats(self, modules: Iterable[str]) -> dict[str, str]:
        """fp32: the session takes and gives it, and the file holds nothing else."""
        (kind,) = {value.type for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        return dict.fromkeys(modules, {"tensor(float)": "fp32"}.get(kind, "unknown"))
