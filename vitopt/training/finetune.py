"""LoRA and full fine-tuning with transformers' Trainer and peft; an interrupted training resumes."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from vitopt import progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.data.pixels import Augmentation, PixelDataset, Preprocessor
from vitopt.data.sources import hub_id, public_name
from vitopt.environment import devices, launch
from vitopt.errors import CheckpointError, DataError, MeasurementError, RecipeError, StorageError
from vitopt.measure.chance import explain_guessing, is_guessing
from vitopt.models.calibration import TRAINING
from vitopt.models.checkpoint import (
    Checkpoint,
    load_model,
    load_processor,
    open_checkpoint,
    save_checkpoint,
)
from vitopt.models.classes import why_not_trained
from vitopt.models.names import linear_layers, select
from vitopt.models.origin import FINETUNE, note_origin
from vitopt.optimize.resolution import at_resolution, for_resolution, why_not_resized
from vitopt.recipe import FinetuneSpec
from vitopt.tracking import Tracking
from vitopt.transformation import note_images

logger = logging.getLogger(__name__)

REPORT_FILE = "training.json"
_SAVE_EVERY_SECONDS = 300
_MULTI_LABEL = "multi_label_classification"
# safetensors and torch.save keep the system's reason in their text, if at all.
_SIGNS_OF_FULL_DISK = ("No space left on device", "inline_container", "PytorchStreamWriter")


@dataclass(frozen=True)
class TrainingReport:
    """What a training did; stored beside its checkpoint as `training.json`.

    `final_loss` is the mean over the last epoch; `seconds` count from the last resumption.
    """

    images: int
    classes: int
    epochs: float
    steps: int
    resumed_from_step: int
    seconds: float
    final_loss: float | None
    trainable_parameters: int
    parameters: int
    test_top1_percent: float | None

    def summary(self) -> str:
        """Steps and time, in words."""
        resumed = f", resumed from step {self.resumed_from_step}" if self.resumed_from_step else ""
        return f"{self.steps} steps in {self.seconds:.0f} s{resumed}"


def finetune(
    checkpoint: Checkpoint,
    spec: FinetuneSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet | None = None,
    test: ImageSet | None = None,
    seed: int = 0,
    preprocess: Callable[[Image.Image], torch.Tensor] | None = None,
    tracking: Tracking | None = None,
) -> TrainingReport:
    """Fine-tune `checkpoint` on `images` and write a merged fp32 checkpoint to `output`.

    LoRA's low-rank updates are merged into the weights, so the result has the modules of the original. The
    trainer's state lies beside `output` until the training is complete; the same call goes on from there.
    Images with sets of labels train independent labels (binary cross-entropy). `preprocess` prepares the images
    instead of the checkpoint's own processor, which goes with the result nevertheless.

    Raises:
        PatternError: a LoRA target matches no layer.
        CheckpointError: the checkpoint is quantized, and merging into packed weights would lose accuracy; or
            transformers cannot train its class.
        DataError: there are no images, or the classes of `test` are not those of `images`.
        RecipeError: labels are to be smoothed that do not exclude each other; or the model cannot be made for
            `image_size`.
        BadImageError: a training image cannot be decoded.
        MeasurementError: the GPU's memory is full; or the loss or a weight is no longer a number, and then
            nothing is kept of such a training.
        StorageError: the output would replace something else, is in use, or cannot be written.
        UnsupportedError: a tracker opens no run.
    """
    if images is None:
        raise DataError(f"{checkpoint.source} cannot be fine-tuned without images: give some to train on")
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{checkpoint.source} is quantized; fine-tune the 16- or 32-bit checkpoint, then quantize"
        )
    if reason := why_not_trained(checkpoint.config):
        raise CheckpointError(f"{checkpoint.source} cannot be fine-tuned: {reason}; take a model with one head")
    if spec.image_size and (reason := why_not_resized(checkpoint.config, spec.image_size)):
        raise RecipeError(f"{checkpoint.source}: {reason}")
    if spec.image_size and preprocess is not None:
        height, width = preprocess(images.image(0)).shape[-2:]
        if height != spec.image_size or width != spec.image_size:
            raise DataError(
                f"`preprocess` makes {height} x {width} pixels, and the model is to be trained at `image_size` "
                f"{spec.image_size}: give one that makes those"
            )
    if images.label_sets is not None and spec.label_smoothing:
        raise RecipeError("`label_smoothing` spreads a target over classes, and these images have sets of labels")
    with (
        launch.in_main_process(storage.reserved(output, checkpoint.folder, images.name)),
        (tracking or Tracking()).training() as callbacks,
    ):
        return _finetune(checkpoint, images, spec, output, test, device, seed, preprocess, callbacks)


def _finetune(
    checkpoint: Checkpoint,
    train: ImageSet,
    spec: FinetuneSpec,
    output: Path,
    test: ImageSet | None,
    device: str,
    seed: int,
    own: Callable[[Image.Image], torch.Tensor] | None,
    callbacks: list[TrainerCallback],
) -> TrainingReport:
    set_seed(seed)
    target = devices.resolve_device(device)
    processor = load_processor(checkpoint)
    if spec.image_size:
        processor = for_resolution(processor, spec.image_size)
    preprocess = own or Preprocessor(processor)
    labels = head_labels(checkpoint, train)
    train = fit_labels(train, labels)
    test = None if test is None else fit_labels(test, labels)
    fresh_head = labels != checkpoint.label_names
    model = load_model(checkpoint, dtype=torch.float32, label_names=labels if fresh_head else None)
    if spec.image_size:
        model = at_resolution(model, spec.image_size)
    model.config.problem_type = _MULTI_LABEL if train.label_sets is not None else "single_label_classification"
    inputs = [checkpoint.fingerprint(), train.sha256, spec.model_dump(), labels, seed]
    # Code has no fingerprint, but what it makes of an image has.
    inputs += [] if own is None else [hashlib.sha256(own(train.image(0)).numpy().tobytes()).hexdigest()]
    state = _state_folder(output, inputs)
    resumed_from = _last_saved_step(state)
    if spec.method == "lora":
        model = _with_lora(model, checkpoint.config.model_type, spec)
    elif resumed_from:
        # The trainer looks for the modules' names, but a whole model is stored under the names of older versions:
        # it would find no weight and go on from the original ones without a word.
        model = load_model(open_checkpoint(str(state / f"checkpoint-{resumed_from}")), dtype=torch.float32)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    with _explained_io(output), progress.task("fine-tuning", _steps(spec, train)) as bar:
        trainer = _trainer(model, train, preprocess, spec, state, target, seed, [_Advance(bar), *callbacks])
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=bool(resumed_from))
            _require_finite(model, spec)
        except MeasurementError:
            shutil.rmtree(state, ignore_errors=True)  # going on from these weights would diverge again
            raise
        except torch.OutOfMemoryError as error:
            raise MeasurementError(
                f"out of GPU memory while training: lower the batch size, which is {spec.batch_size}"
            ) from error
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    test = None if train.label_sets is not None else test  # no class is right alone
    top1 = None if test is None else _top1_percent(trainer, PixelDataset(test, preprocess))
    if test is not None and top1 is not None:
        right = round(top1 * len(test) / 100)
        if is_guessing(right, len(test), len(labels)):
            logger.warning("%s", explain_guessing("the fine-tuned model", right, len(test), len(labels)))
    report = TrainingReport(
        images=len(train),
        classes=len(labels),
        epochs=spec.epochs,
        steps=trainer.state.global_step,
        resumed_from_step=resumed_from,
        seconds=round(seconds, 1),
        final_loss=losses[-1] if losses else None,
        trainable_parameters=trainable,
        parameters=total,
        test_top1_percent=top1,
    )
    if launch.is_main_process():
        merged = trainer.accelerator.unwrap_model(trainer.model)
        merged = merged.merge_and_unload() if spec.method == "lora" else merged
        with storage.staged_folder(output) as folder:
            save_checkpoint(merged, processor, folder)
            storage.write_json(folder / REPORT_FILE, asdict(report))
            note_images(checkpoint, train, TRAINING, folder)
            note_origin(checkpoint, folder, FINETUNE, **_facts(spec, train, report))
        shutil.rmtree(state, ignore_errors=True)
    launch.wait_for_all()
    return report


def _facts(spec: FinetuneSpec, train: ImageSet, report: TrainingReport) -> dict[str, Any]:
    """What the note of origin tells of a training."""
    told = {"method", "learning_rate", "batch_size", *(("rank", "alpha") if spec.method == "lora" else ())}
    told |= {"image_size"} if spec.image_size else set()
    data = {"dataset": public_name(train.name), "dataset_hub_id": hub_id(train.name), "split": train.split}
    return spec.model_dump(mode="json", include=told) | asdict(report) | data


def head_labels(checkpoint: Checkpoint, train: ImageSet) -> list[str]:
    """Names of the head's outputs after a fine-tuning on `train`: its classes, or the head's own if it counts those."""
    return checkpoint.label_names if train.class_names is None else list(train.class_names)


def _with_lora(model: PreTrainedModel, model_type: str, spec: FinetuneSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    layers = linear_layers(model, model_type)
    chosen = select(spec.targets, layers)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=[layer.module for layer in layers if layer.logical in chosen and not layer.is_head],
        # The head is trained whole; peft has no task type for image classification to do this by itself.
        modules_to_save=[layer.module for layer in layers if layer.is_head],
    )
    return get_peft_model(model, config)


def _trainer(
    model: Any,
    train: ImageSet,
    preprocess: Callable[[Image.Image], torch.Tensor],
    spec: FinetuneSpec,
    state: Path,
    device: torch.device,
    seed: int,
    callbacks: list[TrainerCallback],
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(state),
        num_train_epochs=spec.epochs,
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=round(_steps(spec, train) * spec.warmup_fraction),
        lr_scheduler_type="cosine",
        label_smoothing_factor=spec.label_smoothing,
        bf16=_use_bf16(spec, device),
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
    augment = Augmentation(flip=spec.flip) if spec.augment else None
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=PixelDataset(train, preprocess, augment),
        compute_metrics=_metrics,
        callbacks=[*callbacks, _SaveNowAndThen(), _StopWhenDiverged(spec)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _steps(spec: FinetuneSpec, train: ImageSet) -> int:
    processes = launch.process_share()[1]
    return math.ceil(math.ceil(len(train) / (spec.batch_size * processes)) * spec.epochs)


def _use_bf16(spec: FinetuneSpec, device: torch.device) -> bool:
    if spec.precision == "auto":
        return devices.computes_in_bf16(device)
    return spec.precision == "bf16"


def _metrics(output: Any) -> dict[str, float]:
    from vitopt.measure.metrics import TopKAccuracy

    return TopKAccuracy().compute(predictions=output.predictions, references=output.label_ids)


def _top1_percent(trainer: Trainer, test: PixelDataset) -> float:
    return float(trainer.evaluate(test)["eval_top1_percent"])


def _state_folder(output: Path, inputs: list[Any]) -> Path:
    """Folder of the trainer's state, named after what is trained: other inputs never resume from it."""
    return output.with_name(f".{output.name}.training-{storage.sha256_of_json(inputs)[:12]}")


def _last_saved_step(state: Path) -> int:
    """Step of the newest complete save; incomplete ones are removed. 0 when there is none."""
    steps = [0]
    for folder in state.glob("checkpoint-*"):
        try:
            # The trainer writes this file last.
            steps.append(json.loads((folder / "trainer_state.json").read_text())["global_step"])
        except (OSError, ValueError, KeyError):
            shutil.rmtree(folder, ignore_errors=True)
    return max(steps)


@contextlib.contextmanager
def _explained_io(output: Path) -> Iterator[None]:
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


def _require_finite(model: Any, spec: FinetuneSpec) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise MeasurementError(_diverged(f"{name} is not finite", spec))


def _diverged(what: str, spec: FinetuneSpec) -> str:
    return f"the training diverged ({what}): lower the learning rate, which is {spec.learning_rate:g}"


class _Advance(TrainerCallback):
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
