"""Time from image file to class, part by part: the model is often not what a caller waits for.

Servers have been measured to spend up to 56 % of a request on preprocessing (see docs/design.md).
"""

import itertools
import time
from collections.abc import Sequence

import torch

from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor
from vitopt.measure import statistics
from vitopt.measure.subject import Subject
from vitopt.records import EndToEnd

_MOST_CALLS = 30
_FEWEST_CALLS = 3
_SECONDS = 5.0


def time_end_to_end(subject: Subject, images: ImageSet, preprocess: Preprocessor, batch_size: int) -> EndToEnd:
    """Mean milliseconds per call of each part, one after another as a simple server does them.

    Images are taken in turn from `images`, all of which must be decodable.
    """
    turn = itertools.cycle(range(len(images)))
    started = time.perf_counter()
    calls: list[list[float]] = []
    # The first call warms caches and compiles shapes, so it is made and not counted.
    while len(calls) <= _MOST_CALLS:
        calls.append(_one_call(subject, images, preprocess, [next(turn) for _ in range(batch_size)]))
        if len(calls) > _FEWEST_CALLS and time.perf_counter() - started > _SECONDS:
            break
    return _summary(batch_size, calls[1:])


def _one_call(subject: Subject, images: ImageSet, preprocess: Preprocessor, indices: Sequence[int]) -> list[float]:
    """Milliseconds of decode, preprocess, copy, model, postprocess."""
    marks = [time.perf_counter()]

    def mark() -> None:
        if subject.device.type == "cuda":
            torch.cuda.synchronize(subject.device)
        marks.append(time.perf_counter())

    decoded = [images.image(index) for index in indices]
    mark()
    pixels = torch.stack([preprocess(image) for image in decoded])
    mark()
    on_device = pixels.to(subject.device)
    mark()
    logits = subject(on_device)
    mark()
    _answer(logits)
    mark()
    return [1000 * (after - before) for before, after in itertools.pairwise(marks)]


def _answer(logits: torch.Tensor) -> list[tuple[int, float]]:
    best = logits.float().softmax(-1).max(-1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _summary(batch_size: int, calls: Sequence[Sequence[float]]) -> EndToEnd:
    total = statistics.latency_summary([sum(call) for call in calls])
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
