"""TensorRT on NVIDIA GPUs: fp32, fp16, bf16, and 8 bit by scales that calibration images fix.

The network is strongly typed (TensorRT 10 and 11): the ONNX file that torch writes says what each layer computes in,
8-bit layers by QuantizeLinear and DequantizeLinear around their inputs and weights.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitopt import storage
from vitopt.environment import libraries, support
from vitopt.environment.devices import DTYPES
from vitopt.errors import MeasurementError, UnsupportedError
from vitopt.formats import FORMATS, QUANTIZED_FORMATS, Format
from vitopt.models.names import linear_layers
from vitopt.optimize.calibrate import observe
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.static import KINDS, quantized

MODEL_FILE = "model.engine"
EXAMPLE = """
import torch  # holds the memory on the GPU

logger = tensorrt.Logger(tensorrt.Logger.ERROR)
engine = tensorrt.Runtime(logger).deserialize_cuda_engine((FOLDER / "model.engine").read_bytes())
context = engine.create_execution_context()
pixels, stream = torch.from_numpy(values).cuda(), torch.cuda.Stream()
profile = next(index for index, most in enumerate(SETTINGS["batches"]) if len(pixels) <= most)
context.set_optimization_profile_async(profile, stream.cuda_stream)
context.set_input_shape("pixel_values", tuple(pixels.shape))
logits = torch.empty((len(pixels), engine.get_tensor_shape("logits")[1]), device="cuda")
for name, tensor in (("pixel_values", pixels), ("logits", logits)):
    context.set_tensor_address(name, tensor.data_ptr())
torch.cuda.synchronize()
context.execute_async_v3(stream.cuda_stream)
stream.synchronize()
logits = logits.cpu().numpy()
"""
_OPSET = 19  # the first that quantizes bf16, and to fp8
# One image has kernels of its own, and so have few and many: largest batch of each profile and the one it is tuned for.
_PROFILES = ((1, 1), (32, 8), (256, 64))


def why_not(format: Format) -> str | None:
    """Why the current GPU cannot compute in a format, or None when it can."""
    least = FORMATS[format].capability
    return support.capability_below(torch.device("cuda", torch.cuda.current_device()), least) if least else None


def write(
    model: nn.Module,
    size: tuple[int, int],
    plan: LayerPlan,
    images: Sequence[np.ndarray] | None,
    folder: Path,
) -> dict[str, Any]:
    """Build the model for the current GPU.

    Raises:
        UnsupportedError: there are no images for 8 bit, what exports is not installed, or ONNX or TensorRT lacks an
            operator.
    """
    for package in ("onnx", "onnxscript"):
        if not support.installed(package):
            raise UnsupportedError(f"tensorrt takes {package}, which is not installed (pip install 'vitopt[tensorrt]')")
    typed = _typed(model, plan, images)
    with storage.temporary_folder() as scratch:
        _export(typed, size, scratch / "model.onnx")
        (folder / MODEL_FILE).write_bytes(_build(scratch / "model.onnx", size, type(model.model).__name__))
    layers = {planned.layer.module: planned.format for planned in plan.layers}
    return {"batches": [most for most, _ in _PROFILES], "layers": layers}


class _Typed(nn.Module):
    """A copy of `Logits` in one floating-point type, between pixels and logits in fp32."""

    def __init__(self, host: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = copy.deepcopy(host.model).to(dtype), dtype

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width). Returns (batch, classes)."""
        logits: torch.Tensor = self.model(pixel_values=pixel_values.to(self.dtype)).logits
        return logits.float()


