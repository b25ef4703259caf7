import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    CLIPConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    IJepaConfig,
    PretrainedConfig,
    SiglipConfig,
    SwinConfig,
    Swinv2Config,
    ViTConfig,
    ViTMSNConfig,
)

from vitopt.errors import CheckpointError, PatternError
from vitopt.models.checkpoint import load_model, open_checkpoint
from vitopt.models.names import FUSED_LEAF, Layer, block_names, families, linear_layers, select
from vitopt.optimize.quantize import quantize
from vitopt.recipe import LINEARS, VariantSpec

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}

# model type -> (configuration, architecture, module of block 1's query, module of block 1's output)
FAMILIES = {
    "vit": (ViTConfig(**SMALL), "ViT", "vit.layers.1.attention.q_proj", "vit.layers.1.attention.o_proj"),
    "deit": (DeiTConfig(**SMALL), "DeiT", "deit.layers.1.attention.q_proj", "deit.layers.1.attention.o_proj"),
    "vit_msn": (ViTMSNConfig(**SMALL), "ViTMSN", "vit.layers.1.attention.q_proj", "vit.layers.1.attention.o_proj"),
    "ijepa": (IJepaConfig(**SMALL), "IJepa", "ijepa.layers.1.attention.q_proj", "ijepa.layers.1.attention.o_proj"),
    "beit": (BeitConfig(**SMALL), "Beit", "beit.layers.1.attention.q_proj", "beit.layers.1.attention.o_proj"),
    "dinov2": (
        Dinov2Config(**SMALL),
        "Dinov2",
        "dinov2.encoder.layer.1.attention.q_proj",
        "dinov2.encoder.layer.1.attention.o_proj",
    ),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig(**SMALL),
        "Dinov2WithRegisters",
        "dinov2_with_registers.encoder.layer.1.attention.q_proj",
        "dinov2_with_registers.encoder.layer.1.attention.o_proj",
    ),
    "siglip": (
        SiglipConfig(vision_config=SMALL),
        "Siglip",
        "vision_model.encoder.layers.1.self_attn.q_proj",
        "vision_model.encoder.layers.1.self_attn.out_proj",
    ),
    "clip": (
        CLIPConfig(vision_config=SMALL),
        "CLIP",
        "vision_model.encoder.layers.1.self_attn.q_proj",
        "vision_model.encoder.layers.1.self_attn.out_proj",
    ),
    # one block in the first stage, two in the second, of both Swins
    "swin": (
        SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4),
        "Swin",
        "swin.encoder.layers.1.blocks.0.attention.q_proj",
        "swin.encoder.layers.1.blocks.0.attention.o_proj",
    ),
    "swinv2": (
        Swinv2Config(image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4),
        "Swinv2",
        "swinv2.encoder.layers.1.blocks.0.attention.self.query",
        "swinv2.encoder.layers.1.blocks.0.attention.output.dense",
    ),
}


def on_meta(config: PretrainedConfig, architecture: str, ending: str = "ForImageClassification") -> nn.Module:
    config.architectures = [f"{architecture}{ending}"]
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(config)


def test_every_supported_family_is_tested():
    assert sorted(FAMILIES) == families()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logical_names_of(family):
    config, architecture, query, output = FAMILIES[family]
    model = on_meta(config, architecture)
    layers = linear_layers(model, family)
    blocks = 3 if family.startswith("swin") else 2
    expected = {f"block.{block}.{linear}" for block in range(blocks) for linear in LINEARS} | {"classifier"}
    assert {layer.logical for layer in layers} == expected
    assert len(layers) == len(expected)
    assert layers[-1].logical == layers[-1].module == "classifier"
    assert [layer.block for layer in layers] == [block for block in range(blocks) for _ in LINEARS] + [None]
    found = {layer.logical: layer for layer in layers}
    assert (found["block.1.query"].module, found["block.1.output"].module) == (query, output)
    for layer in layers:
        module = model.get_submodule(layer.module)
        assert isinstance(module, nn.Linear)
        assert layer.parameters == module.weight.numel()
        assert module.weight.device.type == "meta"


def test_only_the_pooling_head_the_downsampling_and_the_position_bias_have_no_name():
    unnamed = {}
    for family, (config, architecture, *_) in FAMILIES.items():
        model = on_meta(config, architecture)
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
                for block in ("0.blocks.0", "1.blocks.0", "1.blocks.1")
                for index in (0, 2)
            ]
            + ["swinv2.encoder.layers.0.downsample.reduction"]
        ),
    }


