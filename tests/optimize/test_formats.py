"""What transformers is told, and formats read back from live layers."""

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from vitopt.environment import libraries
from vitopt.optimize.formats import QUANTIZES, format_of, live_formats, quantization_config
from vitopt.optimize.plan import LayerPlan, plan_layers
from vitopt.recipe import VariantSpec

BLOCK_0 = [f"vit.layers.0.attention.{name}_proj" for name in "qkvo"] + [
    f"vit.layers.0.mlp.{name}" for name in ("fc1", "fc2")
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2))


def plan(model: nn.Module, **variant: object) -> LayerPlan:
    return plan_layers(model, "vit", VariantSpec(name="v", **variant))


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16"])
def test_nothing_to_quantize_needs_no_config(model: nn.Module, format: str) -> None:
    assert quantization_config(plan(model, format=format), torch.bfloat16) is None


def test_skipping_everything_needs_no_config(model: nn.Module) -> None:
    assert quantization_config(plan(model, format="nf4", skip=["block"]), torch.bfloat16) is None


def test_nf4_is_told_qlora_with_double_quantization_and_full_names_of_what_is_kept(model: nn.Module) -> None:
    config = quantization_config(plan(model, format="nf4", skip=["block.0"]), torch.float16)
    assert config.load_in_4bit and not config.load_in_8bit
    assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.float16
    assert config.llm_int8_skip_modules == [*BLOCK_0, "classifier"]


def test_int8_is_told_full_names_of_what_is_kept(model: nn.Module) -> None:
    config = quantization_config(plan(model, format="int8", skip=["block.0"]), torch.bfloat16)
    assert config.load_in_8bit and not config.load_in_4bit
    assert config.llm_int8_skip_modules == [*BLOCK_0, "classifier"]


def test_linear_layers_without_a_logical_name_are_kept() -> None:
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
        model.extra = nn.Linear(8, 8)
    for format in ("nf4", "int8"):
        config = quantization_config(plan(model, format=format), torch.bfloat16)
        assert config.llm_int8_skip_modules == ["classifier", "extra"]


def test_torchao_is_told_each_weight_by_its_parameter_name(model: nn.Module) -> None:
    mixed = plan(model, format="w8a8", layers={"block.1.fc1": "fp8"}, skip=["block.0"])
    told = quantization_config(mixed, torch.bfloat16).quant_type.fqn_to_config
    assert sorted(told) == sorted(name.replace("layers.0", "layers.1") + ".weight" for name in BLOCK_0)
    kinds = {name: type(config).__name__ for name, config in told.items()}
    assert kinds.pop("vit.layers.1.mlp.fc1.weight") == "Float8DynamicActivationFloat8WeightConfig"
    assert set(kinds.values()) == {"Int8DynamicActivationInt8WeightConfig"}
    assert str(told["vit.layers.1.mlp.fc1.weight"].kernel_preference) == "KernelPreference.TORCH"


def test_no_format_changes_how_other_variants_are_compiled(model: nn.Module) -> None:
    from torchao.quantization import quantize_

    before = torch._inductor.config.save_config_portable()
    for format in ("w8a8", "fp8", "int4"):
        for config in quantization_config(plan(model, format=format), torch.bfloat16).quant_type.fqn_to_config.values():
            assert config.set_inductor_config is False
    quantize_(nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16)), QUANTIZES["w8a8"]())
    assert torch._inductor.config.save_config_portable() == before


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float64, "float64")],
)
def test_a_plain_layer_has_the_format_of_its_weight(dtype: torch.dtype, expected: str) -> None:
    assert format_of(nn.Linear(4, 4, dtype=dtype)) == expected


def test_packed_layers_are_read_from_the_layer_itself() -> None:
    bitsandbytes = libraries.import_bitsandbytes()
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    assert format_of(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")) == "nf4"
    # A foreign checkpoint in another 4-bit type must not pass for NF4.
    assert format_of(bitsandbytes.nn.Linear4bit(64, 64, quant_type="fp4")) == "fp4"
    assert format_of(bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)) == "int8"
    torchao_layer = nn.Sequential(nn.Linear(64, 64))
    quantize_(torchao_layer, Int8DynamicActivationInt8WeightConfig())
    assert format_of(torchao_layer[0]) == "w8a8"


def test_live_formats_name_every_layer_by_what_it_holds() -> None:
    model = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    model.vit.layers[0].mlp.fc1.to(torch.bfloat16)
    live = live_formats(model, "vit")
    assert live.pop("block.0.fc1") == "bf16"
    assert live == dict.fromkeys(
        ["block.0.query", "block.0.key", "block.0.value", "block.0.output", "block.0.fc2", "classifier"], "fp32"
    )
