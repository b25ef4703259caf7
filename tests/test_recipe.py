import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vitopt.errors import RecipeError
from vitopt.recipe import (
    DataSpec,
    EvaluateSpec,
    FinetuneSpec,
    LatencySpec,
    Recipe,
    RecipeVariant,
    RoundingSpec,
    RunSpec,
    VariantSpec,
)
from vitopt.recipe_file import dump_yaml, load_recipe, validate

MINIMAL = """
name: run
model: some/model
data: digits
variants:
  - {name: a, format: fp32}
"""


@pytest.fixture
def recipe_file(tmp_path: Path):
    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def changed(**changes: object) -> dict[str, object]:
    return yaml.safe_load(MINIMAL) | changes


def mistakes(content: object) -> list[str]:
    """The lines below the heading of the error that `content` gives."""
    with pytest.raises(RecipeError) as caught:
        validate(Recipe, content, where="r.yaml")
    heading, *lines = str(caught.value).splitlines()
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    assert heading == f"r.yaml: {count}"
    return [line.strip() for line in lines]


def test_minimal_recipe_gets_the_documented_defaults(recipe_file):
    recipe = load_recipe(recipe_file())
    assert recipe.data == DataSpec(source="digits")
    assert recipe.variants == (RecipeVariant(name="a", format="fp32"),)
    assert (recipe.device, recipe.seed, recipe.strict, recipe.finetune) == ("auto", 0, False, None)
    assert recipe.evaluate.latency == LatencySpec(batch_sizes=(1,), iterations=100, rounds=10)
    assert recipe.baseline_name == "a"


def test_baseline_name_is_the_one_named():
    content = changed(variants=[{"name": "a", "format": "fp32"}, {"name": "b", "format": "nf4"}], baseline="b")
    assert validate(Recipe, content, where="r").baseline_name == "b"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"modle": "x"}, "modle: unknown key; did you mean 'model'?"),
        ({"data": {"source": "x", "tset": "y"}}, "data.tset: unknown key; did you mean 'test'?"),
        ({"finetune": {"rnak": 4}}, "finetune.rnak: unknown key; did you mean 'rank'?"),
        ({"evaluate": {"batchsize": 4}}, "evaluate.batchsize: unknown key; did you mean 'batch_size'?"),
        (
            {"evaluate": {"latency": {"iteration": 4}}},
            "evaluate.latency.iteration: unknown key; did you mean 'iterations'?",
        ),
        (
            {"variants": [{"name": "a", "format": "nf4", "attn": "sdpa", "skp": []}]},
            "variants.0.skp: unknown key; did you mean 'skip'?",
        ),
        (
            {"evaluate": {"latency": {"zzz": 1}}},
            "evaluate.latency.zzz: unknown key; known: batch_sizes, only, iterations, rounds, warmup_seconds, inputs",
        ),
    ],
)
def test_unknown_keys_suggest_the_nearest_at_every_depth(changes, line):
    assert line in mistakes(changed(**changes))


def test_a_key_that_is_no_word_is_a_mistake():
    assert mistakes(changed() | {7: "x"}) == ["7: keys should be strings, not 7"]


def test_all_mistakes_are_reported_at_once():
    content = {
        "name": "a b",
        "model": "",
        "data": {"limit": 0},
        "variants": [{"name": "v", "format": "int3"}, {"format": "nf4", "compile": "maybe"}],
        "evaluate": {"latency": {"batch_sizes": [1, 0]}},
    }
    found = mistakes(content)
    assert [line.partition(":")[0] for line in found] == [
        "name",
        "model",
        "data.source",
        "data.limit",
        "variants.0.format",
        "variants.1.name",
        "variants.1.compile",
        "evaluate.latency.batch_sizes.1",
    ]
    assert found[2] == "data.source: field required"
    assert found[3] == "data.limit: input should be greater than or equal to 1, not 0"
    assert "'nf4'" in found[4]
    assert found[4].endswith("not 'int3'")


