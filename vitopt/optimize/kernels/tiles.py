"""Which tile a product takes on this device, or that torch was not slower: measured once, kept in the user's cache."""

import contextlib
import hashlib
import json
import logging
import os
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from vitopt import storage
from vitopt.optimize.kernels import product
from vitopt.optimize.kernels.product import Tile

logger = logging.getLogger(__name__)

# Few rows: many small programs; many rows: as much reuse as registers hold. Each tile takes seconds to compile for each
# kind of layer, so only those that differ in kind are tried.
_FEW = (Tile(64, 64, 64, 4, 4), Tile(64, 64, 128, 4, 3), Tile(64, 128, 64, 4, 4))
_MANY = (Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 3))
_MANY_ROWS = 1024
_SPLITS = (1, 2, 4, 8)
_LEAST_STEPS = 4  # iterations of a split
_ROUNDS = 5
_ROUND_MS = 2.0
_MUST_WIN = 0.97  # of torch's time; less is noise


def candidates(rows: int, columns: int, depth: int, itemsize: int, processors: int) -> list[Tile]:
    """Tiles to try for a product of (rows, depth) with (depth, columns) on so many multiprocessors.

    What would leave most of them without a program is also split by depth.
    """
    found = []
    for tile in _MANY if rows >= _MANY_ROWS else _FEW:
        tile = tile._replace(depth=tile.depth * 2 // itemsize)  # as many bytes in shared memory
        programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        for splits in _SPLITS:
            useful = programs * splits <= 2 * processors and depth >= splits * tile.depth * _LEAST_STEPS
            if splits == 1 or useful:
                found.append(tile._replace(splits=splits))
    return found


def fastest(
    key: str, device: torch.device, tiles: Sequence[Tile], ours: Callable[[Tile], object], torchs: Callable[[], object]
) -> Tile | None:
    """The fastest of `tiles`, or None where `torchs` call is not slower; from the cache where it holds the `key`.

    A tile that does not compile, or takes more shared memory than there is, is passed over.
    """
    file = cache_file(device)
    known = _read(file)
    if key not in known:
        known[key] = _measured(key, device, tiles, ours, torchs)
        with contextlib.suppress(OSError):  # a home that cannot be written: measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            storage.write_json(file, _read(file) | {key: known[key]})
    found = known[key]
    return None if found is None else Tile(*found)


def cache_file(device: torch.device) -> Path:
    """Where choices are kept that were made on this device with these versions and kernels."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitopt"
    code = hashlib.sha256(Path(product.__file__).read_bytes()).hexdigest()[:8]
    parts = (torch.cuda.get_device_name(device), f"torch {torch.__version__}", f"triton {triton.__version__}", code)
    return folder / f"tiles-{'-'.join(re.sub(r'[^0-9A-Za-z.]+', '-', part) for part in parts)}.json"


def _read(file: Path) -> dict[str, list[int] | None]:
    """What is kept there; nothing where a file is missing or is not what this writes."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {key: None if tile is None else list(Tile(*map(int, tile))) for key, tile in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _measured(
    key: str, device: torch.device, tiles: Sequence[Tile], ours: Callable[[Tile], object], torchs: Callable[[], object]
) -> list[int] | None:
    stream = torch.cuda.Stream(device)  # one for all: cuBLAS keeps a workspace for each that it meets
    times: dict[Tile, float] = {}
    for tile in tiles:
        try:
            times[tile] = milliseconds(lambda tile=tile: ours(tile), stream)  # type: ignore[misc]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers raise whatever they run into
            logger.info("%s: %s cannot run (%s)", key, tile, " ".join(str(error).split())[:200])
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    turns = [(milliseconds(lambda: ours(best), stream), milliseconds(torchs, stream)) for _ in range(3)]
    mine, other = (statistics.median(column) for column in zip(*turns, strict=True))
    logger.info("%s: %s takes %.4f ms, torch %.4f ms", key, best, mine, other)
    return list(best) if mine < _MUST_WIN * other else None


def milliseconds(call: Callable[[], object], stream: torch.cuda.Stream) -> float:
    """The device's time of a `call` that is replayed as a CUDA graph, as it will be: no Python between its kernels."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        call()
    with torch.cuda.stream(stream):
        once = _replays(graph, stream, 1)
        times = max(1, min(200, int(_ROUND_MS / max(once, 1e-3))))
        return statistics.median(_replays(graph, stream, times) for _ in range(_ROUNDS))


def _replays(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, times: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record(stream)
    for _ in range(times):
        graph.replay()
    end.record(stream)
    end.synchronize()
    return begin.elapsed_time(end) / times
