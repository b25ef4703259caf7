"""Which tiles are tried and kept, with times that are told instead of taken."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from vitopt.optimize.kernels import tiles
from vitopt.optimize.kernels.product import Tile

CUDA = torch.device("cuda", 0)
A, B, C = Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 64, 64, 4, 4, splits=2)


class Clock:
    """Stands for the device: a call's time is what `times` says of what it names."""

    def __init__(self, times: dict[object, float]):
        self.times, self.calls = times, 0

    def milliseconds(self, call: object, stream: object) -> float:
        self.calls += 1
        named = call()  # type: ignore[operator]
        if named not in self.times:
            raise RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448")
        return self.times[named]


def choose(clock: Clock, monkeypatch: pytest.MonkeyPatch, key: str = "k") -> Tile | None:
    monkeypatch.setattr(tiles, "milliseconds", clock.milliseconds)
    return tiles.fastest(key, CUDA, (A, B, C), lambda tile: tile, lambda: "torch")


@pytest.fixture(autouse=True)
def _device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200/x")


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({A: 3.0, B: 2.0, C: 2.5, "torch": 4.0}, B),
        ({A: 3.0, C: 2.5, "torch": 4.0}, C),  # B does not compile
        ({A: 3.0, B: 2.0, C: 2.5, "torch": 1.9}, None),
        ({A: 2.0, B: 2.0, C: 2.0, "torch": 2.02}, None),  # as fast is not faster
        ({"torch": 4.0}, None),
    ],
)
def test_the_fastest_tile_is_taken_if_it_beats_torch(
    times: dict[object, float], chosen: Tile | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(Clock(times), monkeypatch) == chosen


def test_a_choice_is_made_once_for_a_device_and_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Clock({A: 1.0, B: 2.0, C: 2.0, "torch": 4.0})
    assert choose(first, monkeypatch) == A and first.calls > 0
    later = Clock({A: 9.0, B: 1.0, C: 9.0, "torch": 4.0})
    assert choose(later, monkeypatch) == A and later.calls == 0
    assert choose(later, monkeypatch, key="other") == B
    assert set(json.loads(tiles.cache_file(CUDA).read_text())) == {"k", "other"}
    assert "/" not in tiles.cache_file(CUDA).name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert choose(later, monkeypatch) == B


def test_torchs_win_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(Clock({A: 1.0, B: 1.0, C: 1.0, "torch": 0.5}), monkeypatch) is None
    later = Clock({})
    assert choose(later, monkeypatch) is None and later.calls == 0


@pytest.mark.parametrize("content", ["", "[]", '{"k": [1]}', '{"k": "fast"}', "null"])
def test_a_cache_that_is_not_ours_is_measured_anew(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiles.cache_file(CUDA)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert choose(Clock({A: 1.0, B: 2.0, C: 2.0, "torch": 4.0}), monkeypatch) == A
    assert json.loads(file.read_text()) == {"k": list(A)}


def test_a_home_that_cannot_be_written_costs_the_measuring_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose(Clock({A: 1.0, B: 2.0, C: 2.0, "torch": 4.0}), monkeypatch) == A


def test_memory_that_runs_out_is_no_slow_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(call: object, stream: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiles, "milliseconds", full)
    with pytest.raises(torch.OutOfMemoryError):
        tiles.fastest("k", CUDA, (A,), lambda tile: tile, lambda: "torch")


@pytest.mark.parametrize(("columns", "depth"), [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096), (192, 192)])
@pytest.mark.parametrize("rows", [1, 197, 64 * 197])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_the_device_and_few_rows_get_programs_for_all_of_it(
    rows: int, columns: int, depth: int, itemsize: int
) -> None:
    found = tiles.candidates(rows, columns, depth, itemsize, processors=132)
    assert len(found) == len(set(found)) and 2 <= len(found) <= 12
    for tile in found:
        # A product waits for its buffers: an H200 has 227 KB for one program.
        assert tile.stages * (tile.rows + tile.columns) * tile.depth * itemsize <= 232_448
        assert tile.depth * itemsize >= 128 and tile.rows * tile.columns // (32 * tile.warps) <= 128
        assert tile.splits == 1 or depth // tile.splits >= 4 * tile.depth
    programs = [-(-rows // tile.rows) * -(-columns // tile.columns) * tile.splits for tile in found]
    if rows == 197 and depth >= 1024 and itemsize == 2:
        assert max(programs) >= 128
    assert rows < 1024 or all(tile.splits == 1 for tile in found)