def test_a_list_of_which_all_items_are_wrong_is_not_called_too_short_as_well():
    assert mistakes(changed(variants=[{"name": "a", "format": "x"}])) == [
        "variants.0.format: input should be 'auto', 'fp32', 'fp16', 'bf16', 'nf4', 'int4', 'int8', 'w8a8' or 'fp8', "
        "not 'x'"
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": []}, "variants: tuple should have at least 1 item"),
        ({"variants": "nf4"}, "variants: input should be a valid tuple, not 'nf4'"),
        ({"variants": [{"name": "../up", "format": "fp32"}]}, "variants.0.name: string should match pattern"),
        ({"variants": [{"name": "x" * 81, "format": "fp32"}]}, "at most 80 characters"),
        ({"name": None}, "name: input should be a valid string, not None"),
        ({"name": 5}, "name: input should be a valid string, not 5"),
        ({"device": "gpu"}, "device: string should match pattern"),
        ({"device": "cuda:"}, "device: string should match pattern"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0, not -1"),
        ({"seed": 0.5}, "seed: input should be a valid integer"),
        ({"data": 5}, "data: input should be a valid dictionary or instance of DataSpec, not 5"),
        ({"data": {"source": ""}}, "data.source: string should have at least 1 character, not ''"),
        ({"finetune": {"epochs": 0}}, "finetune.epochs: input should be greater than 0, not 0"),
        ({"finetune": {"epochs": float("nan")}}, "finetune.epochs: input should be"),
        ({"finetune": {"learning_rate": float("inf")}}, "learning_rate: input should be a finite number, not inf"),
        ({"finetune": {"dropout": 1}}, "finetune.dropout: input should be less than 1, not 1"),
        ({"finetune": {"rank": 1025}}, "finetune.rank: input should be less than or equal to 1024, not 1025"),
        ({"finetune": {"targets": []}}, "finetune.targets: tuple should have at least 1 item"),
        ({"finetune": {"method": "qlora"}}, "finetune.method: input should be "),
        ({"variants": [{"name": "a", "format": "nf4", "half": "fp32"}]}, "variants.0.half: input should be "),
        ({"variants": [{"name": "a", "format": "nf4", "attention": "flash"}]}, "variants.0.attention: input should"),
        (
            {"variants": [{"name": "a", "format": "nf4", "layers": {"block.0": "int3"}}]},
            "variants.0.layers.block.0: input should be ",
        ),
        ({"evaluate": {"latency": {"batch_sizes": []}}}, "evaluate.latency.batch_sizes: tuple should have at least 1"),
        (
            {"evaluate": {"latency": {"rounds": 20, "iterations": 5}}},
            "evaluate.latency: 20 rounds need at least as many iterations, not 5",
        ),
    ],
)
def test_wrong_types_and_ranges_are_named(changes, words):
    (line,) = mistakes(changed(**changes))
    assert words in line


@pytest.mark.parametrize(("iterations", "rounds"), [(1, 1), (6, 6), (10, 10), (500, 10)])
def test_fewer_iterations_than_rounds_take_fewer_rounds_unless_these_are_asked_for(iterations, rounds):
    assert validate(LatencySpec, {"iterations": iterations}, where="r").rounds == rounds
    with pytest.raises(RecipeError, match="501 rounds"):
        validate(LatencySpec, {"iterations": iterations, "rounds": 501}, where="r")


@pytest.mark.parametrize("format", ["fp32", "fp16", "bf16"])
def test_skip_needs_a_quantized_format(format):
    content = changed(variants=[{"name": "a", "format": format, "skip": ["block.0"]}])
    assert mistakes(content) == [
        f"variants.0: format {format} quantizes nothing, so `skip` has nothing to keep in 16 bit"
    ]


@pytest.mark.parametrize("format", ["nf4", "int8", "w8a8", "fp8"])
def test_skip_goes_with_every_quantized_format(format):
    content = changed(variants=[{"name": "a", "format": format, "skip": ["block.0"]}])
    assert validate(Recipe, content, where="r").variants[0].skip == ("block.0",)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"variants": [{"name": "a", "format": "nf4", "auto": {"max_top1_drop": 0.1}}]}, "`auto`"),
        ({"variants": [{"name": "a", "format": "nf4", "skip": "block.0", "auto": {"images": 9}}]}, "`auto`"),
        ({"variants": [{"name": "a", "format": "fp32", "half": "fp16"}]}, "`half`"),
        ({"data": "digits", "finetune": {"method": "full", "rank": 4}}, "`rank`"),
        ({"data": "digits", "finetune": {"method": "full", "alpha": 1, "dropout": 0}}, "`alpha`, `dropout`"),
        ({"data": "digits", "finetune": {"method": "full", "targets": "query"}}, "`targets`"),
        ({"data": {"source": "digits", "train": "all"}}, "`train`"),
        ({"data": None, "evaluate": {"batch_size": 8}}, "`batch_size`"),
        ({"data": None, "evaluate": {"workers": 2}}, "`workers`"),
    ],
)
def test_keys_without_effect_are_refused(changes, named):
    content = changed(**changes)
    (line,) = mistakes(content)
    assert named in line


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "digits", "variants": [{"name": "a", "format": "nf4", "skip": "auto", "auto": {"images": 9}}]},
        {"variants": [{"name": "a", "format": "nf4", "half": "fp16"}]},
        {"variants": [{"name": "a", "format": "bf16", "half": "fp16", "layers": {"fc1": "nf4"}}]},
        {"data": {"source": "digits", "train": "all"}, "finetune": {"method": "lora", "rank": 4}},
        {"data": "digits", "finetune": {"method": "full", "learning_rate": 1e-4}},
    ],
)
def test_keys_with_an_effect_are_taken_and_survive_the_resolved_recipe(changes):
    recipe = validate(Recipe, changed(**changes), where="r")
    assert validate(Recipe, yaml.safe_load(dump_yaml(recipe)), where="r") == recipe


