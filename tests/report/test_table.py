from types import SimpleNamespace

import pytest

from vitopt.records import FailedLatency, Memory
from vitopt.report import table as report_table
from vitopt.report.table import (
    HEADINGS,
    UNKNOWN,
    device_name,
    human_bytes,
    markdown,
    milliseconds,
    notes,
    of,
    percent,
    row,
    tabulate,
    tail,
)


def cell(record, heading, batch_size=None):
    return row(record, batch_size)[HEADINGS.index(heading)]


@pytest.mark.parametrize(
    ("count", "text"),
    [
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


@pytest.mark.parametrize(
    ("value", "text"),
    [(180.04, "180.0"), (99.99, "99.99"), (0.1, "0.10"), (0.0494, "0.049")],
)
def test_milliseconds_keep_about_three_digits(value, text):
    assert milliseconds(value) == text


def test_floor_and_utilisation_are_of_the_batch_size(make: SimpleNamespace):
    record = make.record("a", "bf16", p50_ms={1: 0.8, 8: 1.6}, floor_ms={1: 0.052, 8: 0.416})

    assert [cell(record, "floor ms", size) for size in (1, 8, 16)] == ["0.052", "0.42", UNKNOWN]
    assert [cell(record, "MFU %", size) for size in (1, 8, 16)] == ["6.5", "26.0", UNKNOWN]


def test_peak_memory_is_of_the_batch_size_where_it_was_measured_at_each(make: SimpleNamespace):
    used = Memory(peak_bytes=5_000_000, kind="cuda_allocated", batch_size=1)
    on_cpu = make.record("a", p50_ms={1: 3.0, 8: 9.0}, memory=used)
    peaks = {1: 5_000_000, 8: 40_000_000}
    rows = tuple(row.model_copy(update={"peak_bytes": peaks[row.batch_size]}) for row in on_cpu.latency)
    on_gpu = on_cpu.model_copy(update={"latency": rows})

    assert [cell(on_cpu, "peak memory", size) for size in (None, 8)] == ["5.00 MB", "5.00 MB"]
    # At batch 64 it did not fit: its peak at batch 1 would be no answer.
    assert [cell(on_gpu, "peak memory", size) for size in (None, 8, 64)] == ["5.00 MB", "40 MB", UNKNOWN]


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
    cudnn = {"sdpa_kernel": "cudnn"}
    fallback = make.ran({"attention": "flash_attention_2"}, attention="it needs a GPU")
    kernel = make.ran(cudnn, {"sdpa_kernel": "math"}, sdpa_kernel="it needs a CUDA device")
    records = [
        make.record("a", **fallback),
        make.record("b", **fallback),
        make.record("c", **make.ran({"compile": True}, {"compile": False}, compile="graph breaks")),
        make.record("d", failure="out of memory"),
        make.record("e", **kernel),
        make.record("f", **kernel),
        make.record("g", **make.ran(cudnn, sdpa_kernel="it needs a CUDA device")),
        make.record("h", **make.ran({"compile": True}, {"compile": True}, compile="batch 3: no kernel")),
    ]

    assert notes(records) == [
        "a, b: attention flash_attention_2 was asked for, sdpa ran (it needs a GPU)",
        "c: compile was asked for and did not run (graph breaks)",
        "d failed: out of memory",
        "e, f: sdpa kernel cudnn was asked for, math ran (it needs a CUDA device)",
        "g: sdpa kernel cudnn was asked for, another ran (it needs a CUDA device)",
        "h: compile was asked for (batch 3: no kernel)",
    ]


def test_notes_put_cautions_before_verdicts(comparison):
    first, second, third = notes(comparison[0])

    assert first.startswith("fp8 failed")
    assert second.startswith("bf16 against fp32: no loss shown") and third.startswith("nf4 against fp32: loses")


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
    table = markdown(report_table.comparison([make.record("a|b<script>\nc")], None))

    lines = table.splitlines()
    assert len(lines) == 3
    assert "a\\|b&lt;script> c" in lines[2]
    assert lines[1] == "|---|---|---|---:|---:|"


def test_markdown_leaves_out_columns_without_any_figure(make: SimpleNamespace):
    records = [make.record("a", p50_ms={1: 3.0}), make.record("b", failure="no", weight_bytes=None)]

    assert markdown(report_table.comparison(records, None)).splitlines() == [
        "| variant | format | attention | p50 ms | p95 ms | p99 ms | images/s | weights | on disk |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
        "| a | fp32 | sdpa | 3.00 | 3.27 | 3.29 | 333 | 20 MB | 20 MB |",
        "| b | fp32 | failed | – | – | – | – | – | – |",
    ]


def test_a_failed_variant_has_its_reason_in_the_table(make: SimpleNamespace):
    records = [make.record("a", p50_ms={1: 3.0}), make.record("b", failure="no", weight_bytes=None)]

    assert report_table.comparison(records, 1).failures == {"b": "no"}


def test_a_table_has_a_dash_for_what_is_missing_on_the_way_and_no_column_without_a_figure():
    items = [SimpleNamespace(name="a", size=SimpleNamespace(bytes=0)), SimpleNamespace(name="b", size=None)]
    columns = {"name": of("name"), "bytes": of("size.bytes", "{:,}".format), "none": of("size", lambda _: None)}

    table = tabulate("Sizes", columns, items)

    assert (table.headings, table.rows) == (("name", "bytes"), (("a", "0"), ("b", UNKNOWN)))
    assert table and not tabulate("Sizes", columns, [])


def test_device_is_the_gpu_where_there_is_one(make: SimpleNamespace):
    assert device_name(make.record("a").environment) == "Test CPU"
    assert device_name({"gpu": {"name": "H200"}}) == "H200"
    assert device_name({}) == "unknown device"


@pytest.mark.parametrize(
    ("estimate", "limits", "text"),
    [
        (12.3, (11.9, 13.14), "12.30 (≤ 13.14)"),
        (12.3, (11.9, None), "≥ 11.90"),
        (None, (11.9, None), "≥ 11.90"),
        (None, (None, None), None),
        (12.3, None, "12.30"),  # a record without limits
        (None, None, None),
    ],
)
def test_a_tail_is_shown_with_its_limit(estimate, limits, text):
    assert tail(estimate, limits) == text


def test_a_percentile_without_an_upper_limit_says_how_many_calls_give_one(make: SimpleNamespace):
    record = make.record("a", p50_ms={1: 3.0})
    limits = {"p95_ci95_ms": (3.1, 3.3), "p99_ci95_ms": (3.2, None)}
    bounded = record.model_copy(update={"latency": (record.latency[0].model_copy(update=limits),)})
    assert cell(bounded, "p95 ms").endswith("(≤ 3.30)") and cell(bounded, "p99 ms") == "≥ 3.20"
    assert notes([bounded, bounded]) == ["no upper bound for p99 from 100 calls: at least 368 are needed"]


def test_what_was_not_measured_is_told_with_its_reason(make: SimpleNamespace):
    records = [make.record(name, unmeasured={"memory": "ended by SIGKILL"}) for name in "ab"]
    assert notes(records) == ["a, b: memory not measured (ended by SIGKILL)"]


def test_latency_is_found_by_batch_size(make: SimpleNamespace):
    record = make.record("a", p50_ms={1: 3.0, 8: 9.0})

    assert record.latency_at(None).batch_size == 1
    assert record.latency_at(8).p50_ms == 9.0
    assert record.latency_at(2) is None
    assert make.record("b").latency_at(None) is None
