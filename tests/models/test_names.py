from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig

from vitopt.errors import CheckpointError, PatternError
from vitopt.layers import LINEARS
from vitopt.models.architectures import known_architecture
from vitopt.models.checkpoint import load_model, open_checkpoint
from vitopt.models.families import FAMILIES, FUSED_LEAF, TIMM
from vitopt.models.names import Layer, block_names, linear_layers, select
from vitopt.optimize.quantize import quantize
from vitopt.recipe import VariantSpec

# model type -> modules of block 1's query (or qkv) and output; in both Swins it is the second of the first stage
MODULES = {
    "vit": ("vit.layers.1.attention.q_proj", "vit.layers.1.attention.o_proj"),
    "deit": ("deit.layers.1.attention.q_proj", "deit.layers.1.attention.o_proj"),
    "vit_msn": ("vit.layers.1.attention.q_proj", "vit.layers.1.attention.o_proj"),
    "ijepa": ("ijepa.layers.1.attention.q_proj", "ijepa.layers.1.attention.o_proj"),
    "beit": ("beit.layers.1.attention.q_proj", "beit.layers.1.attention.o_proj"),
    "dinov2": ("dinov2.encoder.layer.1.attention.q_proj", "dinov2.encoder.layer.1.attention.o_proj"),
    "dinov2_with_registers": (
        "dinov2_with_registers.encoder.layer.1.attention.q_proj",
        "dinov2_with_registers.encoder.layer.1.attention.o_proj",
    ),
    "siglip": (
        "vision_model.encoder.layers.1.self_attn.q_proj",
        "vision_model.encoder.layers.1.self_attn.out_proj",
    ),
    "clip": (
        "vision_model.encoder.layers.1.self_attn.q_proj",
        "vision_model.encoder.layers.1.self_attn.out_proj",
    ),
    "swin": (
        "swin.encoder.layers.0.blocks.1.attention.q_proj",
        "swin.encoder.layers.0.blocks.1.attention.o_proj",
    ),
    "swinv2": (
        "swinv2.encoder.layers.0.blocks.1.attention.self.query",
        "swinv2.encoder.layers.0.blocks.1.attention.output.dense",
    ),
    "timm_wrapper": ("timm_model.blocks.1.attn.qkv", "timm_model.blocks.1.attn.proj"),
}


def on_meta(model_type: str, *, two_heads: bool = False, **settings: Any) -> nn.Module:
    """The micro model of a family, without weights."""
    if model_type == TIMM:
        pytest.importorskip("timm")
    name = [*FAMILIES[model_type].classes][two_heads].replace("SIZE", "micro")
    grid = "patch4-window4-32" if model_type.startswith("swin") else "patch8-32"
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(known_architecture(f"{name}-{grid}", **settings))


def test_every_supported_family_is_tested():
    assert sorted(MODULES) == sorted(FAMILIES)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logical_names_of(family):
    query, output = MODULES[family]
    model = on_meta(family)
    layers = linear_layers(model, family)
    blocks = 4 if family.startswith("swin") else 2
    linears = ("qkv", "output", "fc1", "fc2") if family == TIMM else LINEARS
    expected = {f"block.{block}.{linear}" for block in range(blocks) for linear in linears} | {"classifier"}
    assert {layer.logical for layer in layers} == expected
    assert len(layers) == len(expected)
    assert (layers[-1].logical, layers[-1].module) == ("classifier", next(iter(FAMILIES[family].heads)))
    assert [layer.block for layer in layers] == [block for block in range(blocks) for _ in linears] + [None]
    found = {layer.logical: layer for layer in layers}
    assert (found[f"block.1.{linears[0]}"].module, found["block.1.output"].module) == (query, output)
    for layer in layers:
        module = model.get_submodule(layer.module)
        assert isinstance(module, nn.Linear)
        assert layer.parameters == module.weight.numel()
        assert module.weight.device.type == "meta"


def test_only_the_pooling_head_the_downsampling_and_the_position_bias_have_no_name():
    unnamed = {}
    for family in set(FAMILIES) - {TIMM}:
        model = on_meta(family)
        named = {layer.module for layer in linear_layers(model, family)}
        rest = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - named
        if rest:
            unnamed[family] = sorted(rest)
    assert unnamed == {
        "siglip": ["vision_model.head.attention.out_proj", "vision_model.head.mlp.fc1", "vision_model.head.mlp.fc2"],
        "swin": ["swin.encoder.layers.0.downsample.reduction"],
        "swinv2": sorted(
            [
                f"swinv2.encoder.layers.{block}.attention.self.continuous_position_bias_mlp.{index}"
                for block in ("0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1")
                for index in (0, 2)
            ]
            + ["swinv2.encoder.layers.0.downsample.reduction"]
        ),
    }


