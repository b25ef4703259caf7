from types import SimpleNamespace

import pytest

from vitopt.records import Roofline
from vitopt.report.roofline import facts


def limited(make, format, flops_per_second, copy=4.104e12, flops_per_image=35_130_000_000):
    rates = Roofline(gemm_format=format, gemm_flops_per_second=flops_per_second, copy_bytes_per_second=copy)
    record = make.record(format, format, roofline=rates)
    return record.model_copy(update={"model": record.model.model_copy(update={"flops_per_image": flops_per_image})})


def test_facts_are_the_rates_per_format_and_what_follows(make: SimpleNamespace):
    records = [limited(make, "fp32", 5.2e13), limited(make, "bf16", 7.12e14), limited(make, "bf16", 7.12e14)]

    matrix, copy, image = facts(records)
    assert matrix == ("matrix rate", "52.0 TFLOP/s in fp32, 712 TFLOP/s in bf16")
    assert copy[1].startswith("4.10 TB/s") and image[1].startswith("35.1 GFLOP")


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1.34e15, "1,340 TFLOP/s"),
        (9.996e13, "100 TFLOP/s"),
        (9.996e12, "10.0 TFLOP/s"),
        (1e12, "1.00 TFLOP/s"),
        (9.994e11, "999 GFLOP/s"),
        (5.2e10, "52.0 GFLOP/s"),
        (5e8, "500 MFLOP/s"),
    ],
)
def test_rates_have_three_digits(make: SimpleNamespace, rate, text):
    assert facts([limited(make, "bf16", rate)])[0] == ("matrix rate", f"{text} in bf16")


def test_values_that_differ_are_a_span(make: SimpleNamespace):
    records = [
        limited(make, "bf16", 7.5e14, copy=4.1e12, flops_per_image=35_130_000_000),
        limited(make, "bf16", 7e14, copy=4e12, flops_per_image=2_512_000_000),
    ]

    spans = ("700 TFLOP/s to 750 TFLOP/s", "4.00 TB/s to 4.10 TB/s", "2.51 GFLOP to 35.1 GFLOP")
    assert all(text.startswith(span) for (_, text), span in zip(facts(records), spans, strict=True))


def test_without_rates_or_arithmetic_there_is_less_to_say(make: SimpleNamespace):
    assert facts([make.record("a", p50_ms={1: 3.0}), make.record("b", failure="no", model=None)]) == []
    assert [name for name, _ in facts([limited(make, "bf16", 1e12, flops_per_image=None)])] == [
        "matrix rate",
        "copy rate",
    ]
