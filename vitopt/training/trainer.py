"""The trainer of a fine-tuning: transformers' own, which stops when it diverges and saves a state to resume from."""

import contextlib
import errno
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from vitopt import progress
from vitopt.data.pixels import PixelDataset
from vitopt.environment import devices, launch
from vitopt.errors import MeasurementError, StorageError
from vitopt.steps import FinetuneSpec
from vitopt.training.teacher import Distillation, Teacher

_SAVE_EVERY_SECONDS = 300
# safetensors and torch.save keep the system's reason in their text, if at all.
_SIGNS_OF_FULL_DISK = ("No space left on device", "inline_container", "PytorchStreamWriter")


def make_trainer(
    model: Any,
    train: PixelDataset,
    spec: FinetuneSpec,
    state: Path,
    device: torch.device,
    seed: int,
    callbacks: Sequence[TrainerCallback],
    teacher: Teacher | None = None,
) -> Trainer:
    """A trainer that keeps its state in the folder `state`."""
    arguments = TrainingArguments(
        output_dir=str(state),
        num_train_epochs=spec.epochs,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=round(steps(spec, len(train)) * spec.warmup_fraction),
        lr_scheduler_type="cosine",
        label_smoothing_factor=spec.label_smoothing,
        bf16=uses_bf16(spec, device),
        use_cpu=device.type == "cpu",
        dataloader_num_workers=spec.workers,
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        report_to="none",  # `Tracking` adds the integrations itself
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=seed,
        ddp_find_unused_parameters=False,
    )
    parts: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": train,
        "compute_metrics": _metrics,
        "callbacks": [*callbacks, _SaveNowAndThen(), _StopWhenDiverged(spec)],
    }
    if teacher is None:
        trainer = Trainer(**parts)
    else:
        trainer = Distillation(teacher=teacher, temperature=spec.temperature, weight=spec.teacher_weight, **parts)
    trainer.remove_callback(PrinterCallback)
    return trainer


def steps(spec: FinetuneSpec, images: int) -> int:
    """Optimizer steps of a whole training."""
    processes = launch.process_share()[1]
    return math.ceil(math.ceil(images / (spec.batch_size * processes)) * spec.epochs)


def uses_bf16(spec: FinetuneSpec, device: torch.device) -> bool:
    """Whether the matrix products of the training are in bf16."""
    if spec.precision == "auto":
        return devices.computes_in_bf16(device)
    return spec.precision == "bf16"


def _metrics(output: Any) -> dict[str, float]:
    from vitopt.measure.metrics import TopKAccuracy

    return TopKAccuracy().compute(predictions=output.predictions, references=output.label_ids)


def top1_percent(trainer: Trainer, test: PixelDataset) -> float:
    """Share of the images that get their label."""
    return float(trainer.evaluate(test)["eval_top1_percent"])


def last_saved_step(state: Path) -> int:
    """Step of the newest complete save; incomplete ones are removed. 0 when there is none."""
    saved = [0]
    for folder in state.glob("checkpoint-*"):
        try:
            # The trainer writes this file last.
            saved.append(json.loads((folder / "trainer_state.json").read_text())["global_step"])
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder, ignore_errors=True)
    return max(saved)


@contextlib.contextmanager
def explained_io(output: Path) -> Iterator[None]:
    """Tells of a disk that is full, or refuses, while the state beside `output` is written.

    Raises:
        StorageError: it is.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or any(sign in str(error) for sign in _SIGNS_OF_FULL_DISK)
        if full:
            raise StorageError(
                f"the disk is full while writing the training state beside {output}: free some space and run it again"
            ) from error
        if not isinstance(error, OSError) or error.errno is None:
            raise
        raise StorageError(f"cannot write the training state beside {output}: {error.strerror}") from error


def require_finite(model: Any, spec: FinetuneSpec) -> None:
    """Refuse a trained model with a weight that is not a number.

    Raises:
        MeasurementError: it has one.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise MeasurementError(_diverged(f"{name} is not finite", spec))


def _diverged(what: str, spec: FinetuneSpec) -> str:
    return f"the training diverged ({what}): lower the learning rate, which is {spec.learning_rate:g}"


class Advance(TrainerCallback):
    """Moves vitopt's progress bar, which stands instead of the trainer's."""

    def __init__(self, bar: progress.Task):
        self._bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.advance()


class _SaveNowAndThen(TrainerCallback):
    """Save every few minutes as well, because an epoch can take hours."""

    def __init__(self) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self._saved > _SAVE_EVERY_SECONDS:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = time.monotonic()


class _StopWhenDiverged(TrainerCallback):
    """Ends a training whose loss is no longer a number, instead of spending all epochs on it."""

    def __init__(self, spec: FinetuneSpec) -> None:
        self._spec = spec

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise MeasurementError(_diverged(f"the loss is {loss} at step {state.global_step}", self._spec))