def test_swin_v2_calls_three_layers_of_a_block_dense():
    modules = {layer.logical: layer.module for layer in linear_layers(on_meta("swinv2"), "swinv2")}
    block = "swinv2.encoder.layers.0.blocks.0"
    assert modules["block.0.output"] == f"{block}.attention.output.dense"
    assert modules["block.0.fc1"] == f"{block}.intermediate.dense"
    assert modules["block.0.fc2"] == f"{block}.output.dense"


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("deit", ("cls_classifier", "distillation_classifier")),
        ("timm_wrapper", ("timm_model.head", "timm_model.head_dist")),
    ],
)
def test_of_two_heads_one_pattern_names_both(family, modules):
    layers = linear_layers(on_meta(family, two_heads=True), family)
    heads = {layer.logical: layer.module for layer in layers if layer.is_head}
    assert heads == {"classifier.class": modules[0], "classifier.distillation": modules[1]}
    assert [layer.logical for layer in layers[-2:]] == list(heads)
    assert list(select(["classifier"], layers)) == list(heads)
    assert list(select(["classifier.distillation"], layers)) == ["classifier.distillation"]
    with pytest.raises(PatternError, match=r"fc2, and classifier.class and classifier.distillation$"):
        select(["head"], layers)


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(CheckpointError) as caught:
        linear_layers(nn.Linear(2, 2), "resnet")
    assert str(caught.value) == f"model type 'resnet' is not supported: vitopt opens {', '.join(sorted(FAMILIES))}"


def test_modules_under_other_names_are_refused():
    model = nn.Module()
    model.encoder = nn.Module()
    model.encoder.query = nn.Linear(2, 2)
    with pytest.raises(CheckpointError) as caught:
        linear_layers(model, "vit")
    assert str(caught.value) == (
        "no block of this vit model was found under the names that vitopt knows; use a transformers version from 5.9 on"
    )


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers"])
def test_a_gated_mlp_is_refused_instead_of_planned_without_it(family):
    with pytest.raises(CheckpointError, match=rf"{family} model.*{family}.encoder.layer.0.mlp.gate_proj"):
        linear_layers(on_meta(family, use_swiglu_ffn=True), family)


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("vit_small_patch16_18x2_224", "ffns.1.mlp.fc2"),  # two attentions in a block
        ("vit_relpos_small_patch16_224", "mlp.fc2"),  # an MLP that makes a position bias
        ("vit_small_plus_patch16_dinov3", "mlp.fc1_g"),
        ("vit_small_patch16_dinov3_qkvb", "attn.qkv"),  # its biases are added past the layer
    ],
)
def test_a_timm_block_of_another_kind_is_refused(architecture, module):
    pytest.importorskip("timm")
    config = TimmWrapperConfig(architecture=architecture, model_args={"depth": 1}, num_labels=4)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    with pytest.raises(CheckpointError, match=rf"timm_model.blocks.0.*{module}"):
        linear_layers(model, TIMM)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantized_models_keep_names_and_sizes(tiny_checkpoint, tmp_path, format):
    plain = open_checkpoint(str(tiny_checkpoint))
    quantize(plain, VariantSpec(name="q", format=format), tmp_path / "q", device="cpu")
    packed = load_model(open_checkpoint(str(tmp_path / "q")))
    assert type(packed.vit.layers[0].mlp.fc1) is not nn.Linear
    assert linear_layers(packed, "vit") == linear_layers(load_model(plain), "vit")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_of(family):
    query, _ = MODULES[family]
    model = on_meta(family)
    blocks = block_names(model, family)
    assert len(blocks) == (4 if family.startswith("swin") else 2)
    assert query.startswith(f"{blocks[1]}.")
    for layer in linear_layers(model, family):
        holding = [number for number, name in enumerate(blocks) if layer.module.startswith(f"{name}.")]
        assert holding == ([] if layer.block is None else [layer.block])


