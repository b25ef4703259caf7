"""Layer plans, from shapes alone."""

import pytest
import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from vitopt.errors import PatternError, RecipeError, UnsupportedError
from vitopt.optimize.plan import LayerPlan, plan_layers
from vitopt.recipe import VariantSpec

LINEARS = ["query", "key", "value", "output", "fc1", "fc2"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2))


def plan(model: nn.Module, **variant: object) -> LayerPlan:
    return plan_layers(model, "vit", VariantSpec(name="v", **variant))


def formats(plan: LayerPlan) -> dict[str, str]:
    return {planned.layer.logical: planned.format for planned in plan.layers}


def test_lists_every_linear_layer_in_order_of_execution_with_its_module(model: nn.Module) -> None:
    got = plan(model, format="nf4")
    logical = [f"block.{block}.{linear}" for block in range(3) for linear in LINEARS] + ["classifier"]
    assert [planned.layer.logical for planned in got.layers] == logical
    assert [planned.layer.module for planned in got.layers] == [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]


@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "w8a8", "fp8"])
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_a_quantized_format_takes_all_layers_but_the_head(model: nn.Module, format: str, half: str) -> None:
    got = formats(plan(model, format=format, half=half))
    assert got.pop("classifier") == half
    assert set(got.values()) == {format} and len(got) == 18


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16"])
def test_an_unquantized_format_takes_the_head_too(model: nn.Module, format: str) -> None:
    assert plan(model, format=format, half="bf16").counts() == {format: 19}


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (["block.1"], {f"block.1.{linear}" for linear in LINEARS}),
        (["block.*.fc2"], {"block.0.fc2", "block.1.fc2", "block.2.fc2"}),
        (["fc2"], {"block.0.fc2", "block.1.fc2", "block.2.fc2"}),
        (["block.0-1.query", "block.2.key"], {"block.0.query", "block.1.query", "block.2.key"}),
        (["classifier"], set()),
    ],
)
def test_skipped_layers_stay_in_16_bit(model: nn.Module, skip: list[str], kept: set[str]) -> None:
    got = plan(model, format="nf4", skip=skip)
    assert {name for name, format in formats(got).items() if format == "bf16"} == kept | {"classifier"}
    assert {planned.reason for planned in got.layers if planned.layer.logical in kept} <= {f"skip {s}" for s in skip}


def test_the_head_says_why_it_is_kept(model: nn.Module) -> None:
    assert plan(model, format="int8").layers[-1].reason == "the head stays in 16 bit"
    assert plan(model, format="int8", skip=["classifier"]).layers[-1].reason == "skip classifier"


def test_layers_give_some_layers_another_format(model: nn.Module) -> None:
    got = plan(model, format="w8a8", layers={"block.0": "fp8", "block.2.fc1": "bf16"})
    expected = dict.fromkeys((f"block.{block}.{linear}" for block in range(3) for linear in LINEARS), "w8a8")
    expected |= dict.fromkeys((f"block.0.{linear}" for linear in LINEARS), "fp8")
    assert formats(got) == expected | {"block.2.fc1": "bf16", "classifier": "bf16"}
    assert got.layers[0].reason == "layers block.0" and got.layers[6].reason == "format w8a8"


def test_layers_may_quantize_a_16_bit_model_and_never_its_head(model: nn.Module) -> None:
    got = formats(plan(model, format="bf16", layers={"block.1": "nf4", "classifier": "nf4"}))
    assert {name for name, format in got.items() if format == "nf4"} == {f"block.1.{linear}" for linear in LINEARS}
    assert got["classifier"] == "bf16"


def test_skip_wins_over_layers(model: nn.Module) -> None:
    assert formats(plan(model, format="w8a8", skip=["block.0"], layers={"block.0": "fp8"}))["block.0.fc1"] == "bf16"


@pytest.mark.parametrize("key", ["skip", "layers"])
@pytest.mark.parametrize("pattern", ["block.3", "block.0.dense", "encoder.layer.0", "block.1.fc1.weight", "head"])
def test_a_pattern_that_matches_nothing_tells_what_exists(model: nn.Module, key: str, pattern: str) -> None:
    value = [pattern] if key == "skip" else {pattern: "bf16"}
    with pytest.raises(PatternError) as caught:
        plan(model, format="nf4", **{key: value})
    assert f"pattern {pattern!r} matches no layer" in str(caught.value)
    assert "block.0 to block.2" in str(caught.value) and "query, key, value, output, fc1, fc2" in str(caught.value)


def test_counts_and_modules_agree_with_the_layers(model: nn.Module) -> None:
    got = plan(model, format="nf4", skip=["block.2"])
    assert got.counts() == {"nf4": 12, "bf16": 7}
    kept = got.modules("bf16", "fp32")
    assert len(kept) == 7 and kept[-1] == "classifier"
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in kept)
    assert got.modules("fp8") == []
    assert got.quantized_formats == ["nf4"]


def test_quantized_formats_come_most_frequent_first(model: nn.Module) -> None:
    assert plan(model, format="fp8", layers={"block.0-1": "w8a8"}).quantized_formats == ["w8a8", "fp8"]


def test_groups_join_neighbours_of_one_format_and_reason(model: nn.Module) -> None:
    got = plan(model, format="nf4", skip=["block.1"]).groups()
    assert [(first.layer.logical, last.layer.logical, count) for first, last, count in got] == [
        ("block.0.query", "block.0.fc2", 6),
        ("block.1.query", "block.1.fc2", 6),
        ("block.2.query", "block.2.fc2", 6),
        ("classifier", "classifier", 1),
    ]
    assert [first.format for first, _, _ in got] == ["nf4", "bf16", "nf4", "bf16"]


