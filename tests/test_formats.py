"""One table of formats: complete, and each that is quantized has a builder."""

from typing import get_args

import pytest

from vitopt.formats import FORMATS, OTHER_COLOUR, QUANTIZED_FORMATS, RunAs, colour_of
from vitopt.measure.rates import _PRODUCTS
from vitopt.optimize.formats import _BUILDERS, QUANTIZES


def test_what_is_quantized_has_a_builder_and_nothing_else_has():
    assert set(_BUILDERS) == set(QUANTIZED_FORMATS)
    assert set(QUANTIZES) == {name for name, facts in FORMATS.items() if facts.library == "torchao"}


def test_every_format_computes_in_one_whose_product_can_be_timed():
    assert {facts.computes_in for facts in FORMATS.values()} <= set(_PRODUCTS)


def test_following_the_nearest_format_ends_at_one_that_runs_everywhere():
    for name in FORMATS:
        seen = [name]
        while seen[-1] != "fp32":
            seen.append(FORMATS[seen[-1]].nearest)
            assert len(seen) <= len(FORMATS)
    assert FORMATS["fp32"].capability is FORMATS["fp32"].library is FORMATS["fp32"].not_on_cpu is None


def test_layers_expand_only_to_formats_that_can_be_fast():
    assert all(FORMATS[format].can_be_fast for format in get_args(RunAs))


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_has_a_colour_of_its_own(format: str):
    assert [name for name in FORMATS if colour_of(name) == colour_of(format)] == [format]
    assert colour_of("fp2") == OTHER_COLOUR
