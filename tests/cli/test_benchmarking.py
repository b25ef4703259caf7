"""Formats and ways to run of one checkpoint, timed in one call."""

import csv
from pathlib import Path

import pytest
from commands import done, printed, refusal, vitopt

from vitopt import inference
from vitopt.errors import UnsupportedError
from vitopt.records import load_record

QUICK = ["--iterations", "2", "--rounds", "1", "--device", "cpu"]


def test_formats_and_ways_to_run_of_one_checkpoint_are_rows(tiny_checkpoint: Path, tmp_path: Path) -> None:
    table, output = tmp_path / "rows.csv", tmp_path / "out"
    records = printed(
        "benchmark", tiny_checkpoint, "--format", "fp32,nf4", "--run", "eager,fuse-qkv+channels_last",
        "--batch-size", "1,2", *QUICK, "--csv", table, "--output", output,
    )  # fmt: skip
    names = [record["variant"]["name"] for record in records]
    assert names == [
        "tiny-vit fp32 eager", "tiny-vit fp32 fuse-qkv channels_last",
        "tiny-vit nf4 eager", "tiny-vit nf4 fuse-qkv channels_last",
    ]  # fmt: skip
    assert [record["variant"]["format"] for record in records] == ["fp32", "fp32", "nf4", "nf4"]
    assert [record["variant"]["ran"]["channels_last"] for record in records] == [False, True] * 2
    assert records[1]["variant"]["ran"]["fuse_qkv"] and "fuse_qkv" in records[3]["variant"]["reasons"]
    assert {record["model"]["source"] for record in records} == {str(tiny_checkpoint)}
    assert records[2]["size"]["weight_bytes"] < records[0]["size"]["weight_bytes"]
    assert load_record(output / "variants" / "tiny-vit+nf4+eager").to_json() == records[2]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["batch_size"]) for row in rows] == [(name, size) for name in names for size in "12"]
    for row, (record, place) in zip(rows, [(record, place) for record in records for place in (0, 1)], strict=True):
        timed = record["latency"][place]
        assert float(row["p50_ms"]) == timed["p50_ms"]
        assert row["p50_ci95_low_ms"] == str(timed["p50_ci95_ms"][0] or "")
        assert int(row["weight_bytes"]) == record["size"]["weight_bytes"]
        assert row["checkpoint"] == str(tiny_checkpoint) and row["format"] == record["variant"]["format"]
    assert "samples_ms" not in rows[0]


def test_a_table_for_each_batch_size_names_every_row(tiny_checkpoint: Path) -> None:
    said = done("benchmark", tiny_checkpoint, "--run", "eager,channels_last", "--batch-size", "1,2", *QUICK).stdout
    for size in (1, 2):
        assert f"batch size {size}" in said
    assert said.count("tiny-vit eager ") == said.count("tiny-vit channels_last ") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "fp23"], ["fp23", "fp32"]),
        (["--format", "fp8"], ["fp8", "CUDA", "w8a8"]),
        (["--run", "eager,compil"], ["compil", "compile"]),
        (["--run", "eager", "--compile"], ["--compile", "--run"]),
        (["--run", "autotune"], ["autotune", "compile"]),
        (["--format", "nf4", "--run", "engine=aoti"], ["aoti", "nf4", "w8a8"]),
        (["--format", "fp32", "--engine", "openvino", "--static-scales"], ["fp32", "static_scales"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: list[str], words: list[str], tiny_checkpoint: Path) -> None:
    text = refusal("benchmark", tiny_checkpoint, *options, *QUICK)
    assert all(word in text for word in words), text


def test_results_are_not_written_over_a_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("mine")
    assert "mine.csv exists already" in refusal("benchmark", tiny_checkpoint, "--csv", tmp_path / "mine.csv", *QUICK)
    assert (tmp_path / "mine.csv").read_text() == "mine"


def test_a_row_that_fails_tells_why_in_the_csv(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = inference.make

    def fails(checkpoint, variant, *rest, **options):
        if variant.format == "bf16":
            raise UnsupportedError("no bf16 today")
        return make(checkpoint, variant, *rest, **options)

    monkeypatch.setattr(inference, "make", fails)
    result = vitopt("benchmark", tiny_checkpoint, "--format", "fp32,bf16", *QUICK, "--csv", tmp_path / "rows.csv")
    assert result.exit_code == 1 and "tiny-vit bf16 failed: no bf16 today" in result.stderr
    with (tmp_path / "rows.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["failure"] == "" and float(first["p50_ms"]) > 0
    assert (second["variant"], second["failure"], second["p50_ms"]) == ("tiny-vit bf16", "no bf16 today", "")
