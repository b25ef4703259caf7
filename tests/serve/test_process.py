"""What the process of a model does, done in this one."""

import numpy as np
import pytest
from commands import done

from vitopt.adaptive.passes import Passes
from vitopt.data.images import image_files
from vitopt.errors import UnsupportedError
from vitopt.prediction import predict
from vitopt.serve import process
from vitopt.serve.process import Loading, Slots, _call, _load


def test_a_batch_of_an_adaptive_model_tells_paths_and_is_not_filled_up(tiny_checkpoint, shapes, tmp_path, monkeypatch):
    folder, photos = tmp_path / "adaptive", sorted((shapes / "test").rglob("*.png"))[::4]
    arguments = ("--data", shapes, "--low", 16, "--escalation-rate", 0.5)
    done("adaptive", "calibrate", tiny_checkpoint, *arguments, "--output", folder)
    runnable, ready = _load(Loading(str(folder), {}, "cpu", (1, 8)))
    assert sorted(ready.seconds) == [1, 8] and not ready.fixed_shapes
    assert ready.record["routing"]["proxy"] and ready.record["variant"]["name"] == str(folder)
    images = image_files(photos)
    pixels = np.stack([runnable.preprocess(images.image(i)).numpy() for i in range(len(photos))])
    sizes, first_logits = [], Passes.first_logits
    monkeypatch.setattr(Passes, "first_logits", lambda of, batch: sizes.append(len(batch)) or first_logits(of, batch))
    answers = _call(runnable, pixels, 8)
    assert sizes == [len(photos)]
    expected = list(predict(str(folder), photos, top=1))
    assert answers.paths == [one["path"] for one in expected] and set(answers.paths) == {"first", "second"}
    assert answers.logits.argmax(1).tolist() == [one["classes"][0]["index"] for one in expected]


@pytest.mark.parametrize("fixed", [False, True])
def test_only_fixed_shapes_are_filled_up(fixed):
    class Double:
        device, fixed_shapes = "cpu", fixed

        def __call__(self, pixels):
            sizes.append(len(pixels))
            return 2 * pixels[:, :, 0, 0]

    sizes, pixels = [], np.arange(3 * 3 * 4, dtype="float32").reshape(3, 3, 2, 2)
    answers = _call(Double(), pixels, 4)
    assert np.array_equal(answers.logits, 2 * pixels[:, :, 0, 0]) and answers.paths is None
    assert sizes == [4 if fixed else 3]


def test_a_queue_that_shared_memory_cannot_hold_is_refused_before_a_process_dies_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_SHARED", tmp_path)
    monkeypatch.setattr(process.shutil, "disk_usage", lambda _: process.shutil._ntuple_diskusage(10**8, 0, 10**6))
    with pytest.raises(UnsupportedError, match="--queue 100 takes 60 MB"):
        Slots(100, (224, 224))
    Slots(1, (224, 224)).close()
