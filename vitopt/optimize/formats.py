"""Formats: how transformers is told to hold a layer, and how the format of a live layer is read back.

NF4: QLoRA, arXiv 2305.14314, with double quantization. int8: LLM.int8(), arXiv 2208.07339. w8a8 and fp8:
torchao, weights per output channel and activations per token, scaled as they come. int4: torchao, weights only,
in groups of 64.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from vitopt.environment import devices
from vitopt.formats import Format
from vitopt.models.names import linear_layers
from vitopt.optimize.plan import LayerPlan

_OF_DTYPE: dict[torch.dtype, Format] = {dtype: name for name, dtype in devices.DTYPES.items()}  # type: ignore[misc]


def quantization_config(plan: LayerPlan, half: torch.dtype) -> Any:
    """The transformers quantization config for a plan, None when nothing is quantized."""
    formats = plan.quantized_formats
    # A plan mixes only formats that one library holds in one checkpoint, so the first tells which.
    return _BUILDERS[formats[0]](plan, half) if formats else None


def _nf4(plan: LayerPlan, half: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
        llm_int8_skip_modules=_kept(plan),
    )


def _int8(plan: LayerPlan, half: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_kept(plan))


def _kept(plan: LayerPlan) -> list[str]:
    # transformers matches these as prefixes and suffixes by rules that changed between versions; full module
    # names mean the same under all of them, and `quantize` checks the outcome.
    return [*plan.modules("fp16", "bf16", "fp32"), *plan.unlisted]


def _torchao(plan: LayerPlan, half: torch.dtype) -> Any:
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    # Keyed by parameter: by module name torchao would quantize the bias too, and the forward pass fails.
    return TorchAoConfig(
        FqnToConfig(
            {
                f"{planned.layer.module}.weight": QUANTIZES[planned.format]()
                for planned in plan.layers
                if planned.format in QUANTIZES
            }
        )
    )


def _torchao_w8a8() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _torchao_fp8() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from torchao.quantization.quantize_.common import KernelPreference

    # Left to itself torchao asks in every call which packages are installed, which a compiler cannot follow.
    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), kernel_preference=KernelPreference.TORCH, set_inductor_config=False
    )


def _torchao_int4() -> Any:
    from torchao.quantization import Int4WeightOnlyConfig

    # The one packing that runs with torch's own kernels; groups of 64 divide the widths of all ViTs.
    return Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


# format -> the configuration with which torchao quantizes one layer to it; without `set_inductor_config=False` each
# would change how all variants of the process are compiled
QUANTIZES: dict[str, Callable[[], Any]] = {"int4": _torchao_int4, "w8a8": _torchao_w8a8, "fp8": _torchao_fp8}
_BUILDERS: dict[Format, Callable[[LayerPlan, torch.dtype], Any]] = {
    "nf4": _nf4,
    "int4": _torchao,
    "int8": _int8,
    "w8a8": _torchao,
    "fp8": _torchao,
}


# format -> what names it in torchao's configuration
_TORCHAO_SIGNS: dict[Format, str] = {
    "fp8": "Float8DynamicActivationFloat8Weight",
    "int4": "Int4WeightOnly",
    "w8a8": "Int8DynamicActivationInt8Weight",
}


def stored_formats(config: PretrainedConfig) -> list[Format]:
    """Formats in which a checkpoint's configuration says that its linear layers are stored: the type of its
    floating-point weights where none is quantized, nothing for a format that vitopt does not make."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return [_OF_DTYPE.get(config.dtype or torch.float32, "fp32")]
    content = quantized if isinstance(quantized, dict) else quantized.to_dict()
    if content.get("load_in_4bit"):
        return ["nf4"] if content.get("bnb_4bit_quant_type") == "nf4" else []
    if content.get("load_in_8bit"):
        return ["int8"]
    return [format for format, sign in _TORCHAO_SIGNS.items() if sign in str(content)]


def live_formats(model: nn.Module, model_type: str) -> dict[str, str]:
    """Logical name -> format, read from the modules that will compute, never from a request."""
    return {layer.logical: format_of(model.get_submodule(layer.module)) for layer in linear_layers(model, model_type)}


def format_of(linear: nn.Module) -> str:
    """Format in which a linear layer holds its weight."""
    module_type = type(linear).__name__
    if module_type == "Linear4bit":
        return str(linear.weight.quant_type)
    if module_type == "Linear8bitLt":
        return "int8"
    weight = linear.weight
    tensor_type = type(weight.data).__name__
    if tensor_type == "Int8Tensor":
        return "w8a8"
    if tensor_type.startswith("Int4"):
        return "int4"
    if tensor_type == "Float8Tensor":
        return "fp8"
    return _OF_DTYPE.get(weight.dtype, str(weight.dtype).removeprefix("torch."))