RUN = {
    "engine": "torch",  # the others take no further option
    "attention": "sdpa",
    "sdpa_kernel": "math",
    "run_as": "w8a8",
    "fuse_qkv": True,
    "class_token_last": True,
    "carry_residual": True,
    "gelu_epilogue": True,
    "static_scales": True,
    "fused_kernels": False,  # goes with no carry_residual and no merge_tokens
    "merge_tokens": "16..0",
    "size_bias": False,
    "prune_tokens": None,  # those two go with no merge_tokens
    "fuse_pruned": False,
    "patch_product": False,  # goes with no channels_last
    "scaled_decoding": True,
    "channels_last": True,
    "compile": True,
    "autotune": True,
    "dependent_launch": True,
    "compile_whole": True,
}


def test_a_variant_by_default_runs_as_it_is():
    run = VariantSpec(name="a", format="nf4").run
    assert run == RunSpec()
    assert run.model_dump() == {
        "engine": "torch",
        "attention": "sdpa",
        "sdpa_kernel": "auto",
        "run_as": None,
        "fuse_qkv": False,
        "class_token_last": False,
        "carry_residual": False,
        "gelu_epilogue": False,
        "static_scales": False,
        "merge_tokens": None,
        "size_bias": True,
        "prune_tokens": None,
        "fuse_pruned": False,
        "fused_kernels": False,
        "patch_product": False,
        "channels_last": False,
        "scaled_decoding": False,
        "compile": False,
        "autotune": False,
        "dependent_launch": False,
        "compile_whole": False,
    }


def test_how_a_variant_runs_is_all_of_it_and_nothing_of_how_it_is_held():
    assert set(RUN) == set(RunSpec.model_fields)
    variant = VariantSpec(name="a", format="nf4", skip=["block.0"], half="fp16", **RUN)
    assert type(variant.run) is RunSpec
    assert variant.run == RunSpec(**RUN) and variant.run.model_dump() == RUN
    assert RunSpec.model_validate_json(variant.run.model_dump_json()) == variant.run


def variant(**run: object) -> dict[str, object]:
    return changed(variants=[{"name": "a", "format": "nf4", **run}])


@pytest.mark.parametrize(
    ("run", "line"),
    [
        ({"autotune": True}, "variants.0: `autotune` is a way to compile: set `compile` too"),
        ({"compile_whole": True}, "variants.0: `compile_whole` is a way to compile: set `compile` too"),
        ({"fused_kernels": True}, "variants.0: `fused_kernels` is a way to compile: set `compile` too"),
        ({"dependent_launch": True}, "variants.0: `dependent_launch` is a way to compile: set `compile` too"),
        (
            {"compile": True, "fused_kernels": True, "carry_residual": True},
            "variants.0: `fused_kernels` adds within products, `carry_residual` before norms: take one of them",
        ),
        (
            {"patch_product": True, "channels_last": True},
            "variants.0: `channels_last` is for a convolution, and `patch_product` replaces it: take one of them",
        ),
        ({"autotune": True, "compile": False}, "variants.0: `autotune` is a way to compile: set `compile` too"),
        (
            {"sdpa_kernel": "flash", "attention": "eager"},
            "variants.0: `sdpa_kernel` chooses a kernel of sdpa, and `attention` is eager",
        ),
        (
            {"sdpa_kernel": "math", "attention": "flash_attention_2"},
            "variants.0: `sdpa_kernel` chooses a kernel of sdpa, and `attention` is flash_attention_2",
        ),
        (
            {"sdpa_kernel": "flash_attention"},
            "variants.0.sdpa_kernel: input should be 'auto', 'flash', 'cudnn', 'efficient' or 'math', "
            "not 'flash_attention'",
        ),
        ({"run_as": "nf4"}, "variants.0.run_as: input should be 'bf16', 'w8a8' or 'fp8', not 'nf4'"),
        ({"fuse_kqv": True}, "variants.0.fuse_kqv: unknown key; did you mean 'fuse_qkv'?"),
    ],
)
def test_ways_to_run_that_do_not_fit_are_refused(run, line):
    assert mistakes(variant(**run)) == [line]


