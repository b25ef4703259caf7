"""Two passes and a rule between them, as one thing that can be called and measured."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from vitopt.adaptive.calibrated import Calibrated
from vitopt.adaptive.passes import Passes
from vitopt.adaptive.scores import scores
from vitopt.engines.runtime import Prepared
from vitopt.errors import UnsupportedError
from vitopt.models.calibration import Use
from vitopt.models.checkpoint import Checkpoint
from vitopt.records import Outputs, Routing, Size

_FILLING = 1 / 8  # of a call on a CPU, at most: less than one call more costs


@dataclass
class Router:
    """A first pass for all images of a batch, a second for those of which it is not sure; a
    `vitopt.measure.runnable.Runnable`.

    The images that are escalated run together, in one call. Where the second pass has fixed shapes, powers of two are
    compiled in the first call of a batch size: a GPU, which takes as long for a few images more, fills them up to the
    next one; a CPU, which takes longer with each image, makes a few calls that fill up little. A batch waits for the
    device once, to know which images those are.
    """

    name: str
    passes: Passes
    calibrated: Calibrated
    device: torch.device = field(init=False)
    _escalated: torch.Tensor = field(init=False, default_factory=lambda: torch.empty(0, dtype=torch.bool))
    _warm: set[torch.Size] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.device = self.second.device

    @property
    def first(self) -> Prepared:
        """The pass of all images."""
        return self.passes.first

    @property
    def second(self) -> Prepared:
        """The pass of those that are escalated."""
        return self.passes.second

    @property
    def checkpoint(self) -> Checkpoint:
        """Of the second pass, whose folder holds the first."""
        return self.second.checkpoint

    @property
    def preprocess(self) -> Callable[[Image.Image], torch.Tensor]:
        """That of the second pass; the first sees its pixels, resized."""
        return self.second.preprocess

    @preprocess.setter
    def preprocess(self, other: Callable[[Image.Image], torch.Tensor]) -> None:
        raise UnsupportedError(f"{self.name} was calibrated with its own preprocessor: leave `preprocess` out")

    @property
    def outputs(self) -> Outputs:
        """Those of both passes."""
        return self.second.outputs

    @property
    def label_names(self) -> list[str]:
        """Those of both passes."""
        return self.second.label_names

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width in pixels, of the second pass."""
        return self.second.input_size

    @property
    def fixed_shapes(self) -> bool:
        """Whether one of the passes runs batch sizes that it was built for."""
        return self.first.fixed_shapes or self.second.fixed_shapes

    @property
    def escalated(self) -> torch.Tensor:
        """(batch,), bool, of the last call: the images that got the second pass."""
        return self._escalated

    # Not inference_mode: a copy made under it is another kind of tensor, for which a compiler compiles anew.
    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width), on the device. Returns logits (batch, classes), float32."""
        rule = self.calibrated.rule
        if rule.threshold is None:
            self._escalated = torch.ones(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
            return self.second(pixel_values).float()
        if self.second.fixed_shapes and pixel_values.shape not in self._warm:
            for size in _sizes(len(pixel_values)):
                self.second(pixel_values[:size])
            self._warm.add(pixel_values.shape)
        logits, steps = self.passes.first_logits(pixel_values)
        self._escalated = scores(rule.proxy, logits, steps, rule.temperature) < rule.threshold
        chosen = self._escalated.nonzero()[:, 0]
        if len(chosen) == 0:
            return logits
        if len(chosen) == len(logits):
            return self.second(pixel_values).float()
        sizes = [len(chosen)]
        if self.second.fixed_shapes:
            sizes = _calls(len(chosen), _sizes(len(logits)), _FILLING if self.device.type == "cpu" else 1)
        filled = torch.cat([chosen, chosen[-1:].expand(sum(sizes) - len(chosen))])
        answers = torch.cat([self.second(pixel_values[part]).float() for part in filled.split(sizes)])
        return logits.index_copy(0, chosen, answers[: len(chosen)])

    @torch.no_grad()
    def both_passes(self, pixel_values: torch.Tensor) -> None:
        """All images through both, as where none is sure: what takes the most memory."""
        self.passes.first_logits(pixel_values)
        self.second(pixel_values)

    def flops_per_image(self) -> int:
        """Arithmetic of an image in the mean: as many are escalated as of the calibration images."""
        share = self.calibrated.escalated
        return self.first.flops_per_image() + round(share * self.second.flops_per_image())

    def images_seen(self) -> Sequence[Use]:
        """Those of both passes, and those that the threshold was chosen on."""
        return tuple(dict.fromkeys([*self.second.images_seen(), *self.first.images_seen()]))

    def graph_bytes(self, shape: torch.Size) -> int:
        """What both passes keep on a GPU between calls, where all images of this shape are escalated."""
        small = torch.Size([*shape[:2], *self.passes.pixels.size])
        passes = ((self.first, small), (self.second, shape))
        return sum(one.graph_bytes(of) for one, of in passes if hasattr(one, "graph_bytes"))

    def weight_bytes(self) -> int:
        """Of both passes."""
        return self.first.weight_bytes() + self.second.weight_bytes()

    def alone(self, batch_size: int) -> list[str]:
        """Command of a process that runs only this, uncompiled, both passes for all images."""
        run = self.second.run.uncompiled.model_dump_json()
        return [sys.executable, "-m", "vitopt.adaptive.alone", self.checkpoint.source, run, str(batch_size)]

    def describe(self) -> dict[str, Any]:
        """The second pass's fields of a record under this name, the size of both, and how images are routed."""
        first, second = self.first.describe(), self.second.describe()
        ran, of_first = second["variant"].ran, first["variant"].ran
        disk = [one["size"].disk_bytes for one in (first, second)]
        size = Size(
            weight_bytes=self.weight_bytes(),
            disk_bytes=None if None in disk else disk[1] + (disk[0] if self.calibrated.own_first else 0),
        )
        reasons = {f"first pass: {option}": why for option, why in first["variant"].reasons.items()}
        variant = second["variant"].model_copy(
            update={"name": self.name, "reasons": second["variant"].reasons | reasons}
        )
        rule = self.calibrated.rule
        routing = Routing(
            first=first["model"].model_copy(update={"flops_per_image": self.first.flops_per_image()}),
            first_format=first["variant"].format,
            first_ran={option: value for option, value in of_first.items() if value != ran.get(option)},
            proxy=rule.proxy,
            threshold=rule.threshold,
            temperature=rule.temperature,
            promise=self.calibrated.promise,
        )
        return second | {"variant": variant, "size": size, "routing": routing}


def _sizes(batch: int) -> list[int]:
    """Powers of two below `batch`, and itself."""
    return [*(1 << power for power in range((batch - 1).bit_length())), batch]


def _calls(images: int, sizes: Sequence[int], filling: float) -> list[int]:
    """Which of the rising `sizes` are called for so many images, at most the share `filling` of a call being in vain.

    5 images of 1, 2, 4 and 8 are 4 and 1 for an eighth, and 8 for any share. All calls but the last are full.
    """
    above = next(size for size in sizes if size >= images)
    if above - images <= filling * above:
        return [above]
    below = max(size for size in sizes if size < images)
    return [below, *_calls(images - below, sizes, filling)]
