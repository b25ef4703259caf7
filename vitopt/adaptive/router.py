"""Two passes and a rule between them, as one thing that can be called and measured."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import special

from vitopt.adaptive.calibrated import FIRST_FOLDER, Calibrated
from vitopt.adaptive.passes import Passes
from vitopt.adaptive.scores import scores
from vitopt.engines.runtime import Prepared
from vitopt.errors import UnsupportedError
from vitopt.models.calibration import Use
from vitopt.models.checkpoint import Checkpoint
from vitopt.records import Outputs, Routing, Size

_FILLING = 1 / 8  # of a call on a CPU, at most: less than one call more costs
_RARELY = 1 / 1000  # share of the batches that may escalate more images than calls are built for


@dataclass
class Router:
    """A first pass for all images of a batch, a second for those of which it is not sure; a
    `vitopt.measure.runnable.Runnable`.

    The images that are escalated run together, in one call. Where the second pass has fixed shapes, powers of two are
    built in the first call of a batch size: a GPU, which takes as long for a few images more, fills them up to the
    next one; a CPU, which takes longer with each image, makes a few calls that fill up little. Compiling one can take
    half a minute, so there are as many as hold the images that all but one batch in a thousand escalate at the
    calibrated rate (binomial; 9 of 32 at 10 %); of more there are several calls. A batch waits for the device once, to
    know which images those are.
    """

    name: str
    passes: Passes
    calibrated: Calibrated
    device: torch.device = field(init=False)
    _escalated: torch.Tensor = field(init=False, default_factory=lambda: torch.empty(0, dtype=torch.bool))
    _built: set[torch.Size] = field(init=False, default_factory=set)

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
        self._build(pixel_values)
        logits, steps = self.passes.first_logits(pixel_values)
        self._escalated = scores(rule.proxy, logits, steps, rule.temperature) < rule.threshold
        chosen = self._escalated.nonzero()[:, 0]
        return logits.index_copy(0, chosen, self._second_logits(pixel_values, chosen)) if len(chosen) else logits

    @torch.no_grad()
    def both_passes(self, pixel_values: torch.Tensor) -> None:
        """The calls that are made where the first pass is sure of no image: what takes the most memory."""
        if self.calibrated.rule.threshold is None:
            self(pixel_values)
            return
        self._build(pixel_values)
        self.passes.first_logits(pixel_values)
        self._second_logits(pixel_values, torch.arange(len(pixel_values), device=pixel_values.device))

    def _build(self, pixel_values: torch.Tensor) -> None:
        """Where its shapes are fixed, call the second pass once with each size that such a batch is likely to need."""
        if self.second.fixed_shapes and pixel_values.shape not in self._built:
            for size in self._sizes(len(pixel_values)):
                self.second(pixel_values[:size])
            self._built.add(pixel_values.shape)

    def _second_logits(self, pixel_values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """(chosen, classes), float32, of the images with these indices; there is one at least."""
        batch = len(pixel_values)
        sizes = _calls(len(chosen), self._sizes(batch), self._filling) if self.second.fixed_shapes else [len(chosen)]
        if len(chosen) == batch and sizes == [batch]:
            return self.second(pixel_values).float()
        filled = torch.cat([chosen, chosen[-1:].expand(sum(sizes) - len(chosen))])
        return torch.cat([self.second(pixel_values[part]).float() for part in filled.split(sizes)])[: len(chosen)]

    def _sizes(self, batch: int) -> tuple[int, ...]:
        return _likely_sizes(batch, self.calibrated.escalated, self._filling)

    @property
    def _filling(self) -> float:
        return _FILLING if self.device.type == "cpu" else 1

    def flops_per_image(self) -> int:
        """Arithmetic of an image in the mean: as many are escalated as of the calibration images."""
        share = self.calibrated.escalated
        return self.first.flops_per_image() + round(share * self.second.flops_per_image())

    def images_seen(self) -> Sequence[Use]:
        """Those of both passes, and those that the threshold was chosen on."""
        return tuple(dict.fromkeys([*self.second.images_seen(), *self.first.images_seen()]))

    def graph_bytes(self, shape: torch.Size) -> int:
        """What both passes keep on a GPU between calls where all images of this shape are escalated; the graphs of one
        pass share their memory, so its largest call counts."""
        small = torch.Size([*shape[:2], *self.passes.pixels.size])
        largest = torch.Size([self._sizes(shape[0])[-1], *shape[1:]])
        passes = ((self.first, small), (self.second, largest))
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
        place = FIRST_FOLDER if self.calibrated.own_first else "."
        told = first["model"].model_copy(update={"source": place, "flops_per_image": self.first.flops_per_image()})
        routing = Routing(
            first=told,
            first_format=first["variant"].format,
            first_ran={option: value for option, value in of_first.items() if value != ran.get(option)},
            proxy=rule.proxy,
            threshold=rule.threshold,
            temperature=rule.temperature,
            promise=self.calibrated.promise,
        )
        return second | {"variant": variant, "size": size, "routing": routing}


@functools.cache
def _likely_sizes(batch: int, share: float, filling: float) -> tuple[int, ...]:
    """Rising: of the powers of two below `batch`, and itself, those called where `share` of the images is escalated."""
    sizes = [*(1 << power for power in range((batch - 1).bit_length())), batch]
    at_most = special.bdtr(np.arange(batch + 1), batch, share)
    likely = max(1, int(np.searchsorted(at_most, 1 - _RARELY)))
    largest = _calls(likely, sizes, filling)[0]
    return tuple(size for size in sizes if size <= largest)


def _calls(images: int, sizes: Sequence[int], filling: float) -> list[int]:
    """Which of the rising `sizes` are called for so many images, at most the share `filling` of a call being in vain.

    5 images of 1, 2, 4 and 8 are 4 and 1 for an eighth, and 8 for any share. All calls but the last are full.
    """
    calls: list[int] = []
    while images > 0:
        below = max(size for size in sizes if size <= images)
        above = next((size for size in sizes if size >= images), below)
        calls.append(above if above - images <= filling * above else below)
        images -= calls[-1]
    return calls
