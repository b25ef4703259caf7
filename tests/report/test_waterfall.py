from types import SimpleNamespace

import pytest

from vitopt.report.waterfall import chain_words, find_chain, floor_words, says, steps


def names(chain):
    return [record.variant.name for record in chain]


def one_technique_at_a_time(make: SimpleNamespace):
    times = {1: 10.0}
    compiled = {"compile_requested": True, "compile_used": True}
    return [
        make.record("eager", "fp32", attention_requested="eager", attention_used="eager", p50_ms=times),
        make.record("sdpa", "fp32", p50_ms={1: 8.0}),
        make.record("bf16", "bf16", p50_ms={1: 5.0}),
        make.record("compiled", "bf16", **compiled, p50_ms={1: 4.0}),
        make.record("w8a8", "w8a8", **compiled, p50_ms={1: 2.0}),
        make.record("skip", "w8a8", **compiled, skip=("block.0",), p50_ms={1: 2.5}),
    ]


def test_chain_takes_variants_that_change_one_thing_each(make: SimpleNamespace):
    records = one_technique_at_a_time(make)

    assert find_chain(records, "eager") == records
    assert chain_words(records) == [
        "eager",
        "sdpa (sdpa attention)",
        "bf16",
        "compiled",
        "w8a8",
        "skip (block.0 in 16 bit)",
    ]


def test_chain_starts_at_the_baseline(make: SimpleNamespace):
    assert names(find_chain(one_technique_at_a_time(make), "bf16")) == ["bf16", "compiled", "w8a8", "skip"]


def test_chain_may_lead_up_to_a_baseline_that_is_its_end(make: SimpleNamespace):
    records = one_technique_at_a_time(make)[:4]

    assert find_chain(records, "compiled") == records


def test_first_variant_that_changes_two_things_ends_the_chain(make: SimpleNamespace):
    records = one_technique_at_a_time(make)
    del records[1]

    assert find_chain(records, "eager") == []
    assert names(find_chain([*records[1:4], records[0]], "bf16")) == ["bf16", "compiled", "w8a8"]


def test_variants_that_ran_alike_or_failed_are_passed_over(make: SimpleNamespace):
    records = one_technique_at_a_time(make)
    fell_back = make.record("flash", "bf16", attention_requested="flash_attention_2")
    broken = make.record("broken", "fp8", failure="no")

    chain = find_chain([*records[:3], fell_back, broken, *records[3:]], "eager")

    assert chain == records


def test_two_variants_are_no_chain(make: SimpleNamespace):
    assert find_chain(one_technique_at_a_time(make)[:2], "eager") == []
    assert find_chain([], None) == []


def test_other_formats_of_single_layers_are_a_step(make: SimpleNamespace):
    mixed = make.record("mixed", "nf4", layers=make.layers("nf4", block_3="int8"))
    records = [make.record("bf16", "bf16"), make.record("nf4", "nf4"), mixed]

    assert chain_words(find_chain(records, "bf16")) == ["bf16", "nf4", "mixed (other layer formats)"]


def test_steps_carry_the_speedup_over_the_step_before(make: SimpleNamespace):
    found = steps(find_chain(one_technique_at_a_time(make), "eager"), 1)

    assert found[0].speedup is None
    assert [step.speedup.ratio for step in found[1:]] == pytest.approx([10 / 8, 8 / 5, 5 / 4, 2.0, 0.8])
    assert [step.change for step in found][:3] == ["", "sdpa attention", "bf16"]


def test_no_steps_where_one_of_the_chain_was_not_timed(make: SimpleNamespace):
    chain = [*one_technique_at_a_time(make)[:3], make.record("nf4", "nf4")]

    assert steps(chain, 1) == []
    assert steps([], 1) == []


COMPILED = {"compile_requested": True, "compile_used": True}
FUSED = {"fused_attentions": 24}


def changes(make, *fields):
    """What the chain says of variants named by number, where each changes one thing of the one before."""
    records = [make.record(str(number), **one) for number, one in enumerate(fields)]
    return chain_words(find_chain(records, "0"))


def test_every_way_to_run_is_a_step_of_its_own(make: SimpleNamespace):
    cudnn = {"sdpa_kernel_requested": "cudnn", "sdpa_kernel_used": "cudnn"}
    assert changes(
        make,
        {"format": "bf16", "sdpa_kernel_used": "flash"},
        {"format": "bf16", **cudnn},
        {"format": "bf16", **cudnn, **FUSED},
        {"format": "bf16", **cudnn, **FUSED, "channels_last": True},
        {"format": "bf16", **cudnn, **FUSED, "channels_last": True, **COMPILED},
        {"format": "bf16", **cudnn, **FUSED, "channels_last": True, **COMPILED, "autotune": True},
    ) == [
        "0",
        "1 (cudnn kernel)",
        "2 (fused qkv)",
        "3 (channels last)",
        "4 (compiled)",
        "5 (autotuned)",
    ]


