"""Experiment trackers: trainings through transformers' own integrations, records as scalars.

Where a tracker keeps what it gets is told to it as always: `MLFLOW_TRACKING_URI`, `WANDB_PROJECT`, `WANDB_MODE`,
`TENSORBOARD_LOGGING_DIR` (of trainings).
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitopt.environment import launch, support
from vitopt.errors import RecipeError, UnsupportedError
from vitopt.recipe import suggest
from vitopt.records import Record

logger = logging.getLogger(__name__)

Log = Callable[[dict[str, float]], object]


@dataclass(frozen=True)
class Tracking:
    """Trackers to log to, the name of the run there, and the folder of TensorBoard's files.

    Raises:
        RecipeError: there is no such tracker.
        UnsupportedError: the package of one is not installed.
    """

    to: tuple[str, ...] = ()
    run: str = ""
    folder: Path = Path("log")

    def __post_init__(self) -> None:
        for tracker in set(self.to) - set(_TRACKERS):
            raise RecipeError(f"no tracker named {tracker!r}; {suggest(tracker, list(_TRACKERS))}")
        missing = [tracker for tracker in self.to if not support.installed(tracker)]
        if missing:
            raise UnsupportedError(
                f"cannot log to {' and '.join(missing)}: not installed (pip install {' '.join(missing)})"
            )

    @contextmanager
    def training(self) -> Iterator[list[Any]]:
        """Callbacks for transformers' Trainer, and an open run that they write to.

        Raises:
            UnsupportedError: a tracker opens no run, as without a login.
        """
        if not self.to or not launch.is_main_process():
            yield []
            return
        from transformers.integrations import get_reporting_integration_callbacks

        callbacks = []
        with ExitStack() as runs:
            for tracker in self.to:
                try:
                    (integration,) = get_reporting_integration_callbacks([tracker])
                    callbacks.append(integration())
                    if tracker != "tensorboard":
                        runs.enter_context(_TRACKERS[tracker](self, "training"))
                    elif callbacks[-1].logging_dir is None:  # its own choice is the trainer's folder, which is deleted
                        callbacks[-1].logging_dir = str(self.folder / "training")
                except Exception as error:  # each has its own
                    raise UnsupportedError(f"cannot log to {tracker}: {_one_line(error)}") from error
            yield callbacks

    def log(self, records: Iterable[Record]) -> None:
        """Log each measured record as a run of its variant's name; where that fails, the records stand all the same."""
        for record in records:
            for tracker in self.to if record.failure is None else ():
                try:
                    with _TRACKERS[tracker](self, record.variant.name) as log:
                        log(scalars(record))
                except Exception as error:  # each has its own
                    logger.warning("%s not logged to %s: %s", record.variant.name, tracker, _one_line(error))


def scalars(record: Record) -> dict[str, float]:
    """The figures of a record by name, with the ends of their 95 % intervals; what is unknown is left out."""
    figures: dict[str, float | None] = {}

    def add(name: str, value: float | None, limits: tuple[float | None, float | None] | None = None) -> None:
        low, high = limits or (None, None)
        figures.update({name: value, f"{name}_ci95_low": low, f"{name}_ci95_high": high})

    if (accuracy := record.accuracy) is not None:
        add("top1_percent", accuracy.top1_percent, accuracy.top1_ci95_percent)
        add("top5_percent", accuracy.top5_percent)
    if (versus := record.versus_baseline) is not None:
        add("top1_delta_points", versus.top1_delta_points, versus.top1_delta_ci95_points)
        add("agreement_percent", versus.agreement_percent, versus.agreement_ci95_percent)
        add("mean_kl_divergence", versus.mean_kl_divergence, versus.kl_ci95)
    for row in record.latency:
        at = f"batch_{row.batch_size}"
        for name in ("p50_ms", "p95_ms", "p99_ms"):
            add(f"{at}/{name}", getattr(row, name), getattr(row, f"{name.removesuffix('_ms')}_ci95_ms"))
        add(f"{at}/images_per_second", row.images_per_second)
        add(f"{at}/speedup", row.speedup_vs_baseline, row.speedup_ci95)
    if record.size is not None:
        add("weight_bytes", record.size.weight_bytes)
        add("disk_bytes", record.size.disk_bytes)
    if record.memory is not None:
        add("peak_bytes", record.memory.peak_bytes)
    return {name: float(value) for name, value in figures.items() if value is not None}


@contextmanager
def _mlflow(tracking: Tracking, part: str) -> Iterator[Log]:
    import mlflow

    with mlflow.start_run(run_name=f"{tracking.run} {part}", nested=mlflow.active_run() is not None):
        yield mlflow.log_metrics


@contextmanager
def _tensorboard(tracking: Tracking, part: str) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tracking.folder / part)) as writer:
        yield lambda values: [writer.add_scalar(name, value) for name, value in values.items()]


@contextmanager
def _wandb(tracking: Tracking, part: str) -> Iterator[Log]:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "vitopt")
    with wandb.init(project=project, group=tracking.run, name=f"{tracking.run} {part}") as run:
        yield run.log


_TRACKERS: Mapping[str, Callable[[Tracking, str], AbstractContextManager[Log]]] = {
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