@pytest.mark.parametrize(
    "run",
    [
        {"autotune": True, "compile": True},
        {"sdpa_kernel": "auto", "attention": "eager"},
        {"sdpa_kernel": "efficient", "attention": "sdpa"},
        {"run_as": None},
    ],
)
def test_ways_to_run_that_fit_are_taken(run):
    found = validate(Recipe, variant(**run), where="r").variants[0].run
    assert {name: getattr(found, name) for name in run} == run


def test_a_recipe_needs_no_data_to_measure_speed():
    content = changed()
    del content["data"]
    for given in (content, content | {"data": None}):
        assert validate(Recipe, given, where="r").data is None


def test_requirements_are_limits_in_the_order_of_their_keys():
    content = changed(require={"max_p99_ms": 20, "max_top1_drop": 0.5, "batch_size": 1})
    recipe = validate(Recipe, content, where="r")
    assert list(recipe.require.limits.items()) == [("max_top1_drop", 0.5), ("max_p99_ms", 20)]
    assert validate(Recipe, changed(), where="r").require.limits == {}


@pytest.mark.parametrize(
    ("require", "words"),
    [
        ({"max_top1_dorp": 1}, "did you mean 'max_top1_drop'?"),
        ({"max_top1_drop": 0}, "require.max_top1_drop: input should be greater than 0"),
        ({"min_agreement": 100}, "require.min_agreement: input should be less than 100"),
        ({"batch_size": 1, "max_kl": 1}, "give min_speedup or max_p99_ms"),
        ({"batch_size": 8, "max_p99_ms": 1}, "require.batch_size 8 is not in evaluate.latency.batch_sizes"),
    ],
)
def test_requirements_that_nothing_can_show_or_use_are_mistakes(require, words):
    (mistake,) = mistakes(changed(require=require))
    assert words in mistake


def test_requirements_on_answers_need_images():
    (mistake,) = mistakes(changed(data=None, require={"max_kl": 1, "max_p99_ms": 20}))
    assert mistake == "require.max_kl needs `data`"


def test_what_needs_data_is_listed_with_all_other_mistakes():
    variants = [
        {"name": "a", "format": "fp32"},
        {"name": "b", "format": "nf4", "skip": "auto"},
        {"name": "c", "format": "int8", "skip": ["block.0"]},
        {"name": "d", "format": "w8a8", "skip": "auto"},
    ]
    content = changed(data=None, finetune={}, variants=variants, baseline="e")
    assert mistakes(content) == [
        "finetune needs `data`; `skip: auto` of b needs `data`; `skip: auto` of d needs `data`; "
        "baseline names 'e', which is not a variant; known: a, b, c, d"
    ]
    content["data"], content["baseline"] = "digits", "a"
    assert validate(Recipe, content, where="r").data == DataSpec(source="digits")


def test_names_must_agree():
    variants = [{"name": name, "format": "fp32"} for name in ("one", "two", "two", "one")]
    content = changed(variants=variants, baseline="tow", export="none-of-them")
    assert mistakes(content) == [
        "two variants are named 'one'; two variants are named 'two'; "
        "baseline names 'tow', which is not a variant; did you mean 'two'?; "
        "export names 'none-of-them', which is not a variant; known: one, two, two, one"
    ]


