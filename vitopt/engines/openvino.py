"""OpenVINO on CPUs: fp32, bf16 by its precision hint, int8 by NNCF.

int8 without images: weights are rounded by channel, activations in each call in groups of 64 (`compress_weights` and
OpenVINO's dynamic quantization). With images: NNCF's post-training quantization with SmoothQuant (arXiv 2211.10438),
whose scales of activations are fixed for a whole tensor; faster, and further from fp32. https://docs.openvino.ai,
https://github.com/openvinotoolkit/nncf
"""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitopt import threads
from vitopt.environment import libraries, support
from vitopt.errors import UnsupportedError
from vitopt.formats import Format
from vitopt.optimize.plan import LayerPlan

MODEL_FILE = "model.xml"
EXAMPLE = """
model = openvino.Core().compile_model(FOLDER / "model.xml", "CPU", SETTINGS)
logits = model(values)[0]
"""
_FORMATS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "w8a8", "i8": "w8a8"}
_PRECISION, _GROUP = "INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE"
_PRODUCTS = ("MatMul", "Convolution", "ScaledDotProductAttention")


def why_not(format: Format) -> str | None:
    """Why this processor cannot compute in a format, or None when it can."""
    with threads.unbound():
        able = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if format != "bf16" or "BF16" in able else "this processor has no bf16 arithmetic"


def write(
    model: nn.Module,
    size: tuple[int, int],
    plan: LayerPlan,
    images: Sequence[np.ndarray] | None,
    folder: Path,
) -> dict[str, str]:
    """Write the model with fp32 weights, or int8 ones where the plan says w8a8, and return what compiles it.

    Raises:
        UnsupportedError: OpenVINO has no such operator, or nncf is needed and not installed.
    """
    import openvino

    try:
        with libraries.silent():
            converted = openvino.convert_model(model, example_input=torch.zeros(2, 3, *size), input=[-1, 3, *size])
    except Exception as error:  # its frontend raises whatever it runs into
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"openvino cannot convert this {type(model.model).__name__}: {reason}") from error
    quantized = plan.modules("w8a8")
    if quantized:
        converted = _quantized(converted, {f"{_node(module)}/aten::linear/MatMul" for module in quantized}, images)
    openvino.save_model(converted, folder / MODEL_FILE, compress_to_fp16=False)
    in_bf16 = (quantized or plan.modules("bf16")) and why_not("bf16") is None
    dynamic = {_GROUP: "64" if quantized and images is None else "0"}
    return {_PRECISION: "bf16" if in_bf16 else "f32", **dynamic}


def _quantized(model: Any, layers: set[str], images: Sequence[np.ndarray] | None) -> Any:
    """The model with int8 products in these layers alone: patches, attention and head stay as they are.

    Raises:
        UnsupportedError: nncf is not installed, or the converted model has no such layer.
    """
    if not support.installed("nncf"):
        raise UnsupportedError("int8 for openvino needs nncf, which is not installed (pip install 'vitopt[openvino]')")
    import nncf

    nncf.set_log_level(logging.ERROR)
    products = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() in _PRODUCTS]
    if unknown := sorted(layers - set(products)):
        raise UnsupportedError(f"openvino has no {unknown[0]} in the converted model, so it cannot be int8")
    others = nncf.IgnoredScope(names=[name for name in products if name not in layers])
    with libraries.silent():
        if images is None:
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=others)
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=others,
        )


def _node(module: str) -> str:
    """What OpenVINO calls a module of `Logits.model`."""
    return f"__module.model.{module}"


def load(folder: Path, settings: Mapping[str, str]) -> "OpenVINOCall":
    """Open the model file, to be compiled with what `write` returned."""
    return OpenVINOCall(folder / MODEL_FILE, settings)


class OpenVINOCall:
    """A model, compiled for each batch size as it comes."""

    fixed_shapes = True

    def __init__(self, file: Path, settings: Mapping[str, str]) -> None:
        with threads.unbound():
            self._model = _core().read_model(file)
        self._settings = dict(settings)
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """`pixel_values`: (batch, 3, height, width). Returns logits (batch, classes)."""
        shape = pixel_values.shape
        if shape not in self._compiled:
            self._compiled[shape] = self._compile(shape, self._settings)
        with threads.unbound():  # its threads start in the first call
            return np.array(self._compiled[shape].infer([pixel_values])[0])  # not in the request's memory

    def formats(self, modules: Iterable[str]) -> dict[str, str]:
        """Format in which each linear module's product is computed, from the compiled graph.

        `w8`: int8 weights, whose activations this processor does not round although it was asked to.
        """
        request = next(iter(self._compiled.values()), None) or self._compile(self._one_image, self._settings)
        precisions: dict[str, str] = {}
        nameless = []  # products that lost their names to fusing
        for operation in request.get_compiled_model().get_runtime_model().get_ordered_ops():
            facts = {key: value.astype(str) for key, value in operation.get_rt_info().items()}
            if facts["layerType"] == "FullyConnected":
                parts = (name.rpartition("/aten::linear/")[0] for name in facts["originalLayersNames"].split(","))
                named = next(filter(None, parts), None)
                if named is None:
                    nameless.append(facts["runtimePrecision"])
                else:
                    precisions[named] = facts["runtimePrecision"]
        nodes = {module: _node(module) for module in modules}
        missing = [node for node in nodes.values() if node not in precisions]
        if len(missing) == len(nameless):  # both in order of execution
            precisions |= zip(missing, nameless, strict=True)
        known = _FORMATS if self._settings[_GROUP] == "0" or self._rounds_activations else _FORMATS | {"i8": "w8"}
        return {module: known.get(precisions.get(node, ""), "unknown") for module, node in nodes.items()}

    @functools.cached_property
    def _rounds_activations(self) -> bool:
        """Whether asking for rounded activations changes an answer; the compiled graph does not tell."""
        pixel_values = np.random.default_rng(0).standard_normal(self._one_image, dtype=np.float32)
        rounded, plain = (
            self._compile(self._one_image, self._settings | {_GROUP: group}).infer([pixel_values])[0]
            for group in (self._settings[_GROUP], "0")
        )
        return not np.array_equal(rounded, plain)

    @property
    def _one_image(self) -> tuple[int, ...]:
        return (1, *(size.get_length() for size in list(self._model.input().get_partial_shape())[1:]))

    def _compile(self, shape: tuple[int, ...], settings: dict[str, str]) -> Any:
        model = self._model.clone()
        model.reshape(list(shape))
        many = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        with threads.unbound():
            return _core().compile_model(model, "CPU", settings | many).create_infer_request()


@functools.cache
def _core() -> Any:
    """To be used `unbound`: OpenVINO takes the CPUs that its first caller may use for all that there are."""
    import openvino

    return openvino.Core()
