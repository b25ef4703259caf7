"""Each part of a request is timed as its own."""

import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vitopt.measure import end_to_end
from vitopt.measure.end_to_end import time_end_to_end


class SlowImages:
    """Two images that take a fixed time to decode."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 2

    def image(self, index: int, smallest_side: int | None = None) -> Image.Image:
        self.asked.append(index)
        time.sleep(0.004)
        return Image.new("RGB", (4, 4))


def preprocess(image: Image.Image) -> torch.Tensor:
    time.sleep(0.002)
    return torch.zeros(3, 4, 4)


class SlowModel:
    device = torch.device("cpu")
    preprocess = staticmethod(preprocess)

    def __init__(self, name: str = "slow", fails_at: int | None = None, log: list[str] | None = None) -> None:
        self.name = name
        self.batches: list[int] = []
        self.fails_at = fails_at
        self.log = [] if log is None else log

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.log.append(self.name)
        if len(self.batches) == self.fails_at:
            raise RuntimeError("no kernel")
        self.batches.append(len(pixels))
        time.sleep(0.008)
        return torch.zeros(len(pixels), 5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_parts_and_total(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "TURNS", 2)
    images, model = SlowImages(), SlowModel()
    rows, failures = time_end_to_end([model], images, batch_size)
    row = rows["slow"]
    assert failures == {} and row.iterations == 6
    assert model.batches == [batch_size] * 8  # the first of each turn is not counted
    assert images.asked == [index % 2 for index in range(8 * batch_size)]
    # Sleeping never takes less than asked for.
    assert row.decode_ms >= 4 * batch_size
    assert row.preprocess_ms >= 2 * batch_size
    assert row.model_ms >= 8
    assert row.copy_ms < row.decode_ms
    parts = row.decode_ms + row.preprocess_ms + row.copy_ms + row.model_ms + row.postprocess_ms
    assert row.images_per_second == pytest.approx(1000 * batch_size / parts, rel=1e-6)
    assert row.total_p95_ms is None


def test_variants_take_turns_over_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "TURNS", 2)
    images, log = SlowImages(), []
    time_end_to_end([SlowModel("a", log=log), SlowModel("b", log=log)], images, 1)
    assert "".join(log) == "aaaabbbb" + "bbbbaaaa"
    assert images.asked == [0, 1, 0, 1] * 4


def test_a_variant_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "TURNS", 2)
    rows, failures = time_end_to_end([SlowModel("a", fails_at=5), SlowModel("b")], SlowImages(), 1)
    assert failures == {"a": "RuntimeError: no kernel"}
    assert list(rows) == ["b"] and rows["b"].iterations == 6


def test_is_bounded_in_time_but_not_below_three_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "SECONDS", 0.0)
    rows, _ = time_end_to_end([SlowModel()], SlowImages(), 1)
    assert rows["slow"].iterations == 3


def test_first_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(end_to_end, "TURNS", 1)
    clock = iter([0.0, *[0, 50, 50, 50, 50, 50], *[0, 1, 2, 3, 4, 5] * 3, 0])
    monkeypatch.setattr(end_to_end, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    rows, _ = time_end_to_end([SlowModel()], SlowImages(), 1)
    assert (rows["slow"].decode_ms, rows["slow"].total_p50_ms) == (1000, 5000)
