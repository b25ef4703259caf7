"""Time from image file to class, part by part: the model is often not what a caller waits for.

Servers have been measured to spend up to 56 % of a request on preprocessing (see docs/design.md). As for latency,
variants take turns, so that a drifting machine slows all alike, and the first call after a switch is not counted.
"""

import itertools
import time
from collections.abc import Sequence

import torch

from vitopt.data.images import ImageSet
from vitopt.data.pixels import smallest_side
from vitopt.measure.failures import attempt
from vitopt.measure.latency import balanced_orders
from vitopt.measure.latency_statistics import latency_summary
from vitopt.measure.runnable import Runnable
from vitopt.records import EndToEnd

TURNS = 10
CALLS_A_TURN = 3
SECONDS = 5.0  # for each variant


def time_end_to_end(
    runnables: Sequence[Runnable], images: ImageSet, batch_size: int
) -> tuple[dict[str, EndToEnd], dict[str, str]]:
    """Mean milliseconds per call of each part, one after another as a simple server does them.

    Images, all of which must be decodable, are taken in turn from `images`, the same for each runnable. Returns
    rows by name, and by name the reason of those that failed.
    """
    by_name = {runnable.name: runnable for runnable in runnables}
    calls: dict[str, list[list[float]]] = {name: [] for name in by_name}
    failures: dict[str, str] = {}
    started = time.perf_counter()
    for number in range(TURNS):
        orders = balanced_orders([name for name in by_name if name not in failures])
        for name in orders[number % len(orders)]:
            made = attempt(name, lambda: _one_turn(by_name[name], images, batch_size, number), failures)  # noqa: B023
            calls[name] += made or []
        if time.perf_counter() - started > SECONDS * len(by_name):
            break
    return {name: _summary(batch_size, calls[name]) for name in by_name if name not in failures}, failures


def _one_turn(runnable: Runnable, images: ImageSet, batch_size: int, number: int) -> list[list[float]]:
    """The counted calls of one turn; the one before them warms caches and, in the first turn, compiles shapes."""
    first = number * (1 + CALLS_A_TURN) * batch_size
    turn = itertools.islice(itertools.cycle(range(len(images))), first % len(images), None)
    made = [_one_call(runnable, images, list(itertools.islice(turn, batch_size))) for _ in range(1 + CALLS_A_TURN)]
    return made[1:]


def _one_call(runnable: Runnable, images: ImageSet, indices: Sequence[int]) -> list[float]:
    """Milliseconds of decode, preprocess, copy, model, postprocess."""
    marks = [time.perf_counter()]

    def mark() -> None:
        if runnable.device.type == "cuda":
            torch.cuda.synchronize(runnable.device)
        marks.append(time.perf_counter())

    side = smallest_side(runnable.preprocess)
    decoded = [images.image(index, smallest_side=side) for index in indices]
    mark()
    pixels = torch.stack([runnable.preprocess(image) for image in decoded])
    mark()
    on_device = pixels.to(runnable.device)
    mark()
    logits = runnable(on_device)
    mark()
    _answer(logits)
    mark()
    return [1000 * (after - before) for before, after in itertools.pairwise(marks)]


def _answer(logits: torch.Tensor) -> list[tuple[int, float]]:
    best = logits.float().softmax(-1).max(-1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _summary(batch_size: int, calls: Sequence[Sequence[float]]) -> EndToEnd:
    total = latency_summary([sum(call) for call in calls])
    decode, preprocess, copy, model, postprocess = (sum(part) / len(calls) for part in zip(*calls, strict=True))
    return EndToEnd(
        batch_size=batch_size,
        iterations=total.count,
        decode_ms=decode,
        preprocess_ms=preprocess,
        copy_ms=copy,
        model_ms=model,
        postprocess_ms=postprocess,
        total_p50_ms=total.p50_ms,
        total_p95_ms=total.p95_ms,
        images_per_second=1000 * batch_size / total.mean_ms,
    )
