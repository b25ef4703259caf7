"""One function prepares what can be called, in torch or another engine."""

import functools
import logging
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vitopt import storage
from vitopt.data.images import ImageSet
from vitopt.engines import package
from vitopt.engines.example import memory_text
from vitopt.engines.note import Package, read_package, why_not_used
from vitopt.engines.package import Call, answers, engine_module, require_runs, stored_format, write_model
from vitopt.errors import MeasurementError, UnsupportedError
from vitopt.formats import QUANTIZED_FORMATS
from vitopt.models.checkpoint import Checkpoint, empty_model, parameter_count
from vitopt.models.names import Layer, linear_layers
from vitopt.optimize import runtime
from vitopt.optimize.compiled import Graphs
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runnable import CheckpointRunnable
from vitopt.optimize.runtime import TorchRunnable
from vitopt.recipe import ENGINES, HeldSpec, RunSpec, VariantSpec
from vitopt.records import Size, Variant

logger = logging.getLogger(__name__)

_BYTES = {"w8a8": 1, "bf16": 2, "fp16": 2}  # of a weight; 4 in all others


@dataclass
class EngineRunnable(CheckpointRunnable):
    """A checkpoint as an engine runs it; a `vitopt.measure.runnable.Runnable`.

    `asked`: the variant that it was made for. `folder`: of the engine's files, None where they are not kept.
    """

    name: str
    checkpoint: Checkpoint
    package: Package
    call: Call
    device: torch.device
    run: RunSpec
    asked: HeldSpec | None = None
    folder: Path | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._graphs = Graphs(self.call, torch.Tensor.float) if self.device.type == "cuda" else None

    @property
    def fixed_shapes(self) -> bool:
        """Whether each batch size is built, or captured as a CUDA graph, on its own."""
        return self._graphs is not None or self.call.fixed_shapes

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width). Returns logits (batch, classes).

        Raises:
            UnsupportedError: the height or width is another than the model file was made for.
        """
        if tuple(pixel_values.shape[-2:]) != self.input_size:
            (height, width), found = self.input_size, " x ".join(map(str, pixel_values.shape[-2:]))
            raise UnsupportedError(
                f"{self.name}: the {self.package.engine} file was made for {height} x {width} pixels, not {found}"
            )
        if self._graphs is not None:
            try:
                return self._graphs(pixel_values)
            except torch.OutOfMemoryError:
                raise  # a smaller batch may fit
            except RuntimeError as error:  # a capture allows less than a call
                self._graphs = None
                self.reasons["cuda graph"] = f"not captured: {' '.join(str(error).split())[:200]}"
                logger.warning("%s: %s", self.name, self.reasons["cuda graph"])
        return answers(self.package.engine, self.call, pixel_values)

    def graph_bytes(self, shape: torch.Size) -> int:
        """Memory that a captured CUDA graph for pixels of this shape keeps, else 0; an engine's own is not known."""
        return self._graphs.peak_bytes(shape) if self._graphs is not None else 0

    def describe(self) -> dict[str, Any]:
        """Its fields of a record; formats are read back from what runs."""
        asked, formats, told = self.asked, self._formats(), self.package.settings
        shared = {"engine": self.run.engine, "scaled_decoding": self.run.scaled_decoding}
        wanted, computed = self.package.format, set(formats.values())
        if wanted not in QUANTIZED_FORMATS and wanted not in computed:
            instead = " and ".join(sorted(computed))
            self.reasons["format"] = f"no {wanted} arithmetic here: held in {wanted}, computed in {instead}"
        disk = sum(file.stat().st_size for file in self.folder.iterdir()) if self.folder else None
        return {
            "variant": Variant(
                name=self.name,
                format=asked.format if asked else self.package.format,
                half=asked.half if asked else None,
                skip=asked.skip if asked else (),
                layers=dict(asked.layers) if asked else {},
                asked={**shared, **self.package.options},
                ran={**shared, "static_scales": self.package.calibrated, **told.get("ran", {})},
                reasons={**told.get("reasons", {}), **self.reasons},
            ),
            "model": self.describe_model(),
            "layer_plan": dict(Counter(formats.values())),
            "layers": formats,
            "size": Size(weight_bytes=self.weight_bytes(), disk_bytes=disk),
        }

    def weight_bytes(self) -> int:
        """Bytes of the weights in the formats that they are computed in; what an engine keeps beside is not known."""
        if (known := self.package.settings.get("weight_bytes")) is not None:
            return int(known)
        formats = self._formats()
        layers = [(layer.parameters, _BYTES.get(formats[layer.logical], 4)) for layer in self._layers]
        rest = parameter_count(empty_model(self.checkpoint)) - sum(count for count, _ in layers)
        return sum(count * size for count, size in layers) + 4 * rest

    def alone(self, batch_size: int) -> list[str]:
        """Command of a process that runs only this: the engine without torch.

        Raises:
            MeasurementError: the engine's files are not kept.
        """
        if self.folder is None:
            raise MeasurementError(f"the file of {self.package.engine} was made for this time: `vitopt run` keeps it")
        script = memory_text(ENGINES[self.package.engine].package, engine_module(self.package.engine).EXAMPLE)
        shape = (batch_size, 3, *self.input_size)
        return [sys.executable, "-c", script, str(self.folder), *map(str, shape)]

    @functools.cached_property
    def _layers(self) -> list[Layer]:
        return linear_layers(empty_model(self.checkpoint), self.checkpoint.config.model_type)

    def _formats(self) -> dict[str, str]:
        """Logical name -> format that it is computed in."""
        live = self.call.formats(layer.module for layer in self._layers)
        return {layer.logical: live[layer.module] for layer in self._layers}


