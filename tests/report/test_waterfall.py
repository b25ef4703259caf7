from types import SimpleNamespace

import pytest

from vitopt.report.waterfall import chain_of, steps

CHAIN = ("eager", "sdpa", "bf16", "compiled")


def timed(make: SimpleNamespace):
    return [make.record(name, p50_ms={1: p50}) for name, p50 in zip(CHAIN, (10.0, 8.0, 5.0, 4.0), strict=True)]


def test_a_chain_has_the_order_of_the_recipe_and_no_failed_variant(make: SimpleNamespace):
    records = [*timed(make)[::-1], make.record("fp8", failure="needs a GPU")]

    chain = chain_of(records, ("eager", "sdpa", "fp8", "compiled"))

    assert [record.variant.name for record in chain] == ["eager", "sdpa", "compiled"]
    assert chain_of(records, ()) == []


def test_steps_carry_the_speedup_over_the_step_before(make: SimpleNamespace):
    found = steps(timed(make), 1)

    assert found[0].speedup is None
    assert [step.speedup.ratio for step in found[1:]] == pytest.approx([10 / 8, 8 / 5, 5 / 4])


def test_no_steps_where_one_of_the_chain_was_not_timed(make: SimpleNamespace):
    assert steps([*timed(make), make.record("nf4")], 1) == []
    assert steps([], 1) == []
