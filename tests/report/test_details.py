from types import SimpleNamespace

import pytest

from vitopt.records import BatchInvariance, EndToEnd, Requirement, Throughput
from vitopt.report import details


def cells(table, name):
    row = next(row for row in table.rows if row[0] == name)
    return dict(zip(table.headings, row, strict=True))


def test_variants_are_held_against_the_baseline(comparison):
    records = comparison[0]

    table = details.against_baseline(records, records[0])

    assert [row[0] for row in table.rows] == ["bf16", "nf4"]
    of_nf4 = cells(table, "nf4")
    assert of_nf4["accuracy"].startswith("loses")
    assert of_nf4["speed-up at batch 8 (95 %)"] == "1.50x (1.42x to 1.58x)"
    assert of_nf4["times smaller"] == "5.6x"
    assert not details.against_baseline(records, None)


def test_speed_and_size_alone_are_held_against_the_baseline_too(make: SimpleNamespace):
    records = [make.record("a", p50_ms={1: 3.0}), make.record("b", p50_ms={1: 2.0}, weight_bytes=40_000_000)]

    table = details.against_baseline(records, records[0])

    assert (table.headings, table.rows) == (("variant", "times smaller"), (("b", "0.5x"),))


def test_what_is_required_is_a_column_with_the_decision(make: SimpleNamespace):
    def required(decision, name="max_kl"):
        return (Requirement(name=name, limit=0.1, measured=0.2, ci95=(0.1, 0.3), decision=decision),)

    records = [
        make.record("fp32"),
        make.record("a", requirements=required("failed")),
        make.record("b", requirements=required("shown") + required("undecided", "max_top1_drop")),
    ]

    table = details.requirements(records)

    assert table.rows == (("a", "0.2 (0.1 to 0.3), missed", "–"), ("b", "0.2 (0.1 to 0.3), met", table.rows[1][2]))
    assert "not shown" in table.rows[1][2]
    assert not details.requirements(records[:1])


def test_agreement_has_flips_and_divergence(comparison):
    table = details.agreement(comparison[0])

    of_nf4 = cells(table, "nf4")
    assert (of_nf4["right to wrong"], of_nf4["wrong to right"], of_nf4["McNemar p"]) == ("24", "1", "< 0.001")
    assert "top-5 %" not in table.headings  # four classes have none
    assert len(table.rows) == 3


def test_end_to_end_has_a_table_per_batch_size(make: SimpleNamespace):
    parts = {"decode_ms": 4.0, "preprocess_ms": 6.0, "copy_ms": 0.1, "model_ms": 5.0, "postprocess_ms": 0.2}
    rest = {"iterations": 9, "total_p50_ms": 15.0, "total_p95_ms": None, "images_per_second": 66.0}
    one, eight = (EndToEnd(batch_size=size, **parts, **rest) for size in (1, 8))

    first, second = details.end_to_end([make.record("a", end_to_end=(one, eight)), make.record("b")])

    assert first.caption == "From file to class at batch 1, in ms"
    assert first.rows == (("a", "4.00", "6.00", "0.10", "5.00", "0.20", "15.00", "66.0"),)
    assert "total p95" not in second.headings


def test_other_timings_give_rate_and_energy_once_per_variant(make: SimpleNamespace):
    best = Throughput(batch_size=256, images_per_second=8123.4, largest_batch_size=512)
    record = make.record("a", p50_ms={1: 3.0, 8: 9.0}, throughput=best, energy_joules_per_image=0.1234)

    table = details.other_timings([record])

    assert table.rows == (
        ("a", "1", "0.25", "100", "10", "0", "8123 at batch 256", "0.123"),
        ("a", "8", "0.25", "100", "10", "0", "–", "–"),
    )
    assert "device p50, ms" not in table.headings


def test_nothing_measured_gives_no_table(make: SimpleNamespace):
    records = [make.record("a", failure="no")]

    assert not details.agreement(records)
    assert details.end_to_end(records) == []
    assert not details.other_timings(records)


def test_discarded_calls_and_an_unsettled_warm_up_are_shown(make: SimpleNamespace):
    record = make.record("a", p50_ms={1: 3.0})
    row = record.latency[0].model_copy(update={"discarded_calls": 1_020, "settled": False})
    timed = cells(details.other_timings([record.model_copy(update={"latency": (row,)})]), "a")
    assert (timed["discarded calls"], timed["warm-up settled"]) == ("1,020", "no")


def test_single_images_have_a_table_where_they_were_tried(make: SimpleNamespace):
    tried = BatchInvariance(images=64, batch_size=32, agreement_percent=96.875, max_logit_difference=1.2345)
    table = details.batch_invariance([make.record("a"), make.record("int8", batch_invariance=tried)])
    assert table.rows == (("int8", "64", "32", "96.9", "1.2"),)
    assert not details.batch_invariance([make.record("a")])


def test_calibration_error_stands_beside_what_chance_gives(make: SimpleNamespace):
    record = make.record("a", predictions=make.predictions(wrong=range(10)))
    found = record.accuracy
    shown = cells(details.agreement([record]), "a")
    assert float(shown["calibration error"]) == pytest.approx(found.expected_calibration_error, abs=5e-4)
    assert float(shown["that by chance"]) == pytest.approx(found.calibration_noise, abs=5e-4)
