"""`vitopt predict`: where names come from, and the files that it writes."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
from commands import done, printed, refusal
from typer.testing import CliRunner

from vitopt.cli import app


@pytest.fixture
def photos(shapes: Path, copy_of: Callable[[Path], Path]) -> Path:
    return copy_of(shapes / "test" / "cross")


def test_it_prints_classes_per_image(tiny_checkpoint: Path, shapes: Path) -> None:
    images = [shapes / "test" / "cross" / "00.png", shapes / "test" / "circle" / "00.png"]
    predictions = printed("predict", tiny_checkpoint, *images, "--top", 2)
    assert [one["image"] for one in predictions] == [str(path) for path in images]
    for one in predictions:
        first, second = one["classes"]
        assert first["percent"] >= second["percent"] and first["label"] in ("circle", "cross", "square", "stripe")


def test_names_come_from_standard_input_too(tiny_checkpoint: Path, photos: Path) -> None:
    names = "".join(f"{path}\n" for path in sorted(photos.iterdir())[1:3])
    first = photos / "00.png"
    result = CliRunner().invoke(app, ["predict", str(tiny_checkpoint), str(first), "-", "--json"], input=names)
    assert [one["image"] for one in json.loads(result.stdout)] == [str(first), *names.split()]


def _of_csv(file: Path) -> tuple[list, ...]:
    rows = list(csv.DictReader(file.open()))
    labels = [[row[f"label_{rank}"] for rank in (1, 2) if row[f"label_{rank}"]] for row in rows]
    percents = [[float(row[f"percent_{rank}"]) for rank in (1, 2) if row[f"percent_{rank}"]] for row in rows]
    return [row["image"] for row in rows], labels, percents, [row["error"] for row in rows]


def _of_json(rows: list) -> tuple[list, ...]:
    labels = [[c["label"] for c in row["classes"]] for row in rows]
    percents = [[c["percent"] for c in row["classes"]] for row in rows]
    return [row["image"] for row in rows], labels, percents, [row.get("error") for row in rows]


def _of_parquet(file: Path) -> tuple[list, ...]:
    columns = pyarrow.parquet.read_table(file).to_pydict()
    return columns["image"], columns["labels"], columns["percents"], columns["error"]


READERS: dict[str, Callable[[Path], tuple[list, ...]]] = {
    ".csv": _of_csv,
    ".json": lambda file: _of_json(json.loads(file.read_text())),
    ".jsonl": lambda file: _of_json([json.loads(line) for line in file.read_text().splitlines()]),
    ".parquet": _of_parquet,
}


@pytest.mark.parametrize("ending", READERS)
def test_files_hold_what_is_printed(tiny_checkpoint: Path, photos: Path, tmp_path: Path, ending: str) -> None:
    (photos / "01.png").write_text("text")
    output = tmp_path / f"classes{ending}"
    options = ["--top", 2, "--skip-bad-images", "--batch-size", 3]
    expected = printed("predict", tiny_checkpoint, photos, *options)
    told = done("predict", tiny_checkpoint, photos, *options, "--output", output)
    assert told.stdout == ""
    assert str(photos / "01.png") in told.stderr and f"{len(expected) - 1} of {len(expected)} images" in told.stderr
    images, labels, percents, errors = READERS[ending](output)
    assert images == [one["image"] for one in expected]
    assert labels == [[c["label"] for c in one["classes"]] for one in expected]
    assert [bool(error) for error in errors] == ["error" in one for one in expected]
    for got, one in zip(percents, expected, strict=True):
        assert got == pytest.approx([c["percent"] for c in one["classes"]], abs=1e-3)


def test_a_name_is_no_formula(
    tiny_checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "00.png").rename(photos / "=HYPERLINK(1).png")
    monkeypatch.chdir(photos)
    done("predict", tiny_checkpoint, "=HYPERLINK(1).png", "--output", tmp_path / "classes.csv")
    assert "\n'=HYPERLINK(1).png," in (tmp_path / "classes.csv").read_text()


def test_refusals(tiny_checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.csv"
    there.write_text("mine")
    assert "choose another" in refusal("predict", tiny_checkpoint, photos, "--output", there)
    assert there.read_text() == "mine"
    assert ".parquet" in refusal("predict", tiny_checkpoint, photos, "--output", tmp_path / "a.xls")
    assert "folder as --output" in refusal("predict", tiny_checkpoint, photos, "--ray")
    assert "no image at" in refusal("predict", tiny_checkpoint, tmp_path / "no.png")
