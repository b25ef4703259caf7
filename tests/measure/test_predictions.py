"""Predictions on disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitopt.errors import RecordError
from vitopt.measure.predictions import PREDICTIONS_FILE, Predictions, load_predictions, save_predictions


def some(images: int = 7, classes: int = 3) -> Predictions:
    rng = np.random.default_rng(0)
    return Predictions(
        ids=tuple(f"a/größe {index}.png" for index in range(images)),
        image_sha256=tuple(f"{index:064x}" for index in range(images)),
        labels=rng.integers(0, classes, images),
        logits=rng.standard_normal((images, classes), dtype=np.float32) * 1e3,
    )


@pytest.mark.parametrize(("images", "classes"), [(7, 3), (1, 2), (500, 1000)])
def test_what_is_saved_is_read_back_to_the_bit(tmp_path: Path, images: int, classes: int) -> None:
    saved = some(images, classes)
    save_predictions(saved, tmp_path / "new" / "folder")
    got = load_predictions(tmp_path / "new" / "folder")
    assert (got.ids, got.image_sha256) == (saved.ids, saved.image_sha256)
    np.testing.assert_array_equal(got.labels, saved.labels)
    np.testing.assert_array_equal(got.logits, saved.logits)
    assert (got.labels.dtype, got.logits.dtype) == (np.int64, np.float32)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [PREDICTIONS_FILE]


def test_groups_are_read_back_where_there_are_any(tmp_path: Path) -> None:
    plain = Predictions(("a", "b"), ("x", "y"), np.array([0, 1]), np.zeros((2, 3), np.float32))
    save_predictions(plain, tmp_path)
    assert load_predictions(tmp_path).groups is None
    save_predictions(replace(plain, groups=("v1", "v2")), tmp_path)
    assert load_predictions(tmp_path).groups == ("v1", "v2")


def test_the_file_is_a_plain_table_for_others(tmp_path: Path) -> None:
    saved = some()
    save_predictions(saved, tmp_path)
    table = pq.read_table(tmp_path / PREDICTIONS_FILE)
    assert table.column_names == ["image", "image_sha256", "label", "logits"]
    assert table["logits"][2].as_py() == saved.logits[2].tolist()


def test_the_class_is_the_highest_logit_and_the_lower_index_on_ties() -> None:
    logits = np.array([[1, 3, 2], [5, 5, 0], [0, -1, 0], [-2, -1, -1]], np.float32)
    predictions = Predictions(("a", "b", "c", "d"), ("",) * 4, np.array([1, 1, 0, 2]), logits)
    assert predictions.classes.tolist() == [1, 0, 0, 1]
    assert predictions.correct.tolist() == [True, False, True, False]


def test_missing_predictions_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"no predictions at .*predictions.parquet: evaluate with --output to keep"):
        load_predictions(tmp_path)


def write_text(path: Path) -> None:
    path.write_text("image,label\n")


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    save_predictions(some(), path.parent)
    path.write_bytes(path.read_bytes()[:-40])


def without_logits(path: Path) -> None:
    pq.write_table(pa.table({"image": ["a"], "image_sha256": ["b"], "label": [0]}), path)


def with_scalar_logits(path: Path) -> None:
    pq.write_table(pa.table({"image": ["a"], "image_sha256": ["b"], "label": [0], "logits": [0.5]}), path)


def with_ragged_logits(path: Path) -> None:
    columns = {"image": ["a", "b"], "image_sha256": ["a", "b"], "label": [0, 1], "logits": [[0.5], [1.0, 2.0]]}
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    "write", [write_text, write_nothing, cut_short, without_logits, with_scalar_logits, with_ragged_logits]
)
def test_a_broken_file_is_named(tmp_path: Path, write: object) -> None:
    write(tmp_path / PREDICTIONS_FILE)
    with pytest.raises(RecordError, match=r"predictions\.parquet cannot be read as predictions: "):
        load_predictions(tmp_path)


def test_sets_of_labels_and_embeddings_are_read_back(tmp_path: Path) -> None:
    saved = replace(some(5, 3), labels=np.eye(5, 3, dtype=np.int64), outputs="labels")
    save_predictions(saved, tmp_path)
    got = load_predictions(tmp_path)
    np.testing.assert_array_equal(got.labels, saved.labels)
    assert got.outputs == "labels" and got.labels.dtype == np.int64 and "several labels" in (got.why_no_classes or "")
    save_predictions(replace(some(), outputs="embedding"), tmp_path)
    assert "embeddings" in (load_predictions(tmp_path).why_no_classes or "")
    assert some().why_no_classes is None
