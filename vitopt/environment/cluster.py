"""Work that Ray Data spreads over GPUs and cores, of this machine or a cluster. Ray is optional (`vitopt[ray]`)."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from vitopt.environment import launch, support
from vitopt.errors import UnsupportedError, VitoptError

R = TypeVar("R")


class _Actor:
    """One process: what `make` gives answers all items that it gets. An error of vitopt is an answer too, as Ray would
    wrap it and try again."""

    def __init__(self, make: Callable[[], Callable[[str], Any]]) -> None:
        self._make = functools.cache(make)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        answers = np.empty(len(batch["item"]), dtype=object)
        for place, item in enumerate(batch["item"]):
            try:
                answers[place] = self._make()(str(item))
            except VitoptError as error:
                answers[place] = error
        return {"answer": answers}


def answers_of_cluster(make: Callable[[], Callable[[str], R]], items: Sequence[str], device: str) -> Iterator[R]:
    """`make()(item)` for each item, as they are ready: one process for each GPU or, without, for as many cores as torch
    takes here.

    The cluster is the one that RAY_ADDRESS names or that `ray start` began on this machine; without, Ray runs on this
    machine for this time. All machines need vitopt and the same files at the same paths.

    Raises:
        UnsupportedError: Ray is not installed, cannot be reached, or is asked for under `accelerate launch`.
        VitoptError: the first that `make` or an item raised.
    """
    if launch.process_share()[1] > 1:
        raise UnsupportedError("--ray starts its own processes: leave out `accelerate launch`")
    if not support.installed("ray"):
        raise UnsupportedError("Ray is not installed: pip install 'vitopt[ray]'")
    return _answers(make, items, device)


def _answers(make: Callable[[], Callable[[str], R]], items: Sequence[str], device: str) -> Iterator[R]:
    with _cluster() as ray:
        gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        cores, threads = int(ray.cluster_resources().get("CPU", 1)), torch.get_num_threads()
        each = {"num_gpus": 1} if gpus else {"num_cpus": min(threads, cores)}
        answered = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(make,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(len(items), gpus or max(1, cores // threads))),
            **each,
        )
        for row in answered.iter_rows():
            if isinstance(row["answer"], VitoptError):
                raise row["answer"]
            yield row["answer"]


@contextlib.contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected; what was begun here ends here, so that nothing of it runs while models are timed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    import ray
    import ray.data

    with contextlib.ExitStack() as ending:
        if not ray.is_initialized():
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # of many types
                raise UnsupportedError(f"Ray cannot be reached or started: {' '.join(str(error).split())}") from error
            ending.callback(ray.shutdown)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
