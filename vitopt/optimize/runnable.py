"""What everything that runs a checkpoint knows from the checkpoint alone, whatever computes."""

import functools
from collections.abc import Callable

import torch
from PIL import Image

from vitopt.data.pixels import Preprocessor
from vitopt.models.calibration import Use, load_uses
from vitopt.models.checkpoint import Checkpoint, empty_model, load_processor, parameter_count
from vitopt.models.forward import flops_per_image
from vitopt.recipe import RunSpec
from vitopt.records import Model, Outputs


class CheckpointRunnable:
    """Base of a `vitopt.measure.runnable.Runnable` that has a `checkpoint` and is run by `run`."""

    checkpoint: Checkpoint
    run: RunSpec

    @functools.cached_property
    def preprocess(self) -> Callable[[Image.Image], torch.Tensor]:
        """The checkpoint's own; may be set to another."""
        return Preprocessor(load_processor(self.checkpoint), scaled=self.run.scaled_decoding)

    @property
    def outputs(self) -> Outputs:
        """A logit for each class; or for each of independent labels, as the configuration tells."""
        several = self.checkpoint.config.problem_type == "multi_label_classification"
        return "labels" if several else "classes"

    @property
    def label_names(self) -> list[str]:
        """What the head's outputs are called."""
        return self.checkpoint.label_names

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.checkpoint.image_size

    def flops_per_image(self) -> int:
        """Arithmetic of one image."""
        return flops_per_image(self.checkpoint)

    def images_seen(self) -> tuple[Use, ...]:
        """Images that the checkpoint was trained or calibrated on."""
        return load_uses(self.checkpoint.folder)

    def describe_model(self) -> Model:
        """The model's part of a record."""
        return Model(
            source=self.checkpoint.source,
            sha256=self.checkpoint.fingerprint() if self.checkpoint.folder else None,
            architecture=str((self.checkpoint.config.architectures or ["unknown"])[0]),
            parameters=parameter_count(empty_model(self.checkpoint)),
            image_size=self.checkpoint.image_size,
            classes=self.checkpoint.config.num_labels,
        )
