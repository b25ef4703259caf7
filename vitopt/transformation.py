"""What all ways to make one checkpoint of another share: how they are called, and the images that they note."""

from pathlib import Path
from typing import Protocol, TypeVar

from vitopt.data.duplicates import perceptual_hashes
from vitopt.data.images import ImageSet
from vitopt.errors import CheckpointError, DataError
from vitopt.models.calibration import Use, load_uses, save_uses
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.steps import BASE, FinetuneSpec

SpecT = TypeVar("SpecT", contravariant=True)


class Outcome(Protocol):
    """What a transformation did."""

    def summary(self) -> str:
        """In a few words, for the line that a run prints."""


class Transformation(Protocol[SpecT]):
    """Writes to the folder `output` what it makes of `checkpoint`, as `spec` asks.

    `images`: those that it learns from, or on which `spec` was chosen; None where there are none. The folder opens
    with plain transformers, is complete or absent (`storage.staged_folder`), and notes which images its checkpoint
    has seen (`note_images`).

    Raises:
        UnsupportedError: this device or model cannot do it.
        CheckpointError: the checkpoint is not one to start from.
        MeasurementError: what came out is no working model.
        StorageError: the output would replace something else, is in use, or cannot be written.
    """

    def __call__(
        self,
        checkpoint: Checkpoint,
        spec: SpecT,
        output: Path,
        /,
        device: str = "auto",
        *,
        images: ImageSet | None = None,
    ) -> Outcome: ...


def require_float(checkpoint: Checkpoint) -> None:
    """Refuse to start from weights that are rounded already.

    Raises:
        CheckpointError: the checkpoint is quantized.
    """
    if checkpoint.is_quantized:
        raise CheckpointError(f"{checkpoint.source} is quantized already; start from the 16- or 32-bit checkpoint")


def require_images(images: ImageSet | None, what: str, remedy: str = "data") -> ImageSet:
    """`images`, of which there is at least one; `what` looks at them.

    Raises:
        DataError: there are none.
    """
    if images is None or len(images) == 0:
        raise DataError(f"{what} looks at calibration images, and there are none: give it {remedy}")
    return images


def teacher_of(spec: FinetuneSpec, start: Checkpoint) -> Checkpoint | None:
    """The checkpoint that teaches, None where none does; `start`: the one that the steps start from.

    Raises:
        CheckpointError: it is not there, or no image classifier.
    """
    if spec.teacher is None:
        return None
    return start if spec.teacher == BASE else open_checkpoint(spec.teacher)


def note_images(
    checkpoint: Checkpoint, images: ImageSet | None, purpose: str, folder: Path, teacher: Checkpoint | None = None
) -> None:
    """Note in `folder` the images that `checkpoint` and its `teacher` have seen, as what is made of them has seen them
    too, and `images`."""
    uses = [*load_uses(checkpoint.folder), *(load_uses(teacher.folder) if teacher else ())]
    uses += [] if images is None else [seen(images, purpose)]
    save_uses(list(dict.fromkeys(uses)), folder)


def seen(images: ImageSet, purpose: str) -> Use:
    """The note that a checkpoint has seen `images`, to be kept beside its weights."""
    return Use(purpose, images.name, images.split, images.image_hashes, images.ids, perceptual_hashes(images))
