"""ONNX Runtime on CPUs: fp32, fp16 and int8, from torch's own exporter (https://docs.pytorch.org/docs/stable/onnx.html).

The file is one that other tools take: any number of images at a time, inputs and outputs by name, each linear layer's
node by the name of its module. int8 by ONNX Runtime's own quantization
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html): weights by output channel; activations
by one scale for a whole tensor, found in each call, or fixed by images (QDQ).
"""

import ast
import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitopt import storage, threads
from vitopt.environment import libraries, support
from vitopt.errors import UnsupportedError
from vitopt.formats import Format
from vitopt.optimize.plan import LayerPlan

MODEL_FILE = "model.onnx"
EXAMPLE = """
session = onnxruntime.InferenceSession(FOLDER / "model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {"pixel_values": values})[0]
"""
_OPSET = 18  # the first that the exporter writes without converting
_LARGEST = 2**31 - 2**24  # bytes of weights in one protobuf file
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules that it is of, outermost first, and itself
_TALKERS = ("torch.onnx", "root", "onnxscript", "onnx_ir")  # loggers of what exports and quantizes
_PRODUCTS = ("MatMul", "Gemm")
_OF_GEMM = "_MatMul"  # onnxruntime makes a product and a sum of a Gemm before it quantizes dynamically
_FORMATS = {"uint8": "w8a8", "int8": "w8a8", "float16": "fp16", "float": "fp32"}
_INT8_PRODUCTS = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul")


def why_not(format: Format) -> str | None:
    """Why this processor cannot compute in a format, or None when it can: fp32 and int8 run everywhere, and fp16, where
    there is no arithmetic for it, in fp32 (`OnnxCall.formats` tells)."""
    return None


def write(
    model: nn.Module,
    size: tuple[int, int],
    plan: LayerPlan,
    images: Sequence[np.ndarray] | None,
    folder: Path,
) -> dict[str, str]:
    """Write the model in fp32, in fp16, or with int8 layers where the plan says w8a8, and check it by `onnx.checker`.

    Weights of 2 GB and more are in a file beside it. Pixels and logits are fp32 in all formats.

    Raises:
        UnsupportedError: what exports is not installed, or ONNX has no such operator.
    """
    for package in ("onnx", "onnxscript"):
        if not support.installed(package):
            raise UnsupportedError(f"an ONNX file takes {package}, which is not installed (pip install 'vitopt[onnx]')")
    import onnx  # not with the rest: it may be missing

    quantized = plan.modules("w8a8")
    half = bool(plan.modules("fp16"))
    try:
        with libraries.silent(*_TALKERS), storage.temporary_folder() as scratch:
            float_file = scratch / MODEL_FILE if quantized else folder / MODEL_FILE
            _export(_InHalf(model) if half else model, size, float_file, {one.layer.module for one in plan.layers})
            if quantized:
                _quantize(float_file, set(quantized), images, folder / MODEL_FILE)
            onnx.checker.check_model(folder / MODEL_FILE)
    except UnsupportedError:
        raise
    except Exception as error:  # the exporter raises whatever it runs into
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"torch cannot write this {type(model.model).__name__} as ONNX: {reason}") from error
    return {}


class _InHalf(nn.Module):
    """A copy of `Logits` in fp16, between pixels and logits in fp32."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(host.model).half()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width). Returns (batch, classes)."""
        logits: torch.Tensor = self.model(pixel_values=pixel_values.half()).logits
        return logits.float()


def _export(model: nn.Module, size: tuple[int, int], file: Path, modules: set[str]) -> None:
    """Write an ONNX file in which the products of linear `modules` have the modules' names.

    Raises:
        UnsupportedError: a module is not one product in the file.
    """
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, *size),),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        opset_version=_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # as no file was named
    found: set[str] = set()
    for node in program.model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        module = scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""
        if node.op_type in _PRODUCTS and module in modules - found:
            node.name = module
            found.add(module)
    if lacking := sorted(modules - found):
        raise UnsupportedError(f"torch writes {lacking[0]} as something else than one product in ONNX")
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    program.save(file, external_data=bytes_ >= _LARGEST)


def _quantize(source: Path, layers: set[str], images: Sequence[np.ndarray] | None, output: Path) -> None:
    """Write the file `source` with int8 products in `layers`, whose nodes have their names, and in no others."""
    import onnx
    from onnxruntime import quantization

    model = onnx.load(source)
    del model.graph.value_info[:]  # shapes of before; onnxruntime finds them anew, and stumbles over those of weights
    large = model.ByteSize() >= _LARGEST
    options: dict[str, Any] = {
        "op_types_to_quantize": list(_PRODUCTS),
        "nodes_to_quantize": [name + ending for name in sorted(layers) for ending in ("", _OF_GEMM)],
        "per_channel": True,
        "weight_type": quantization.QuantType.QInt8,
        "use_external_data_format": large,
    }
    if images is None:
        quantization.quantize_dynamic(model, output, **options, extra_options={"MatMulConstBOnly": True})
        return
    quantization.quantize_static(
        model,
        output,
        _Reader(images),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        **options,
        # What a product gives is not rounded: residuals, attention and GELU stay in fp32.
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(_PRODUCTS)},
    )


def load(folder: Path, settings: Mapping[str, Any]) -> "OnnxCall":
    """Open the model file."""
    return OnnxCall(folder / MODEL_FILE)


class OnnxCall:
    """A session of ONNX Runtime on the CPU, for any number of images."""

    fixed_shapes = False

    def __init__(self, file: Path) -> None:
        # Its first call is profiled, as the file may be gone when formats are asked for.
        with storage.temporary_folder() as folder:
            self._session = _open(file, profile=folder / "profile")
            self(np.zeros((1, 3, *self._session.get_inputs()[0].shape[2:]), np.float32))
            self._computed = _computed(Path(self._session.end_profiling()))

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """`pixel_values`: (batch, 3, height, width). Returns logits (batch, classes)."""
        logits: np.ndarray = self._session.run(["logits"], {"pixel_values": pixel_values})[0]
        return logits

    def formats(self, modules: Iterable[str]) -> dict[str, str]:
        """Format in which each linear module's product is computed, from a profiled call.

        fp16 weights are expanded to fp32 where this processor has no fp16 arithmetic, which is then what is told.
        """
        return {module: self._computed.get(module, "unknown") for module in modules}


class _Reader:
    """Calibration images as onnxruntime asks for them, one at a time."""

    def __init__(self, images: Sequence[np.ndarray]):
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image, None after the last."""
        image = next(self._images, None)
        return None if image is None else {"pixel_values": image}


def _computed(profile: Path) -> dict[str, str]:
    """Name of a node, as it was before it was fused -> format of what it computes with."""
    computed = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        name, _, what = event["name"].rpartition("_kernel")
        if what == "_time":
            before_fusion = name.partition("/")[0]
            computed[before_fusion.removesuffix("_quant").removesuffix(_OF_GEMM)] = _format_of(event["args"])
    return computed


def _format_of(node: Mapping[str, Any]) -> str:
    """What a profiled node computes with."""
    if node["op_name"] in _INT8_PRODUCTS:
        return "w8a8"
    given = {kind for value in node["input_type_shape"] for kind in value}
    return next((format for kind, format in _FORMATS.items() if kind in given), "unknown")


def _open(file: Path, profile: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    options.enable_profiling, options.profile_file_prefix = True, str(profile)
    with threads.unbound():  # else its threads would share the core of this one
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
