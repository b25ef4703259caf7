from types import SimpleNamespace

import pytest

from vitopt.records import FailedLatency
from vitopt.report import table as report_table
from vitopt.report.table import (
    HEADINGS,
    UNKNOWN,
    describe_device,
    human_bytes,
    markdown_table,
    notes,
    percent,
    row,
)


def cell(record, heading, batch_size=None):
    return row(record, batch_size)[HEADINGS.index(heading)]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, UNKNOWN),
        (50_000, "0.05 MB"),
        (3_642_992, "3.64 MB"),
        (22_869_664, "23 MB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1.00 GB"),
        (3_308_142_592, "3.31 GB"),
    ],
)
def test_bytes_are_counted_in_decimal_units(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(("value", "text"), [(100, "100.0"), (90, "90.0"), (99.96, "99.96"), (99.9999, "99.9999")])
def test_nearly_all_is_never_shown_as_all(value, text):
    assert percent(value) == text


def test_row_takes_the_first_batch_size_unless_told(make: SimpleNamespace):
    record = make.record("bf16", "bf16", p50_ms={1: 20.0, 8: 100.0}, baseline_ms={1: 30.0, 8: 180.0})

    assert cell(record, "p50 ms") == "20.00"
    assert cell(record, "p50 ms", 8) == "100.0"
    assert cell(record, "speed-up", 8) == "1.80x"
    assert cell(record, "images/s", 8) == "80.0"
    assert cell(record, "p50 ms", 16) == UNKNOWN


def test_a_failed_variant_does_not_show_an_attention_that_never_ran(make: SimpleNamespace):
    record = make.record("fp8", "fp8", failure="no fp8 here", layers={}, weight_bytes=None)

    assert row(record)[:3] == ["fp8", "fp8", "failed"]
    assert set(row(record)[3:]) == {UNKNOWN}


def test_points_get_a_second_decimal_from_ten_thousand_images_on(make: SimpleNamespace):
    few, many = make.predictions(images=4_000), make.predictions(images=12_000)
    losing = make.predictions(wrong=(1, 2, 3), images=12_000)

    assert cell(make.record("fp32", predictions=few), "top-1 %") == "100.0"
    assert cell(make.record("nf4", baseline=("fp32", many), predictions=losing), "Δ points (95 %)").startswith(
        "-0.03 ("
    )


def test_notes_name_variants_with_the_same_note_together(make: SimpleNamespace):
    fallback = {"attention_requested": "flash_attention_2", "attention_reason": "it needs a GPU"}
    records = [
        make.record("a", **fallback),
        make.record("b", **fallback),
        make.record("c", compile_requested=True, compile_reason="graph breaks"),
        make.record("d", failure="out of memory"),
    ]

    assert notes(records) == [
        "a, b: flash_attention_2 was asked for, sdpa ran (it needs a GPU)",
        "c: not compiled (graph breaks)",
        "d failed: out of memory",
    ]


def test_notes_put_cautions_before_verdicts(comparison):
    lines = notes(comparison[0])

    assert lines[0] == "fp8 failed: fp8 cannot run on cpu"
    assert lines[1].startswith("bf16 against fp32: identical on all 40 images")
    assert lines[2].startswith("nf4 against fp32: loses")


def test_a_warning_of_all_measured_variants_names_none(make: SimpleNamespace):
    shared, own = "the machine was busy", "the clock was lowered"
    records = [
        make.record("a", warnings=(shared,)),
        make.record("b", warnings=(shared, own)),
        make.record("c", failure="no"),
    ]

    assert notes(records)[1:] == [shared, f"b: {own}"]


def test_untimed_batch_sizes_and_skipped_images_are_noted(make: SimpleNamespace):
    record = make.record(
        "a", predictions=make.predictions(), latency_failures=(FailedLatency(batch_size=64, reason="too large"),)
    )
    record = record.model_copy(update={"dataset": record.dataset.model_copy(update={"skipped": ("bad.png",)})})

    assert "a: batch 64 not timed (too large)" in notes([record])
    assert "1 images could not be decoded and were left out, first bad.png" in notes([record])


def test_markdown_cells_cannot_break_the_table_or_bring_html(make: SimpleNamespace):
    table = markdown_table([make.record("a|b<script>\nc")])

    lines = table.splitlines()
    assert len(lines) == 3
    assert "a\\|b&lt;script> c" in lines[2]
    assert lines[1].count("---:") == len(HEADINGS) - 3


def test_comparison_leaves_out_columns_without_any_figure(make: SimpleNamespace):
    table = report_table.comparison(
        [make.record("a", p50_ms={1: 3.0}), make.record("b", failure="no", weight_bytes=None)], 1
    )

    assert "top-1 %" not in table.headings
    assert table.headings[:3] == ("variant", "format", "attention")
    assert all(len(cells) == len(table.headings) for cells in table.rows)
    assert table.failures == {"b": "no"}


def test_device_is_the_gpu_where_there_is_one(make: SimpleNamespace):
    assert describe_device(make.record("a")) == "Test CPU"
    assert describe_device(make.record("a", environment={"gpu": {"name": "H200"}})) == "H200"
    assert describe_device(make.record("a", environment={})) == "unknown device"