def test_a_variant_may_be_timed_at_some_of_the_batch_sizes():
    variants = [{"name": name, "format": "bf16"} for name in ("one", "four")]
    latency = {"batch_sizes": [1, 64], "only": {"one": 1}}
    spec = validate(Recipe, changed(variants=variants, evaluate={"latency": latency}), where="test").evaluate.latency
    asked = [(name, size) for name in ("one", "four") for size in (1, 64) if spec.times(name, size)]
    assert asked == [("one", 1), ("four", 1), ("four", 64)]
    unknown = changed(variants=variants, evaluate={"latency": latency | {"only": {"fuor": [1]}}})
    assert mistakes(unknown) == ["evaluate.latency.only names 'fuor', which is not a variant; did you mean 'four'?"]
    (mistake,) = mistakes(changed(variants=variants, evaluate={"latency": latency | {"only": {"one": [8]}}}))
    assert "only: one" in mistake and "1, 64" in mistake


def test_a_waterfall_names_variants():
    named = changed(waterfall=["one", "fuor"], variants=[{"name": name, "format": "bf16"} for name in ("one", "four")])

    assert mistakes(named) == ["waterfall names 'fuor', which is not a variant; did you mean 'four'?"]


def test_bare_values_become_lists_and_sections():
    content = changed(
        data="photos:test",
        finetune={"targets": "query"},
        variants=[{"name": "a", "format": "nf4", "skip": "block.0"}],
        evaluate={"latency": {"batch_sizes": 8}},
    )
    recipe = validate(Recipe, content, where="r")
    assert recipe.data.source == "photos:test"
    assert recipe.finetune is not None
    assert recipe.finetune.targets == ("query",)
    assert recipe.variants[0].skip == ("block.0",)
    assert recipe.evaluate.latency.batch_sizes == (8,)


def test_an_empty_finetune_section_takes_the_defaults(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL + "finetune: {}\n"))
    assert recipe.finetune == FinetuneSpec()
    assert recipe.finetune.targets == ("block",)


def test_specs_cannot_be_changed():
    spec = EvaluateSpec()
    with pytest.raises(ValueError, match="frozen"):
        spec.batch_size = 3


def test_numbers_in_scientific_notation_are_numbers(recipe_file):
    # YAML 1.1 reads `1e-3`, which has no dot, as a string.
    recipe = load_recipe(recipe_file(MINIMAL + "finetune: {learning_rate: 1e-3}\n"))
    assert recipe.finetune is not None
    assert recipe.finetune.learning_rate == 0.001


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("name=other", lambda r: r.name == "other"),
        ("seed=7", lambda r: r.seed == 7),
        ("strict=true", lambda r: r.strict is True),
        ("finetune.epochs=0.5", lambda r: r.finetune.epochs == 0.5),
        ("finetune={rank: 4}", lambda r: r.finetune.rank == 4),
        ("evaluate.latency.batch_sizes=[1, 8]", lambda r: r.evaluate.latency.batch_sizes == (1, 8)),
        ("evaluate.latency.batch_sizes=8", lambda r: r.evaluate.latency.batch_sizes == (8,)),
        ("variants.0.format=nf4", lambda r: r.variants[0].format == "nf4"),
        ("variants.0.name=b", lambda r: r.baseline_name == "b"),
        ("variants.0.layers={block.0: nf4}", lambda r: r.variants[0].layers == {"block.0": "nf4"}),
        ("variants.0={name: c, format: fp16}", lambda r: r.variants[0].format == "fp16"),
        ("data=photos", lambda r: r.data.source == "photos"),
        ("data.test=validation", lambda r: (r.data.source, r.data.test) == ("digits", "validation")),
        ("model=a=b", lambda r: r.model == "a=b"),
        ("finetune=", lambda r: r.finetune is None),
    ],
)
def test_overrides(recipe_file, override, read):
    assert read(load_recipe(recipe_file(), [override]))