class QdqLinear(nn.Module):
    """A linear layer whose inputs and weights are quantized, as ONNX says it; it computes in no other place."""

    def __init__(self, host: nn.Linear, largest: float, format: str):
        super().__init__()
        weight, kind = host.weight.data.float(), KINDS[format]
        # int8 has a scale for each output, fp8 one for all.
        most = weight.abs().amax(dim=1 if format == "w8a8" else (0, 1)).clamp(min=1e-12)
        scales = (most / kind.largest).to(host.weight.dtype)
        self.bias = host.bias
        rows = scales.float().reshape(-1, 1) if scales.ndim else scales.float()
        for name, tensor in {
            "weight": quantized(weight, weight.new_zeros(()), rows, format),
            "scales": scales,
            "zeros": torch.zeros(scales.shape, dtype=kind.dtype),
            "scale": torch.tensor(max(largest, 1e-12) / kind.largest, dtype=host.weight.dtype),
            "zero": torch.zeros((), dtype=kind.dtype),
        }.items():
            self.register_buffer(name, tensor)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input`: (..., columns). Returns (..., rows)."""
        node, type, by = torch.onnx.ops.symbolic, input.dtype, (self.scale, self.zero)
        values = node("QuantizeLinear", (input, *by), dtype=self.zero.dtype, shape=input.shape)
        back = node("DequantizeLinear", (values, *by), dtype=type, shape=input.shape)
        held, axis = (self.weight, self.scales, self.zeros), {"axis": 0} if self.scales.ndim else None
        weight = node("DequantizeLinear", held, axis, dtype=type, shape=self.weight.shape)
        return nn.functional.linear(back, weight, self.bias)


def _typed(model: nn.Module, plan: LayerPlan, images: Sequence[np.ndarray] | None) -> nn.Module:
    """The model in the types of the plan.

    Raises:
        UnsupportedError: there are no images to fix scales.
    """
    wanted = {planned.layer.module: planned.format for planned in plan.layers}
    floating = next((format for format in wanted.values() if format not in QUANTIZED_FORMATS), "bf16")
    typed = _Typed(model, DTYPES[floating])
    if eight := {module: format for module, format in wanted.items() if format in QUANTIZED_FORMATS}:
        if images is None:
            raise UnsupportedError(
                f"tensorrt computes {next(iter(eight.values()))} by scales that calibration images fix: set "
                "`static_scales` and give images"
            )
        model_type = model.model.config.model_type
        found = observe(model.model, model_type, (torch.from_numpy(image) for image in images))
        logical = {layer.module: layer.logical for layer in linear_layers(model.model, model_type)}
        for module, format in eight.items():
            host = typed.model.get_submodule(module)
            inputs = found[logical[module]]
            largest = float(torch.maximum(inputs.largest, -inputs.smallest).max())
            typed.model.set_submodule(module, QdqLinear(host, largest, format))
    return typed.eval().requires_grad_(False)


def _export(model: nn.Module, size: tuple[int, int], file: Path) -> None:
    """Write the ONNX file that TensorRT reads.

    Raises:
        UnsupportedError: torch cannot write it.
    """
    options: dict[str, Any] = {"opset_version": _OPSET, "external_data": True, "dynamo": True, "verbose": False}
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    try:
        with libraries.silent("torch.onnx"):
            torch.onnx.export(model, (torch.zeros(2, 3, *size),), file, dynamic_shapes=shapes, **names, **options)
    except Exception as error:  # the exporter raises whatever it runs into
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedError(f"torch cannot write this {type(model.model).__name__} as ONNX: {reason}") from error


def _build(file: Path, size: tuple[int, int], name: str) -> bytes:
    """TensorRT's plan for an ONNX file: kernels chosen by timing them on the current GPU.

    Raises:
        UnsupportedError: TensorRT lacks an operator, or finds no kernel.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # Version 11 knows no other networks and ignores the flag.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        first = parser.get_error(0)
        raise UnsupportedError(f"tensorrt cannot take this {name}: {first.node_operator()}: {first.desc()}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32
    least = 1
    for most, usual in _PROFILES:
        profile = builder.create_optimization_profile()
        profile.set_shape("pixel_values", *((count, 3, *size) for count in (least, usual, most)))
        config.add_optimization_profile(profile)
        least = most + 1
    if (plan := builder.build_serialized_network(network, config)) is None:
        raise UnsupportedError(f"tensorrt cannot build this {name}: its log above says why")
    return bytes(plan)


def load(folder: Path, settings: Mapping[str, Any]) -> "TensorRTCall":
    """Open the plan on the current GPU."""
    return TensorRTCall(folder / MODEL_FILE, settings)


class TensorRTCall:
    """A plan, with an execution context for each batch size that it meets, so that calls can be captured."""

    fixed_shapes = False

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        import tensorrt as trt

        self._strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE  # not memory for the largest batch
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if self._engine is None:
            raise UnsupportedError(f"tensorrt cannot open {file}: make it again")
        self._classes = int(self._engine.get_tensor_shape("logits")[1])
        self._settings = settings
        self._contexts: dict[int, Any] = {}

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width), on the GPU. Returns logits (batch, classes), when its current
        stream has come so far. More images than the largest profile takes are several calls."""
        count, most = len(pixel_values), self._settings["batches"][-1]
        if count > most:
            return torch.cat([self(part) for part in pixel_values.split(most)])
        stream = torch.cuda.current_stream(pixel_values.device).cuda_stream
        pixels = pixel_values.float().contiguous()
        if (context := self._contexts.get(count)) is None:
            context = self._contexts[count] = self._context(pixels, stream)
        logits = torch.empty((count, self._classes), device=pixels.device)
        for name, tensor in (("pixel_values", pixels), ("logits", logits)):
            context.set_tensor_address(name, tensor.data_ptr())
        if not context.execute_async_v3(stream):
            raise MeasurementError(f"tensorrt did not run a batch of {count}")
        return logits

    def formats(self, modules: Iterable[str]) -> dict[str, str]:
        """Those of the strongly typed network, which it keeps to."""
        return {module: self._settings["layers"].get(module, "unknown") for module in modules}

    def _context(self, pixels: torch.Tensor, stream: int) -> Any:
        context = self._engine.create_execution_context(self._strategy)
        if context is None:
            raise torch.OutOfMemoryError(f"out of memory: tensorrt has no room for a batch of {len(pixels)}")
        profile = next(index for index, most in enumerate(self._settings["batches"]) if len(pixels) <= most)
        context.set_optimization_profile_async(profile, stream)
        context.set_input_shape("pixel_values", tuple(pixels.shape))
        return context
