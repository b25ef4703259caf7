"""Whether a variant gives an image the same answer alone as among other images.

LLM.int8 finds its outlier columns over the whole batch, so an image's neighbours can change its class.
"""

import time
from collections.abc import Sequence

import numpy as np

from vitopt.data.images import ImageSet
from vitopt.errors import MeasurementError
from vitopt.measure.accuracy import padded_call
from vitopt.measure.predictions import Predictions
from vitopt.measure.runnable import Runnable, fixed_shapes
from vitopt.records import BatchInvariance

_MOST_IMAGES = 64
_FEWEST_IMAGES = 8
_SECONDS = 10.0


def batch_invariance(
    runnable: Runnable,
    images: ImageSet,
    predictions: Predictions,
    batch_size: int,
    timed_at: Sequence[int],
) -> BatchInvariance:
    """Compare `predictions`, made over `images` in batches of `batch_size`, with those of single images.

    One of fixed shapes that was not `timed_at` a batch of one is not built for it: there a batch is filled up
    with copies of the image, which leaves it without other neighbours all the same.

    Raises:
        MeasurementError: the batches held one image, or calls are too slow to make enough of them.
    """
    if min(batch_size, len(images)) == 1:
        raise MeasurementError("accuracy ran one image at a time")
    alone = batch_size if fixed_shapes(runnable) and 1 not in timed_at else 1
    # Folders are sorted by class: these are spread over all of them.
    chosen = np.unique(np.linspace(0, len(images) - 1, _MOST_IMAGES).round().astype(int)).tolist()
    logits: list[np.ndarray] = []
    started = time.perf_counter()
    # In an order that covers the data set wherever the time runs out.
    order = [index for start in range(_FEWEST_IMAGES) for index in chosen[start::_FEWEST_IMAGES]]
    for index in order:
        pixels = runnable.preprocess(images.image(index)).unsqueeze(0).to(runnable.device)
        logits.append(padded_call(runnable, pixels, alone)[0].float().cpu().numpy())
        if time.perf_counter() - started > _SECONDS:
            break
    if len(logits) < min(_FEWEST_IMAGES, len(chosen)):
        raise MeasurementError(f"{len(logits)} single images took {_SECONDS:g} s")
    single, among = np.stack(logits), predictions.logits[order[: len(logits)]]
    return BatchInvariance(
        images=len(logits),
        batch_size=batch_size if fixed_shapes(runnable) else min(batch_size, len(images)),
        agreement_percent=100 * float(np.mean(single.argmax(axis=1) == among.argmax(axis=1))),
        max_logit_difference=float(np.abs(single - among).max()),
    )