def test_overrides_apply_in_order(recipe_file):
    recipe = load_recipe(recipe_file(), ["finetune.rank=4", "finetune.rank=16", "finetune.alpha=8"])
    assert recipe.finetune is not None
    assert (recipe.finetune.rank, recipe.finetune.alpha) == (16, 8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set 'seed' must look like KEY=VALUE, as in --set finetune.epochs=1"),
        ("=1", "--set '=1' must look like KEY=VALUE, as in --set finetune.epochs=1"),
        ("finetune..epochs=1", "--set 'finetune..epochs=1' must look like KEY=VALUE, as in --set finetune.epochs=1"),
        ("finetune.=1", "--set 'finetune.=1' must look like KEY=VALUE, as in --set finetune.epochs=1"),
        ("seed=[1", "--set 'seed=[1': the value is not valid YAML"),
        ("variants.3.format=nf4", "--set 'variants.3.format=nf4': variants.3 is not there; use an index from 0 to 1"),
        ("variants.a.format=nf4", "--set 'variants.a.format=nf4': variants.a is not there; use an index from 0 to 1"),
        ("variants.2=x", "--set 'variants.2=x': variants.2 is not there; use an index from 0 to 1"),
        ("variants.-1.format=nf4", "use an index from 0 to 1"),
        ("variants.1.skip.0=x", "--set 'variants.1.skip.0=x': variants.1.skip.0 is not there; the list is empty"),
        ("name.part=x", "--set 'name.part=x': name is 'run', which has no keys; set name itself"),
        (
            "variants.0.skip.0.x=1",
            "--set 'variants.0.skip.0.x=1': variants.0.skip.0 is 'block.0', which has no keys; "
            "set variants.0.skip.0 itself",
        ),
    ],
)
def test_bad_overrides_are_refused(recipe_file, override, message):
    text = MINIMAL.replace("format: fp32}", "format: nf4, skip: [block.0]}\n  - {name: b, format: nf4, skip: []}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(text), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_of_an_unknown_key_gets_a_suggestion(recipe_file):
    with pytest.raises(RecipeError, match=re.escape("finetune.epoch: unknown key; did you mean 'epochs'?")):
        load_recipe(recipe_file(), ["finetune.epoch=1"])


def test_environment_variables_are_expanded(recipe_file, monkeypatch):
    monkeypatch.setenv("MODELS", "/m")
    monkeypatch.setenv("RATE", "1e-4")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("ABSENT", raising=False)
    text = """
name: run-${ABSENT:-x}
model: ${MODELS}/vit${EMPTY}
data: {source: "${EMPTY:-digits}", train: "${ABSENT:-train}"}
finetune: {learning_rate: "${RATE}", targets: ["${ABSENT:-query}", key]}
variants:
  - {name: a, format: "${MODELS:-nf4}"}
"""
    recipe = load_recipe(recipe_file(text), ["variants.0.format=${ABSENT:-int8}"])
    assert recipe.name == "run-x"
    assert recipe.model == "/m/vit"
    assert (recipe.data.source, recipe.data.train) == ("digits", "train")
    assert recipe.finetune is not None
    assert recipe.finetune.learning_rate == 1e-4
    assert recipe.finetune.targets == ("query", "key")
    assert recipe.variants[0].format == "int8"


def test_an_environment_variable_that_is_not_set_is_named(recipe_file, monkeypatch):
    monkeypatch.delenv("ABSENT", raising=False)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(MINIMAL.replace("digits", "${ABSENT}/photos")))
    assert str(caught.value) == "the recipe uses ${ABSENT}, which is not set: run `export ABSENT=...` first"


def test_dump_yaml_loads_back_to_an_equal_recipe(recipe_file):
    content = changed(
        name="1e3",
        model="models/größe",
        data={"source": "photos: 2024", "limit": 5},
        finetune={"targets": ["block.*.fc1"], "learning_rate": 3e-5, "flip": False},
        variants=[
            {"name": "null", "format": "w8a8", "skip": ["block.0-2"], "layers": {"block.3": "fp8"}},
            {"name": "b", "format": "bf16", "compile": True, "attention": "eager"},
            {"name": "c", "format": "nf4", **RUN},
        ],
        baseline="b",
        export="null",
        evaluate={"latency": {"batch_sizes": [1, 32], "warmup_seconds": 0.5}},
    )
    recipe = validate(Recipe, content, where="r")
    assert load_recipe(recipe_file(dump_yaml(recipe))) == recipe


def test_a_dumped_variant_starts_with_its_name_and_how_it_is_held(recipe_file):
    recipe = load_recipe(recipe_file(MINIMAL.replace("data: digits\n", "")))
    dumped = dump_yaml(recipe)
    (written,) = yaml.safe_load(dumped)["variants"]
    assert list(written) == [
        "name",
        "format",
        "half",
        "skip",
        "auto",
        "layers",
        "rounding",
        *RUN,
        "fastest",
        "steps",
        "adaptive",
    ]
    assert "data: null\n" in dumped and "\n- name: a\n" in dumped
    assert load_recipe(recipe_file(dumped)) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "is not valid YAML: while parsing a flow sequence"),
        ("a: b: c", "is not valid YAML: mapping values are not allowed here"),
        ("a: \x00", "is not valid YAML: unacceptable character"),
        ("- name: x", "must be a mapping of keys such as name, model, data and variants"),
        ("", "must be a mapping of keys such as name, model, data and variants"),
        (
            "!!python/object/apply:os.system ['true']",
            "is not valid YAML: tag tag:yaml.org,2002:python/object",
        ),
    ],
)
def test_files_that_are_no_recipe(recipe_file, text, words):
    path = recipe_file(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path} ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_mistake(recipe_file):
    assert load_recipe(recipe_file("\ufeff" + MINIMAL.lstrip())).name == "run"


