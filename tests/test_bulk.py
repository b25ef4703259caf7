import pyarrow.parquet
import pytest

import vitopt.bulk
from vitopt.bulk import predict_parts
from vitopt.cli.predicting import _parquet
from vitopt.data import shards
from vitopt.errors import BadImageError, StorageError
from vitopt.prediction import image_paths, predict


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(shards, "FILES_PER_PART", 5)


def run(checkpoint, paths, output, **options):
    return predict_parts(str(checkpoint), paths, output, _parquet, **{"top": 2, "batch_size": 4} | options)


def rows(output):
    tables = [pyarrow.parquet.read_table(file).to_pylist() for file in sorted(output.glob("part-*.parquet"))]
    return [row for table in tables for row in table]


def test_the_parts_hold_what_predict_gives_in_its_order(tiny_checkpoint, shapes, tmp_path):
    paths = image_paths([str(shapes / "test")])
    done = run(tiny_checkpoint, paths, tmp_path / "out")
    expected = list(predict(str(tiny_checkpoint), paths, top=2, batch_size=4))
    found = rows(tmp_path / "out")
    assert (done.parts, done.stood, done.images, done.left_out) == (5, 0, 24, 0)
    assert [row["image"] for row in found] == [row["image"] for row in expected]
    assert [row["labels"] for row in found] == [[one["label"] for one in row["classes"]] for row in expected]


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_a_run_that_was_ended_goes_on_without_a_lost_or_doubled_row(
    tiny_checkpoint, shapes, tmp_path, monkeypatch, stop_after
):
    paths, written = image_paths([str(shapes / "test")]), []
    real = vitopt.bulk.storage.write_bytes

    def ending(path, content):
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(vitopt.bulk.storage, "write_bytes", ending)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_checkpoint, paths, tmp_path / "out")
    done = run(tiny_checkpoint, paths, tmp_path / "out")
    assert (done.stood, done.parts) == (stop_after, 5)
    assert [row["image"] for row in rows(tmp_path / "out")] == list(map(str, paths))
    assert run(tiny_checkpoint, paths, tmp_path / "out").stood == 5


def test_predictions_of_something_else_are_not_mixed_in(tiny_checkpoint, shapes, tmp_path):
    paths = image_paths([str(shapes / "test")])
    run(tiny_checkpoint, paths[:5], tmp_path / "out")
    before = rows(tmp_path / "out")
    for changed in ({"paths": paths[1:6]}, {"top": 1}):
        with pytest.raises(StorageError, match="another --output"):
            run(tiny_checkpoint, changed.get("paths", paths[:5]), tmp_path / "out", top=changed.get("top", 2))
    assert rows(tmp_path / "out") == before


def test_more_files_than_before_keep_full_parts_and_say_so_of_the_rest(tiny_checkpoint, shapes, tmp_path):
    paths = image_paths([str(shapes / "test")])
    run(tiny_checkpoint, paths[:10], tmp_path / "out")
    assert run(tiny_checkpoint, paths, tmp_path / "out").stood == 2


def test_an_image_that_cannot_be_decoded_ends_the_run_or_is_a_row_with_the_reason(tiny_checkpoint, shapes, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"text")
    paths = [*image_paths([str(shapes / "test" / "circle")]), bad]
    with pytest.raises(BadImageError, match=r"bad\.png"):
        run(tiny_checkpoint, paths, tmp_path / "strict")
    done = run(tiny_checkpoint, paths, tmp_path / "out", skip_bad=True)
    assert (done.images, done.left_out) == (6, 1)
    found = {row["image"]: row["error"] for row in rows(tmp_path / "out")}
    assert "bad.png" in found[str(bad)] and sum(reason is not None for reason in found.values()) == 1
