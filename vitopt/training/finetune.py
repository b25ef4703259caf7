"""LoRA and full fine-tuning with transformers' Trainer and peft; an interrupted training resumes."""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, TrainerCallback, set_seed

from vitopt import progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.data.pixels import Augmentation, PixelDataset, Preprocessor
from vitopt.data.sources import hub_id, public_name
from vitopt.environment import devices, launch
from vitopt.errors import CheckpointError, DataError, MeasurementError, RecipeError
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
from vitopt.training.qat import train_rounded
from vitopt.training.teacher import load_teacher
from vitopt.training.trainer import (
    Advance,
    explained_io,
    last_saved_step,
    make_trainer,
    require_finite,
    steps,
    top1_percent,
    uses_bf16,
)
from vitopt.transformation import note_images, require_float, teacher_of

logger = logging.getLogger(__name__)

REPORT_FILE = "training.json"
_MULTI_LABEL = "multi_label_classification"


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

    LoRA's low-rank updates are merged into the weights, so the result has the modules of the original. The weights of a
    quantization-aware training are not rounded yet: `quantize` rounds them as the training did. The
    trainer's state lies beside `output` until the training is complete; the same call goes on from there.
    Images with sets of labels train independent labels (binary cross-entropy). `preprocess` prepares the images
    instead of the checkpoint's own processor, which goes with the result nevertheless; a teacher always takes those
    of its own.

    Raises:
        PatternError: a target matches no layer.
        CheckpointError: the checkpoint is quantized, and merging into packed weights would lose accuracy; or
            transformers cannot train its class; or the teacher is not there or has other classes.
        DataError: there are no images, or the classes of `test` are not those of `images`.
        RecipeError: labels are to be smoothed, or taught by a teacher, that do not exclude each other; or the model
            cannot be made for `image_size`.
        BadImageError: a training image cannot be decoded.
        MeasurementError: the GPU's memory is full; or the loss or a weight is no longer a number, and then
            nothing is kept of such a training.
        StorageError: the output would replace something else, is in use, or cannot be written.
        UnsupportedError: a tracker opens no run; or the format of a quantization-aware training holds no layer.
    """
    if images is None:
        raise DataError(f"{checkpoint.source} cannot be fine-tuned without images: give some to train on")
    require_float(checkpoint)
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
    if images.label_sets is not None and spec.teacher and spec.uses_labels:
        raise RecipeError("a `teacher` knows classes that exclude each other, and these images have sets of labels")
    teaching = teacher_of(spec, checkpoint)
    taught_by = None if teaching is None else teaching.folder
    with (
        launch.in_main_process(storage.reserved(output, checkpoint.folder, taught_by, images.name)),
        (tracking or Tracking()).training() as callbacks,
    ):
        return _finetune(checkpoint, teaching, images, spec, output, test, device, seed, preprocess, callbacks)


def _finetune(
    checkpoint: Checkpoint,
    teaching: Checkpoint | None,
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
    labels = head_labels(checkpoint.label_names, train, spec, None if teaching is None else teaching.label_names)
    if spec.uses_labels:
        train, test = fit_labels(train, labels), None if test is None else fit_labels(test, labels)
    else:
        test = None if test is None else _if_known(test, labels)
    fresh_head = labels != checkpoint.label_names
    model = load_model(checkpoint, dtype=torch.float32, label_names=labels if fresh_head else None)
    if spec.image_size:
        model = at_resolution(model, spec.image_size)
    of_sets = train.label_sets is not None and spec.uses_labels
    model.config.problem_type = _MULTI_LABEL if of_sets else "single_label_classification"
    inputs = [checkpoint.fingerprint(), train.sha256, spec.model_dump(), labels, seed]
    inputs += [] if teaching is None else [teaching.fingerprint()]
    # Code has no fingerprint, but what it makes of an image has.
    inputs += [] if own is None else [hashlib.sha256(own(train.image(0)).numpy().tobytes()).hexdigest()]
    state = _state_folder(output, inputs)
    resumed_from = last_saved_step(state)
    teacher = None
    if teaching is not None:
        dtype = torch.bfloat16 if uses_bf16(spec, target) else torch.float32
        teacher = load_teacher(teaching, labels, preprocess, target, dtype)
    if spec.method == "lora":
        model = _with_lora(model, checkpoint.config.model_type, spec)
    elif resumed_from:
        # The trainer looks for the modules' names, but a whole model is stored under the names of older versions:
        # it would find no weight and go on from the original ones without a word.
        model = load_model(open_checkpoint(str(state / f"checkpoint-{resumed_from}")), dtype=torch.float32)
    if spec.method == "qat":
        train_rounded(model, spec)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    augment = Augmentation(flip=spec.flip) if spec.augment else None
    pixels = PixelDataset(train, preprocess, augment, None if teacher is None else teacher.preprocess)
    with explained_io(output), progress.task("fine-tuning", steps(spec, len(train))) as bar:
        trainer = make_trainer(model, pixels, spec, state, target, seed, [Advance(bar), *callbacks], teacher)
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=bool(resumed_from))
            require_finite(model, spec)
        except MeasurementError:
            shutil.rmtree(state, ignore_errors=True)  # going on from these weights would diverge again
            raise
        except torch.OutOfMemoryError as error:
            raise MeasurementError(
                f"out of GPU memory while training: lower the batch size, which is {spec.batch_size}"
            ) from error
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    test = None if of_sets else test  # no class is right alone
    top1 = None if test is None else top1_percent(trainer, PixelDataset(test, preprocess))
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
            note_images(checkpoint, train, TRAINING, folder, teaching)
            note_origin(checkpoint, folder, FINETUNE, **_facts(spec, train, report, teaching))
        shutil.rmtree(state, ignore_errors=True)
    launch.wait_for_all()
    return report


def _facts(spec: FinetuneSpec, train: ImageSet, report: TrainingReport, teaching: Checkpoint | None) -> dict[str, Any]:
    """What the note of origin tells of a training."""
    told = {"method", "learning_rate", "batch_size", *(("rank", "alpha") if spec.method == "lora" else ())}
    told |= {"format"} if spec.format else set()
    told |= {"image_size"} if spec.image_size else set()
    told |= {"temperature", "teacher_weight"} if teaching else set()
    data = {"dataset": public_name(train.name), "dataset_hub_id": hub_id(train.name), "split": train.split}
    taught = {} if teaching is None else {"teacher": _public(teaching), "teacher_sha256": teaching.fingerprint()}
    return spec.model_dump(mode="json", include=told) | asdict(report) | data | taught


def _public(checkpoint: Checkpoint) -> str:
    """What a checkpoint can be called elsewhere: its hub id, or the name of its folder without the path."""
    return checkpoint.source if checkpoint.folder is None else checkpoint.folder.resolve().name


def head_labels(before: list[str], train: ImageSet, spec: FinetuneSpec, taught: list[str] | None = None) -> list[str]:
    """Names of the head's outputs after a fine-tuning on `train` of a head that had the names `before`.

    They are the classes of the images, or the head's own if labels count those; `taught`, the teacher's, where it
    teaches alone.
    """
    if taught is not None and not spec.uses_labels:
        return taught
    return before if train.class_names is None else list(train.class_names)


def _if_known(test: ImageSet, labels: list[str]) -> ImageSet | None:
    """`test` where its classes are known: a training without labels needs none that are."""
    try:
        return fit_labels(test, labels)
    except DataError as error:
        logger.warning("no accuracy after the training: %s", error)
        return None


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


def _state_folder(output: Path, inputs: list[Any]) -> Path:
    """Folder of the trainer's state, named after what is trained: other inputs never resume from it."""
    return output.with_name(f".{output.name}.training-{storage.sha256_of_json(inputs)[:12]}")