def test_files_that_cannot_be_read(tmp_path):
    hint = "(`vitopt init` prints one to start from)"
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "absent.yaml")
    assert str(caught.value) == f"cannot read recipe {tmp_path}/absent.yaml: No such file or directory {hint}"
    with pytest.raises(RecipeError, match=f"cannot read recipe {tmp_path}: it is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: größe".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml: 'utf-8' codec can't decode byte"):
        load_recipe(tmp_path / "latin.yaml")


def test_shipped_recipes_are_valid():
    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).variants


def test_recipes_records_and_help_import_no_torch():
    heavy = ["torch", "transformers", "datasets", "bitsandbytes", "matplotlib", "sklearn"]
    code = (
        "import sys, vitopt.recipe, vitopt.records, vitopt.storage, vitopt.cli; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# A format that measuring has yet to choose


@pytest.mark.parametrize(
    ("also", "named"),
    [
        ({"skip": ["block.0"]}, "`skip`"),
        ({"skip": "auto"}, "`skip`"),
        ({"layers": {"block.0": "bf16"}}, "`layers`"),
        ({"run_as": "bf16"}, "`run_as`"),
        ({"attention": "eager", "compile": True}, "`attention`, `compile`"),
    ],
)
def test_an_open_format_leaves_nothing_else_to_ask(also, named):
    (line,) = mistakes(changed(variants=[{"name": "a", "format": "auto"} | also]))
    assert line.startswith("variants.0: `format: auto`") and f"leave {named} out" in line


def test_how_a_format_is_chosen_is_nothing_for_one_that_is_named():
    (line,) = mistakes(changed(variants=[{"name": "a", "format": "nf4", "fastest": {"min_agreement": 99}}]))
    assert line.startswith("variants.0: `fastest`")
    (line,) = mistakes(changed(variants=[{"name": "a", "format": "auto", "auto": {"max_top1_drop": 2}}]))
    assert line.startswith("variants.0: `auto`")


def test_an_open_format_needs_data():
    (line,) = mistakes(changed(data=None, variants=[{"name": "a", "format": "auto"}]))
    assert line == "`format: auto` of a needs `data`"


def test_a_choice_gives_the_format_and_how_it_is_run():
    content = {"name": "a", "format": "auto", "half": "fp16", "steps": ["finetune"], "fastest": {"compile": False}}
    open_variant = validate(RecipeVariant, content, where="v")
    assert open_variant.chooses_format and open_variant.calibration == open_variant.fastest
    chosen = open_variant.with_choice(VariantSpec(name="w8a8-compiled", format="w8a8", compile=True, fuse_qkv=True))
    assert (chosen.name, chosen.format, chosen.half, chosen.steps) == ("a", "w8a8", "fp16", open_variant.steps)
    assert chosen.run == RunSpec(compile=True, fuse_qkv=True) and not chosen.chooses_format


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**32),
        ("model", "x" * 5_000),
        ("device", "cuda:99999999999"),
        ("finetune.learning_rate", 1e300),
        ("finetune.epochs", 1e300),
        ("finetune.workers", 10**9),
        ("evaluate.batch_size", 10**12),
        ("evaluate.latency.batch_sizes", [10**12]),
        ("evaluate.latency.iterations", 10**15),
    ],
)
def test_numbers_that_no_run_can_mean(key, value):
    content = {"name": "r", "model": "m", "data": "digits", "variants": [{"name": "a", "format": "fp32"}]}
    *parents, last = key.split(".")
    place = content
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
        validate(Recipe, content, where="recipe")