def test_swin_v2_calls_three_layers_of_a_block_dense():
    config, architecture, *_ = FAMILIES["swinv2"]
    modules = {layer.logical: layer.module for layer in linear_layers(on_meta(config, architecture), "swinv2")}
    block = "swinv2.encoder.layers.0.blocks.0"
    assert modules["block.0.output"] == f"{block}.attention.output.dense"
    assert modules["block.0.fc1"] == f"{block}.intermediate.dense"
    assert modules["block.0.fc2"] == f"{block}.output.dense"


def test_deit_with_a_teacher_has_two_heads_that_one_pattern_names():
    model = on_meta(FAMILIES["deit"][0], "DeiT", "ForImageClassificationWithTeacher")
    layers = linear_layers(model, "deit")
    heads = {layer.logical: layer.module for layer in layers if layer.is_head}
    assert heads == {
        "classifier.class": "cls_classifier",
        "classifier.distillation": "distillation_classifier",
    }
    assert [layer.logical for layer in layers[-2:]] == list(heads)
    assert list(select(["classifier"], layers)) == list(heads)
    assert list(select(["classifier.distillation"], layers)) == ["classifier.distillation"]
    with pytest.raises(PatternError, match=r"fc2, and classifier.class and classifier.distillation$"):
        select(["head"], layers)


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(CheckpointError) as caught:
        linear_layers(nn.Linear(2, 2), "resnet")
    assert str(caught.value) == f"model type 'resnet' is not supported; supported: {', '.join(families())}"


def test_modules_under_other_names_are_refused():
    model = nn.Module()
    model.encoder = nn.Module()
    model.encoder.query = nn.Linear(2, 2)
    with pytest.raises(CheckpointError) as caught:
        linear_layers(model, "vit")
    assert str(caught.value) == (
        "no block of this vit model was found under the names that vitopt knows; use a transformers version from 5.9 on"
    )


@pytest.mark.parametrize(
    ("family", "config"), [("dinov2", Dinov2Config), ("dinov2_with_registers", Dinov2WithRegistersConfig)]
)
def test_a_gated_mlp_is_refused_instead_of_planned_without_it(family, config):
    model = on_meta(config(**SMALL, use_swiglu_ffn=True), FAMILIES[family][1])
    with pytest.raises(CheckpointError) as caught:
        linear_layers(model, family)
    assert str(caught.value) == (
        f"this {family} model has a gated MLP ({family}.encoder.layer.0.mlp.gate_proj), which vitopt does not know: "
        "use a size of the model whose MLP is fc1 and fc2"
    )


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantized_models_keep_names_and_sizes(tiny_checkpoint, tmp_path, format):
    plain = open_checkpoint(str(tiny_checkpoint))
    quantize(plain, VariantSpec(name="q", format=format), tmp_path / "q", device="cpu")
    packed = load_model(open_checkpoint(str(tmp_path / "q")))
    assert type(packed.vit.layers[0].mlp.fc1) is not nn.Linear
    assert linear_layers(packed, "vit") == linear_layers(load_model(plain), "vit")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_of(family):
    config, architecture, query, _ = FAMILIES[family]
    model = on_meta(config, architecture)
    blocks = block_names(model, family)
    assert len(blocks) == (3 if family.startswith("swin") else 2)
    assert query.startswith(f"{blocks[1]}.")
    for layer in linear_layers(model, family):
        holding = [number for number, name in enumerate(blocks) if layer.module.startswith(f"{name}.")]
        assert holding == ([] if layer.block is None else [layer.block])


def test_more_than_ten_blocks_are_in_order():
    model = on_meta(ViTConfig(**SMALL | {"num_hidden_layers": 12}), "ViT")
    assert block_names(model, "vit") == tuple(f"vit.layers.{number}" for number in range(12))


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_stacked_projections_are_three_layers_of_one_module(family):
    config, architecture, query, _ = FAMILIES[family]
    model = on_meta(config, architecture)
    before = linear_layers(model, family)
    host = query.removesuffix(".q_proj")
    attention = model.get_submodule(host)
    for name in ("q_proj", "k_proj", "v_proj"):
        delattr(attention, name)
    attention.add_module(FUSED_LEAF, nn.Linear(8, 24, device="meta"))
    layers = linear_layers(model, family)
    stacked = [layer for layer in layers if layer.module == f"{host}.{FUSED_LEAF}"]
    assert [layer.logical for layer in stacked] == ["block.1.query", "block.1.key", "block.1.value"]
    assert {layer.parameters for layer in stacked} == {8 * 8} and {layer.block for layer in stacked} == {1}
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