def test_linear_layers_without_a_logical_name_are_listed_apart() -> None:
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
        model.extra = nn.Linear(8, 8)
    got = plan(model, format="nf4")
    assert got.unlisted == ("extra",) and got.counts() == {"nf4": 6, "bf16": 1}


def test_torchaos_formats_are_mixed(model: nn.Module) -> None:
    got = plan(model, format="int4", layers={"block.1": "w8a8", "block.2": "fp8"})
    assert got.counts() == {"int4": 6, "w8a8": 6, "fp8": 6, "bf16": 1}


@pytest.mark.parametrize(
    ("format", "layers"), [("nf4", {"block.0": "w8a8"}), ("nf4", {"block.0": "int8"}), ("w8a8", {"fc1": "int8"})]
)
def test_formats_of_two_libraries_are_not_mixed(model: nn.Module, format: str, layers: dict[str, str]) -> None:
    other = next(iter(layers.values()))
    with pytest.raises(RecipeError, match=f"formats {format} and {other} cannot be mixed in one checkpoint; fp8, int4"):
        plan(model, format=format, layers=layers)


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        ({"format": "nf4", "layers": {"block.0": "fp32"}}, "fp32"),
        ({"format": "fp32", "layers": {"block.0": "nf4"}}, "fp32"),
        ({"format": "bf16", "half": "fp16", "layers": {"block.0": "int8"}}, "bf16"),
        ({"format": "fp32", "layers": {"block.0": "bf16"}}, "fp32"),
    ],
)
def test_one_checkpoint_has_one_floating_point_type(model: nn.Module, variant: dict, wrong: str) -> None:
    half = variant.get("half", "bf16")
    with pytest.raises(RecipeError, match=rf"layers in {wrong} cannot be mixed .* held in {half} \(`half`\)"):
        plan(model, **variant)


def swin(width: int) -> nn.Module:
    with torch.device("meta"):
        return SwinForImageClassification(SwinConfig(embed_dim=width, depths=[1, 1], num_heads=[2, 4]))


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_layers_too_narrow_for_groups_of_64_stay_in_16_bit_and_say_why(format: str) -> None:
    # Swin tiny: 96 wide, then 192; fc2 takes 4 x 96.
    got = plan_layers(swin(96), "swin", VariantSpec(name="v", format=format))
    kept = {planned.layer.logical: planned.reason for planned in got.layers if planned.misfit}
    assert set(kept) == {f"block.0.{linear}" for linear in LINEARS if linear != "fc2"}
    assert set(kept.values()) == {f"in_features 96 is no multiple of 64, as {format} needs"}
    assert got.counts() == {"bf16": 6, format: 7}
    assert got.misfits() == {next(iter(kept.values())): 5}


@pytest.mark.parametrize("format", ["int8", "w8a8"])
def test_eight_bits_have_no_groups_along_a_row(format: str) -> None:
    assert plan_layers(swin(96), "swin", VariantSpec(name="v", format=format)).counts() == {format: 12, "bf16": 1}


@pytest.mark.parametrize(
    ("format", "intermediate", "reasons"),
    [
        # SigLIP's shape-optimised model: NF4 takes rows 32 at a time on a CPU, so fc1 is no more possible than fc2
        ("nf4", 4304, ["out_features 4304 is no multiple of 32", "in_features 4304 is no multiple of 64"]),
        ("int4", 4304, ["in_features 4304 is no multiple of 64"]),
        ("fp8", 4304, []),
        ("fp8", 72, ["out_features 72 is no multiple of 16", "in_features 72 is no multiple of 16"]),
    ],
)
def test_both_widths_of_a_layer_count(format: str, intermediate: int, reasons: list[str]) -> None:
    config = ViTConfig(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=intermediate)
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    assert list(plan(model, format=format).misfits()) == [f"{reason}, as {format} needs" for reason in reasons]


def test_a_layer_that_is_excepted_must_fit_too() -> None:
    got = plan_layers(swin(96), "swin", VariantSpec(name="v", format="bf16", layers={"fc1": "nf4"}))
    assert [(planned.layer.logical, planned.format) for planned in got.layers if "fc1" in planned.layer.logical] == [
        ("block.0.fc1", "bf16"),
        ("block.1.fc1", "nf4"),
    ]


def test_a_model_of_which_nothing_fits_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no layer .* in_features 24 is no multiple of 64, as nf4 needs.*int8"):
        plan_layers(swin(24), "swin", VariantSpec(name="v", format="nf4", skip=["fc2", "block.1"]))
    # Where the user skipped all, nothing is amiss.
    assert plan_layers(swin(24), "swin", VariantSpec(name="v", format="nf4", skip=["*"])).counts() == {"bf16": 13}


def test_all_heads_stay_in_16_bit() -> None:
    config = DeiTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128)
    with torch.device("meta"):
        model = DeiTForImageClassificationWithTeacher(config)
    got = plan_layers(model, "deit", VariantSpec(name="v", format="int8", layers={"classifier": "int8"}))
    heads = [(planned.layer.logical, planned.format, planned.reason) for planned in got.layers[-2:]]
    assert heads == [
        ("classifier.class", "bf16", "the head stays in 16 bit"),
        ("classifier.distillation", "bf16", "the head stays in 16 bit"),
    ]