def test_a_file_of_mistakes_alone_is_answered_soon_and_shortly(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(f"key{number}: 1" for number in range(9_000)))
    with pytest.raises(RecipeError, match=r"9,00\d mistakes") as caught:
        load_recipe(path)
    assert str(caught.value).count("\n") == 50


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": "fp32", "engine": "openvino", "compile": True}, ["openvino", "`compile`"]),
        ({"format": "nf4", "engine": "openvino"}, ["openvino", "nf4", "fp32, bf16, w8a8"]),
        ({"format": "bf16", "engine": "onnxruntime"}, ["onnxruntime", "bf16"]),
        ({"format": "w8a8", "engine": "openvino", "layers": {"fc1": "fp8"}}, ["openvino", "fp8"]),
        ({"format": "w8a8", "engine": "openvino", "half": "fp16"}, ["openvino", "`half`"]),
        ({"format": "w8a8", "engine": "openvino", "fixed_scales": {"images": 9}}, ["fixed_scales", "static_scales"]),
        ({"format": "fp32", "engine": "openvino", "static_scales": True}, ["`static_scales`", "fp32"]),
        (
            {"format": "w8a8", "engine": "openvino", "static_scales": True},
            ["of a needs images", "steps: [calibrate]"],
        ),
        ({"format": "fp32", "engine": "tensorrt", "fuse_qkv": True}, ["tensorrt", "`fuse_qkv`"]),
        ({"format": "nf4", "engine": "aoti"}, ["aoti", "nf4"]),
        ({"format": "auto", "engine": "aoti", "static_scales": True}, ["`static_scales`", "`format: auto`"]),
        (
            {"format": "fp32", "engine": "tensorflow"},
            ["engine", "'torch', 'openvino', 'onnxruntime', 'tensorrt' or 'aoti'"],
        ),
    ],
)
def test_what_an_engine_does_not_do_is_refused(content, words):
    (line,) = mistakes(changed(data="digits", variants=[{"name": "a", **content}]))
    assert all(word in line for word in words)


@pytest.mark.parametrize("choice", [{"format": "w8a8", "skip": "auto", "half": "fp16"}, {"format": "auto"}])
def test_what_torch_chooses_may_be_open_for_an_engine_that_compiles_its_model(choice):
    content = changed(data="digits", variants=[{"name": "a", "engine": "aoti", **choice}])
    assert validate(Recipe, content, where="r.yaml").variants[0].wants_images


def test_calibration_of_an_engine_needs_data_and_names_its_images():
    content = {"name": "a", "format": "w8a8", "engine": "openvino", "static_scales": True}
    content["steps"] = [{"calibrate": {"images": 5}}, {"calibrate": {"images": 9, "split": "other"}}]
    recipe = validate(Recipe, changed(data="digits", variants=[content]), where="r")
    assert recipe.variants[0].scaling_step.settings.images == 9
    (line,) = mistakes({key: value for key, value in changed(variants=[content]).items() if key != "data"})
    assert "step calibrate of a needs `data`" in line
    of_random_weights = {"name": "r", "model": "random:vit-tiny-patch16-224", "variants": [{**content, "steps": []}]}
    assert validate(Recipe, of_random_weights, where="r").variants[0].scaling_step is None


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        ({}, None),
        ({"rounding": "nearest"}, None),
        ({"rounding": "gptq"}, RoundingSpec()),
        ({"rounding": {"images": 9}}, RoundingSpec(images=9)),
    ],
)
def test_rounding_is_a_word_or_its_settings(content, settings):
    recipe = validate(Recipe, changed(data="digits", variants=[{"name": "a", "format": "nf4", **content}]), where="r")
    assert recipe.variants[0].rounding == settings
    assert recipe.variants[0].wants_images == (["`rounding`"] if settings else [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": "int8"}, ["`rounding: gptq`", "nf4, int4, w8a8", "int8"]),
        ({"format": "bf16"}, ["nf4, int4, w8a8", "bf16"]),
        ({"format": "w8a8", "layers": {"fc2": "fp8"}}, ["fp8"]),
        ({"format": "w8a8", "engine": "openvino"}, ["openvino", "`rounding`"]),
        ({"format": "auto"}, ["`format: auto`", "`rounding`"]),
        ({"format": "nf4", "rounding": "awq"}, ["rounding", "'awq'"]),
        ({"format": "nf4", "rounding": {"learning_rate": 1e-3}}, ["`tuning_steps`", "`learning_rate`"]),
    ],
)
def test_rounding_that_cannot_be_is_refused(content, words):
    (line,) = mistakes(changed(data="digits", variants=[{"name": "a", "rounding": "gptq", **content}]))
    assert all(word in line for word in words)