Prepared = TorchRunnable | EngineRunnable


def make(
    checkpoint: Checkpoint,
    variant: VariantSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet | None = None,
    purpose: str = "skip list",
    scales: ImageSet | None = None,
    calibration: ImageSet | None = None,
) -> LayerPlan:
    """Write the folder of a variant, by `vitopt.optimize.quantize.quantize` or, for an engine, `package.make`.

    `images`: those on which `variant` was chosen, and the `purpose`, what was chosen; `scales`: those that give an
    engine its static scales; `calibration`: those on which torch's weights are rounded, if `variant` asks for that.

    Raises:
        VitoptError: as these.
    """
    if variant.engine in ENGINES:
        return package.make(checkpoint, variant, output, device, images=scales, chosen_on=images, purpose=purpose)
    return quantize(checkpoint, variant, output, device, images=images, purpose=purpose, calibration=calibration)


def prepare(
    checkpoint: Checkpoint,
    *,
    name: str,
    device: torch.device,
    run: RunSpec | None = None,
    asked: HeldSpec | None = None,
    strict: bool = False,
    watch_class_token: bool = False,
) -> Prepared:
    """Make a checkpoint ready to be called, by torch (`vitopt.optimize.runtime.prepare`) or the engine of `run`.

    An engine takes the file that lies beside the checkpoint. Where there is none, or one of another version, it makes
    one of the float weights for this time, which is said. `watch_class_token`: see `vitopt.optimize.class_token`; torch
    alone.

    Raises:
        UnsupportedError: the engine is not installed, does not run on this device, or cannot hold this checkpoint.
    """
    run = run or RunSpec()
    if run.engine not in ENGINES:
        watch = {"watch_class_token": watch_class_token}
        return runtime.prepare(checkpoint, name=name, device=device, run=run, asked=asked, strict=strict, **watch)
    if watch_class_token:
        raise UnsupportedError(f"{run.engine} gives logits alone: take another `proxy` than class_token")
    format = asked.format if asked else stored_format(checkpoint)
    place = checkpoint.folder / run.engine if checkpoint.folder else None
    if asked is None and place is not None and place.is_dir():
        format = read_package(place).format
    variant = VariantSpec(name="variant", format="fp32").model_copy(update={**dict(run), "format": format})
    require_runs(checkpoint, variant, device)
    facts = ENGINES[run.engine]
    made = {"name": name, "device": device, "run": run, "asked": asked}
    if place is not None and place.is_dir():
        # A file of torch's model is only that which was asked for; another engine's may have static scales unasked.
        wanted = run if run.changed(*facts.options) or (facts.torch_model and asked is not None) else None
        file = place / engine_module(run.engine).MODEL_FILE
        reason = why_not_used(read_package(place), file, checkpoint, device, wanted)
        if reason is None:
            return opened(checkpoint, place, **made)
        logger.warning("%s: the file of %s is not used, %s; it is made anew", name, run.engine, reason)
    # The images that calibrated it are not at hand, nor is it known how it was made.
    if format in QUANTIZED_FORMATS and not facts.torch_model:
        raise UnsupportedError(
            f"{checkpoint.source} has no {format} file of {run.engine} that fits: make it with `vitopt export "
            f"--engine {run.engine} --format {format} --data CALIBRATION`, or as a variant of a recipe"
        )
    with storage.temporary_folder() as folder:
        write_model(checkpoint, variant, folder, None, device)
        return replace(opened(checkpoint, folder, **made), folder=None)


def opened(checkpoint: Checkpoint, folder: Path, **made: Any) -> EngineRunnable:
    """What `write_model` left in `folder`, ready to be called; `made`: other fields of `EngineRunnable`."""
    package = read_package(folder)
    call = engine_module(package.engine).load(folder, package.settings)
    return EngineRunnable(checkpoint=checkpoint, package=package, call=call, folder=folder, **made)
