import builtins
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest

import vitopt.bulk
from vitopt.adaptive.make import at_size, make
from vitopt.adaptive_spec import AdaptiveSpec
from vitopt.bulk import predict_parts
from vitopt.cli.predicting import _parquet
from vitopt.data import shards
from vitopt.data.images import open_images
from vitopt.environment.cluster import _Actor
from vitopt.errors import BadImageError, StorageError, UnsupportedError
from vitopt.models.checkpoint import open_checkpoint
from vitopt.prediction import image_paths, predict
from vitopt.recipe import DataSpec


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


def test_before_the_first_part_no_other_file_is_looked_at_and_its_own_once(
    tiny_checkpoint, shapes, tmp_path, monkeypatch
):
    looked, opened = Counter(), Counter()

    def counting(counter, real):
        return lambda path, *args, **options: counter.update([str(path)]) or real(path, *args, **options)

    monkeypatch.setattr(os, "stat", counting(looked, os.stat))
    monkeypatch.setattr(builtins, "open", counting(opened, open))
    monkeypatch.setattr(vitopt.bulk.storage, "write_bytes", lambda *_: pytest.fail("the first part is done"))
    paths = image_paths([str(shapes / "test")])
    with pytest.raises(pytest.fail.Exception, match="first part"):
        run(tiny_checkpoint, paths, tmp_path / "out")
    for counter in (looked, opened):
        of_images = {path: count for path, count in counter.items() if path.endswith(".png")}
        assert of_images == dict.fromkeys(map(str, paths[:5]), 1)


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


def test_each_part_of_an_adaptive_model_tells_which_pass_answered(tiny_checkpoint, shapes, tmp_path):
    images = open_images(DataSpec(source=str(shapes)), "test")
    second, adaptive = open_checkpoint(str(tiny_checkpoint)), tmp_path / "adaptive"
    first, spec = at_size(second, 16, tmp_path / "small"), AdaptiveSpec(low=16, escalation_rate=0.5)
    make(first, second, spec, adaptive, "cpu", images=images)
    paths = image_paths([str(shapes / "test")])
    with_bad = [*paths, *[tmp_path / f"{number}.png" for number in range(6)]]
    for path in with_bad[len(paths) :]:
        path.write_bytes(b"text")
    run(adaptive, with_bad, tmp_path / "out", skip_bad=True)
    expected = [row["path"] for row in predict(str(adaptive), paths, top=2, batch_size=4)]
    assert {*expected} == {"first", "second"}
    assert [row["path"] for row in rows(tmp_path / "out")] == [*expected, *[None] * 6]
    schemas = {pyarrow.parquet.read_schema(file).to_string() for file in (tmp_path / "out").glob("*.parquet")}
    assert len(schemas) == 1


def test_a_killed_process_leaves_whole_parts_and_the_next_one_goes_on(tiny_checkpoint, shapes, tmp_path):
    paths = image_paths([str(shapes / "test")])
    # The third part kills the process after some bytes of its file: no handler and no `finally` runs.
    program = f"""
import os, signal, sys
from pathlib import Path
import vitopt.bulk
assert not {{"peft", "bitsandbytes"}} & {{*sys.modules}}, "a second of each start"
from vitopt import storage
from vitopt.cli.predicting import _parquet
from vitopt.data import shards
shards.FILES_PER_PART = 5
real, written = os.replace, []
def replace(a, b, **options):
    if str(b).endswith(".parquet"):
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(b)
    return real(a, b, **options)
os.replace = replace
paths = [Path(name) for name in {[str(path) for path in paths]!r}]
output = Path({str(tmp_path / "out")!r})
vitopt.bulk.predict_parts({str(tiny_checkpoint)!r}, paths, output, _parquet, top=2, batch_size=4)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    assert len(rows(tmp_path / "out")) == 10
    done = run(tiny_checkpoint, paths, tmp_path / "out")
    assert (done.stood, done.images) == (2, 14)
    assert [row["image"] for row in rows(tmp_path / "out")] == list(map(str, paths))


@pytest.fixture
def embedded_ray():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_ray_gives_the_same_rows_and_goes_on_where_a_run_ended(tiny_checkpoint, shapes, tmp_path, embedded_ray):
    paths = image_paths([str(shapes / "test")])
    run(tiny_checkpoint, paths, tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "ray")
    for part in sorted((tmp_path / "ray").glob("part-*"))[2:]:
        part.unlink()
    done = run(tiny_checkpoint, paths, tmp_path / "ray", ray=True)
    assert (done.parts, done.stood, done.images) == (5, 2, 14)
    assert rows(tmp_path / "ray") == rows(tmp_path / "alone")
    (tmp_path / "bad.png").write_bytes(b"text")
    with pytest.raises(BadImageError, match=r"bad\.png"):
        run(tiny_checkpoint, [*paths[:3], tmp_path / "bad.png"], tmp_path / "bad", ray=True)


def test_ray_under_a_launch_of_its_own_is_refused(tiny_checkpoint, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(vitopt.environment.cluster.launch, "process_share", lambda: (0, 2))
    monkeypatch.setattr(vitopt.environment.cluster.launch, "wait_for_all", lambda: None)
    with pytest.raises(UnsupportedError, match="accelerate launch"):
        run(tiny_checkpoint, image_paths([str(shapes / "test")]), tmp_path / "out", ray=True)


def test_an_error_at_the_start_of_a_process_is_told_as_it_is():
    def make():
        raise StorageError("not on this machine")

    (answer,) = _Actor(make)({"item": np.array(["a part"])})["answer"]
    assert isinstance(answer, StorageError)


def test_ray_that_is_not_installed_is_named_with_the_remedy(tiny_checkpoint, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(vitopt.environment.cluster.support, "installed", lambda package: package != "ray")
    with pytest.raises(UnsupportedError, match=r"pip install 'vitopt\[ray\]'"):
        run(tiny_checkpoint, image_paths([str(shapes / "test")]), tmp_path / "out", ray=True)
