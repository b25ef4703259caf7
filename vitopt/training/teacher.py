"""Distillation: a model learns a teacher's logits, beside labels or without (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn import functional
from transformers import PreTrainedModel, Trainer

from vitopt.data.pixels import TEACHER_PIXELS, Preprocessor
from vitopt.errors import CheckpointError
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor
from vitopt.models.forward import logits


@dataclass(frozen=True)
class Teacher:
    """A model that is not trained. `preprocess` makes its pixels, None where it takes those of the student; `order`:
    its output for each of the student's."""

    model: PreTrainedModel
    preprocess: Callable[[Image.Image], torch.Tensor] | None
    order: torch.Tensor

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, classes), float32, in the order of the student's classes."""
        return logits(self.model, pixel_values).float()[:, self.order]


def load_teacher(
    checkpoint: Checkpoint,
    labels: list[str],
    preprocess: Callable[[Image.Image], torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Teacher:
    """`labels` and `preprocess` are the student's; `dtype`: what a teacher that is not quantized computes in.

    Raises:
        CheckpointError: its classes are not those of the student, or it cannot be loaded.
    """
    known = checkpoint.label_names
    # Two classes of ImageNet have one name, and then the order tells.
    if known != labels and (sorted(known) != sorted(labels) or len(set(known)) < len(known)):
        other = next((name for name in labels if name not in known), f"{len(known)} of them, not {len(labels)}")
        raise CheckpointError(
            f"the teacher {checkpoint.source} has other classes than the model is to learn (first: {other}): take one "
            "of the same classes, or fine-tune it on these images first"
        )
    own = Preprocessor(load_processor(checkpoint))
    model = load_model(checkpoint, dtype=None if checkpoint.is_quantized else dtype, device=device)
    order = torch.arange(len(labels)) if known == labels else torch.tensor([known.index(name) for name in labels])
    return Teacher(model, None if own == preprocess else own, order.to(device))


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² KL(teacher / T, student / T) of logits (images, classes), in nats, the mean over images.

    T² keeps the size of its gradient where the temperature changes.
    """
    learned, taught = (functional.log_softmax(some.float() / temperature, dim=-1) for some in (student, teacher))
    return temperature**2 * functional.kl_div(learned, taught, reduction="batchmean", log_target=True)


class Distillation(Trainer):
    """A trainer whose loss is `weight` times the teacher's, and that of the labels for the rest."""

    def __init__(self, *, teacher: Teacher, temperature: float, weight: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._teacher, self._temperature, self._weight = teacher, temperature, weight

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As the trainer calls it; images that are evaluated have labels alone."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        pixels = inputs.pop(TEACHER_PIXELS, inputs["pixel_values"])
        if self._weight == 1:
            del inputs["labels"]
            of_labels, outputs = 0.0, model(**inputs)
        else:
            of_labels, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        taught = distillation_loss(outputs.logits, self._teacher(pixels), self._temperature)
        loss = self._weight * taught + (1 - self._weight) * of_labels
        return (loss, outputs) if return_outputs else loss