def test_a_step_may_take_something_back(make: SimpleNamespace):
    assert changes(
        make,
        {"sdpa_kernel_requested": "cudnn", **FUSED, "channels_last": True, **COMPILED, "autotune": True},
        {"sdpa_kernel_requested": "cudnn", **FUSED, "channels_last": True, **COMPILED},
        {"sdpa_kernel_requested": "cudnn", **FUSED, "channels_last": True},
        {"sdpa_kernel_requested": "cudnn", **FUSED},
        {"sdpa_kernel_requested": "cudnn"},
        {},
    ) == [
        "0",
        "1 (not autotuned)",
        "2 (not compiled)",
        "3 (not channels last)",
        "4 (qkv not fused)",
        "5 (the kernel that torch chooses)",
    ]


def test_compiling_and_autotuning_is_one_step(make: SimpleNamespace):
    assert changes(make, {}, FUSED, {**FUSED, **COMPILED, "autotune": True})[-1] == "2 (compiled, autotuned)"


def test_autotuning_counts_only_where_it_compiled(make: SimpleNamespace):
    gave_up = {"compile_requested": True, "compile_reason": "graph breaks", "autotune": True}

    assert changes(make, {}, gave_up, FUSED, {**FUSED, "channels_last": True}) == [
        "0",
        "2 (fused qkv)",
        "3 (channels last)",
    ]


def test_a_kernel_counts_only_where_another_was_demanded(make: SimpleNamespace):
    flash = {"sdpa_kernel_used": "flash"}
    demanded = {"sdpa_kernel_requested": "flash", "sdpa_kernel_used": "flash"}
    fell_back = {**flash, "sdpa_kernel_requested": "cudnn", "sdpa_kernel_reason": "no cuDNN"}
    efficient = {"sdpa_kernel_requested": "efficient", "sdpa_kernel_used": "efficient"}
    assert changes(
        make,
        flash,
        {**flash, **FUSED},
        {**COMPILED, **FUSED},  # a compiled call may show no kernel that is known
        {**COMPILED, **FUSED, "channels_last": True, "sdpa_kernel_used": "efficient"},
    ) == ["0", "1 (fused qkv)", "2 (compiled)", "3 (channels last)"]
    assert changes(make, flash, demanded, fell_back, efficient, {**efficient, **FUSED}) == [
        "0",
        "3 (efficient kernel)",
        "4 (fused qkv)",
    ]


def test_another_attention_is_one_step_whatever_its_kernel(make: SimpleNamespace):
    eager = {"attention_requested": "eager", "attention_used": "eager"}
    cudnn = {"sdpa_kernel_requested": "cudnn", "sdpa_kernel_used": "cudnn"}

    assert changes(make, eager, {"sdpa_kernel_used": "flash"}, FUSED)[1] == "1 (sdpa attention)"
    assert changes(make, eager, cudnn, {**cudnn, **FUSED})[1] == "1 (sdpa cudnn attention)"


def test_expansion_is_a_step_of_format(make: SimpleNamespace):
    assert changes(
        make,
        {"format": "fp32"},
        {"format": "nf4"},
        {"format": "bf16", "stored_format": "nf4"},
        {"format": "w8a8", "stored_format": "nf4"},
        {"format": "w8a8"},
        {"format": "w8a8", "stored_format": "bf16"},
        {"format": "fp8", "stored_format": "bf16"},
        {"format": "bf16", "stored_format": "int8"},
        {"format": "bf16", "stored_format": "bf16"},
    ) == [
        "0",
        "1 (nf4)",
        "2 (expanded to bf16)",
        "3 (expanded to w8a8)",
        "4 (stored as w8a8)",
        "5 (stored as bf16)",
        "6 (run as fp8)",
        "7 (int8 expanded to bf16)",
        "8 (stored as bf16)",
    ]


def test_expansion_and_another_thing_are_two(make: SimpleNamespace):
    assert (
        changes(make, {"format": "fp32"}, {"format": "nf4"}, {"format": "bf16", "stored_format": "nf4", **FUSED}) == []
    )


def test_a_name_that_says_the_change_is_not_explained(make: SimpleNamespace):
    assert says("fused-qkv", "fused qkv") and says("channels_last", "channels last")
    assert not says("fused", "fused qkv")


def test_the_last_step_is_held_against_its_floor(make: SimpleNamespace):
    times = {1: 8.0, 8: 16.0, 32: 40.0}
    chain = [
        make.record("bf16", "bf16", p50_ms=times, floor_ms={1: 0.05, 8: 0.4, 32: 1.6}),
        make.record("fused", "bf16", **FUSED, p50_ms=times, floor_ms={1: 0.05, 8: 0.4, 32: 1.6}),
        make.record("w8a8", "w8a8", **FUSED, p50_ms={1: 1.0, 32: 4.0}, floor_ms={1: 0.03, 32: 0.8}),
    ]

    assert floor_words(find_chain(chain, "bf16")) == (
        "w8a8 takes 33.3 times its floor at batch 1 (0.030 ms) and 5.0 times at batch 32 (0.80 ms)."
    )
    assert floor_words(one_technique_at_a_time(make)) == ""
    assert floor_words([]) == ""