def test_more_than_ten_blocks_are_in_order():
    model = on_meta("vit", num_hidden_layers=12)
    assert block_names(model, "vit") == tuple(f"vit.layers.{number}" for number in range(12))


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_stacked_projections_are_three_layers_of_one_module(family):
    query, _ = MODULES[family]
    model = on_meta(family)
    before = linear_layers(model, family)
    host = query.removesuffix(".q_proj")
    attention = model.get_submodule(host)
    for name in ("q_proj", "k_proj", "v_proj"):
        delattr(attention, name)
    attention.add_module(FUSED_LEAF, nn.Linear(64, 192, device="meta"))
    layers = linear_layers(model, family)
    stacked = [layer for layer in layers if layer.module == f"{host}.{FUSED_LEAF}"]
    assert [layer.logical for layer in stacked] == ["block.1.query", "block.1.key", "block.1.value"]
    assert {layer.parameters for layer in stacked} == {64 * 64} and {layer.block for layer in stacked} == {1}
    # All others are as they were.
    names = {layer.logical for layer in stacked}
    assert {layer for layer in layers if layer.logical not in names} == {
        layer for layer in before if layer.logical not in names
    }


# patterns


def twelve_blocks() -> list[Layer]:
    names = [(f"block.{block}.{linear}", block) for block in range(12) for linear in LINEARS]
    return [Layer(name, f"m.{name}", 4, block) for name, block in names] + [Layer("classifier", "classifier", 4, None)]


def chosen(*patterns: str) -> list[str]:
    return list(select(patterns, twelve_blocks()))


def blocks(*numbers: int, linears: tuple[str, ...] = LINEARS) -> list[str]:
    return [f"block.{number}.{linear}" for number in numbers for linear in linears]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("block.3.fc2", ["block.3.fc2"]),
        ("classifier", ["classifier"]),
        # one is no prefix of eleven
        ("block.1", blocks(1)),
        ("block.11", blocks(11)),
        ("block.*.fc1", blocks(*range(12), linears=("fc1",))),
        ("block.4-7", blocks(4, 5, 6, 7)),
        ("block.9-99.key", blocks(9, 10, 11, linears=("key",))),
        ("block.2-2", blocks(2)),
        ("block.5.*", blocks(5)),
        ("query", blocks(*range(12), linears=("query",))),
        ("block", blocks(*range(12))),
        ("block.*", blocks(*range(12))),
        ("*", [*blocks(*range(12)), "classifier"]),
    ],
)
def test_patterns(pattern, names):
    assert chosen(pattern) == names


def test_the_first_pattern_that_names_a_layer_is_its_reason():
    found = select(["block.0.fc1", "block.0", "fc1"], twelve_blocks())
    assert found["block.0.fc1"] == "block.0.fc1"
    assert found["block.0.fc2"] == "block.0"
    assert found["block.1.fc1"] == "fc1"
    assert len(found) == 6 + 11


def test_no_pattern_names_nothing():
    assert chosen() == []


@pytest.mark.parametrize(
    "pattern",
    [
        "block.12",
        "block.12-20",
        "block.7-4",
        "block.-1",
        "block.01",
        "blocks.1",
        "block.1.dense",
        "block.1.fc1.weight",
        "classifier.weight",
        "encoder.layer.11",
        "Query",
        "block.1 ",
        "block..fc1",
        "",
    ],
)
def test_a_pattern_that_matches_nothing_lists_what_exists(pattern):
    with pytest.raises(PatternError) as caught:
        chosen("query", pattern)
    assert str(caught.value) == (
        f"pattern {pattern!r} matches no layer; this model has block.0 to block.11, "
        "in each of them query, key, value, output, fc1, fc2, and classifier"
    )


def test_a_model_without_a_head_does_not_list_one():
    with pytest.raises(PatternError, match=r"in each of them query, key, value, output, fc1, fc2$"):
        select(["classifier"], twelve_blocks()[:-1])


def test_names_of_dinov2_in_earlier_versions_of_transformers() -> None:
    names = [f"attention.attention.{leaf}" for leaf in ("query", "key", "value")]
    names += ["attention.output.dense", "mlp.fc1", "mlp.fc2"]
    model = nn.Module()
    for name in [f"dinov2.encoder.layer.{block}.{name}" for block in (0, 1) for name in names]:
        *parents, leaf = name.split(".")
        at = model
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, nn.Module())
            at = getattr(at, parent)
        at.add_module(leaf, nn.Linear(8, 8))
    layers = linear_layers(model, "dinov2")
    linears = ("query", "key", "value", "output", "fc1", "fc2")
    assert [layer.logical for layer in layers] == [f"block.{block}.{linear}" for block in (0, 1) for linear in linears]
    assert layers[3].module == "dinov2.encoder.layer.0.attention.output.dense"
