from types import SimpleNamespace

import pytest

from vitopt.report.waterfall import chain_words, find_chain, steps


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
