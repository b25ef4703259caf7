"""What an engine runs: a folder with a model file and all that turns a photo into a class, made of a checkpoint.

It needs the engine's own package, numpy and Pillow; `example.py` in it shows how. A variant's folder holds it beside
the checkpoint, under the engine's name.
"""

import importlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from vitopt import storage
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor, batches, random_pixels
from vitopt.engines.example import example_text, pixels
from vitopt.environment import devices, support
from vitopt.environment.devices import DTYPES
from vitopt.errors import CheckpointError, MeasurementError, UnsupportedError
from vitopt.formats import QUANTIZED_FORMATS, Format
from vitopt.models.calibration import Use, load_uses, save_uses
from vitopt.models.checkpoint import (
    PREPROCESSOR_FILE,
    Checkpoint,
    load_model,
    load_processor,
    open_checkpoint,
    save_checkpoint,
)
from vitopt.models.origin import QUANTIZE, note_origin
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.quantize import plan_for
from vitopt.recipe import ENGINES, VariantSpec
from vitopt.transformation import seen

logger = logging.getLogger(__name__)

ENGINE_FILE = "engine.json"
LABELS_FILE = "labels.json"
CALIBRATED = "activation scales"  # as the step `calibrate` notes its images
_SCHEMA = "vitopt.engine/1"


class Call(Protocol):
    """A model file that is ready to be called."""

    fixed_shapes: bool  # whether each batch size is built on its own

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """`pixel_values`: (batch, 3, height, width), float32. Returns logits (batch, classes), float32."""
        ...

    def formats(self, modules: Iterable[str]) -> dict[str, str]:
        """Format in which each of these linear modules computes, read back from what runs."""
        ...


class EngineModule(Protocol):
    """What a file of this room must hold; `run_spec.ENGINES` names them."""

    EXAMPLE: str  # lines of Python that make `logits` of `values`, the FOLDER of the model file and its SETTINGS

    def why_not(self, format: Format) -> str | None:
        """Why this processor cannot compute in a format that the engine has, or None when it can."""
        ...

    def write(
        self,
        model: nn.Module,
        size: tuple[int, int],
        plan: LayerPlan,
        images: Sequence[np.ndarray] | None,
        folder: Path,
    ) -> dict[str, Any]:
        """Write the model file and return the settings that `load` takes, plain data.

        `model`: `Logits`. `images`: those that fix the scales of int8 activations, (1, 3, height, width) each; None
        leaves them to each call.
        """
        ...

    def load(self, folder: Path, settings: Mapping[str, Any]) -> Call:
        """Open the model file in `folder`."""
        ...


class Logits(nn.Module):
    """A classifier as exporters want it: a tensor in, a tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width). Returns (batch, classes)."""
        logits: torch.Tensor = self.model(pixel_values=pixel_values).logits
        return logits


@dataclass(frozen=True)
class Package:
    """What `engine.json` says: `version` of the engine that the file was made with, `checkpoint`: the fingerprint of
    what it was made of, `calibrated`: whether images fixed its scales, `settings`: how the engine is to run it."""

    engine: str
    version: str | None
    format: Format
    checkpoint: str
    calibrated: bool
    settings: Mapping[str, Any]


def engine_module(engine: str) -> EngineModule:
    """The file that implements an engine."""
    return cast(EngineModule, importlib.import_module(ENGINES[engine].module))


def installed_version(engine: str) -> str | None:
    """Version of the engine's package."""
    return importlib.metadata.version(ENGINES[engine].package)


def read_package(folder: Path) -> Package:
    """What the folder of an engine holds.

    Raises:
        CheckpointError: `engine.json` cannot be read.
    """
    try:
        content = json.loads((folder / ENGINE_FILE).read_text(encoding="utf-8"))
        if content.pop("schema") != _SCHEMA:
            raise ValueError(f"its schema is not {_SCHEMA}")
        return Package(**content)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder / ENGINE_FILE} cannot be read ({error}): make it again") from error


def why_not_used(package: Package, checkpoint: Checkpoint) -> str | None:
    """Why a file that lies beside a checkpoint is not that of this checkpoint and engine, or None when it is."""
    if package.checkpoint != checkpoint.fingerprint():
        return "the checkpoint beside it has changed since"
    version = installed_version(package.engine)
    return None if package.version == version else f"{package.engine} {package.version} made it, this is {version}"


def make(
    checkpoint: Checkpoint,
    variant: VariantSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet | None = None,
    chosen_on: ImageSet | None = None,
    purpose: str = "skip list",
) -> LayerPlan:
    """Write `checkpoint` in floating point and beside it what the variant's engine runs; a `Transformation`.

    `images`: those that fix the scales of int8 activations. `chosen_on`: those on which `variant` was chosen, and the
    `purpose`, what was chosen. Both are noted as seen.

    Raises:
        UnsupportedError: the engine is not installed, does not run on this device, or cannot hold this model.
        CheckpointError: the checkpoint is quantized already.
        MeasurementError: what was made gives logits that are not finite, or a float file others than torch.
        StorageError: the output would replace something else, is in use, or cannot be written.
    """
    require_runs(checkpoint, variant, devices.resolve_device(device))
    calibration = calibration_pixels(checkpoint, variant, images)
    with storage.staged_folder(output) as folder:
        dtype = None if variant.format in QUANTIZED_FORMATS else DTYPES[variant.format]
        save_checkpoint(load_model(checkpoint, dtype=dtype), load_processor(checkpoint), folder)
        plan, uses = plan_for(checkpoint, variant), [] if chosen_on is None else [seen(chosen_on, purpose)]
        note_made(checkpoint, variant, plan, folder, images, uses)
        written = open_checkpoint(str(folder))
        write_package(written, variant, folder / variant.engine, calibration)
    return plan


def export(
    checkpoint: Checkpoint,
    variant: VariantSpec,
    output: Path,
    device: str = "auto",
    *,
    images: ImageSet | None = None,
    as_it_is: bool = False,
) -> Package:
    """Write what the variant's engine runs, without the checkpoint.

    `as_it_is`: the format is that of the file which a run left beside the checkpoint, and this file is taken, or that
    of the checkpoint's weights.

    Raises:
        VitoptError: as `make`.
    """
    if as_it_is:
        beside = checkpoint.folder / variant.engine if checkpoint.folder else None
        if beside is not None and beside.is_dir() and why_not_used(read_package(beside), checkpoint) is None:
            storage.copy_folder(beside, output)
            return read_package(output)
        variant = variant.model_copy(update={"format": stored_format(checkpoint)})
    require_runs(checkpoint, variant, devices.resolve_device(device))
    with storage.staged_folder(output) as folder:
        write_package(checkpoint, variant, folder, calibration_pixels(checkpoint, variant, images))
        note_made(checkpoint, variant, plan_for(checkpoint, variant), folder, images)
    return read_package(output)


def stored_format(checkpoint: Checkpoint) -> Format:
    """Number format of a checkpoint's weights; the type that is named in its configuration."""
    dtype = checkpoint.config.dtype or torch.float32
    return cast(Format, next((format for format, known in DTYPES.items() if known == dtype), "fp32"))


def note_made(
    checkpoint: Checkpoint,
    variant: VariantSpec,
    plan: LayerPlan,
    folder: Path,
    images: ImageSet | None,
    uses: Sequence[Use] = (),
) -> None:
    """Note in `folder` where it comes from and the images that it has seen: for its scales, and other `uses`."""
    before = load_uses(checkpoint.folder)
    if images is not None and (CALIBRATED, images.image_hashes) not in [(u.purpose, u.image_sha256) for u in before]:
        uses = [*uses, seen(images, CALIBRATED)]
    save_uses([*before, *uses], folder)
    held = variant.model_dump(mode="json", include={"format", "half", "skip", "layers"})
    note_origin(checkpoint, folder, QUANTIZE, **held, layer_plan=plan.counts(), engine=variant.engine)


def require_runs(checkpoint: Checkpoint, variant: VariantSpec, device: torch.device) -> None:
    """Refuse what would fail later.

    Raises:
        UnsupportedError: the engine is not installed, does not run on this device, or has no such format there.
        CheckpointError: the checkpoint is quantized.
    """
    support.require_engine(variant.engine, device)
    if checkpoint.is_quantized:
        raise CheckpointError(
            f"{checkpoint.source} is quantized, and {variant.engine} makes its own int8: give the 16- or 32-bit one"
        )
    if variant.format not in (known := ENGINES[variant.engine].formats):
        raise UnsupportedError(
            f"{checkpoint.source} is held in {variant.format}, which {variant.engine} does not run; it runs "
            f"{', '.join(known)}"
        )
    if reason := engine_module(variant.engine).why_not(variant.format):
        raise UnsupportedError(f"{variant.format} cannot run in {variant.engine} here: {reason}")


def write_package(
    checkpoint: Checkpoint, variant: VariantSpec, folder: Path, calibration: Sequence[np.ndarray] | None
) -> None:
    """Fill `folder` with what the variant's engine runs.

    Raises:
        UnsupportedError: the engine cannot hold this model, or `example.py` cannot prepare images for it.
        MeasurementError: the written model does not compute what it should.
    """
    preprocess = Preprocessor(load_processor(checkpoint))
    write_model(checkpoint, variant, folder, calibration)
    storage.write_json(folder / LABELS_FILE, checkpoint.label_names)
    preprocess.processor.save_pretrained(folder)
    _require_same_pixels(preprocess, json.loads((folder / PREPROCESSOR_FILE).read_text(encoding="utf-8")))
    engine = engine_module(variant.engine)
    storage.write_text(folder / "example.py", example_text(ENGINES[variant.engine].package, engine.EXAMPLE))


def write_model(
    checkpoint: Checkpoint, variant: VariantSpec, folder: Path, calibration: Sequence[np.ndarray] | None
) -> None:
    """Write the model file and `engine.json`, and prove that it computes; `calibration`: see `EngineModule.write`.

    Raises:
        UnsupportedError: the engine cannot hold this model.
        MeasurementError: logits are not finite or, of a format that rounds nothing, not those of torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    engine, plan = engine_module(variant.engine), plan_for(checkpoint, variant)
    model = Logits(load_model(checkpoint, dtype=torch.float32)).eval().requires_grad_(False)
    settings = engine.write(model, checkpoint.image_size, plan, calibration, folder)
    package = Package(
        engine=variant.engine,
        version=installed_version(variant.engine),
        format=variant.format,
        checkpoint=checkpoint.fingerprint(),
        calibrated=calibration is not None,
        settings=settings,
    )
    storage.write_json(folder / ENGINE_FILE, {"schema": _SCHEMA, **asdict(package)})
    _require_same_logits(model, engine.load(folder, settings), checkpoint.image_size, variant)


def calibration_pixels(
    checkpoint: Checkpoint, variant: VariantSpec, images: ImageSet | None
) -> list[np.ndarray] | None:
    """Pixels that fix the scales of activations, (1, 3, height, width) each; None leaves them to each call.

    Raises:
        UnsupportedError: the variant asks for static scales, and there are no images.
    """
    if images is None:
        if not variant.static_scales:
            return None
        if checkpoint.is_random:  # measured for speed alone, for which random pixels are as good as images
            return [random_pixels(1, checkpoint.image_size).numpy()]
        raise UnsupportedError(
            f"static scales of {variant.engine} take calibration images, and there are none: give a variant the step "
            "`calibrate`, or a command --data"
        )
    stream = batches(images, Preprocessor(load_processor(checkpoint)), 1)
    return [batch.pixel_values.numpy() for batch in stream]


def _require_same_logits(model: nn.Module, call: Call, size: tuple[int, int], variant: VariantSpec) -> None:
    values = random_pixels(2, size)
    with torch.inference_mode():
        wanted = model(values).numpy()
    found = call(values.numpy())
    if found.shape != wanted.shape or not np.isfinite(found).all():
        raise MeasurementError(f"{variant.engine} gives logits that are not finite for this model in {variant.format}")
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if variant.format == "fp32" and error > 1e-3:
        raise MeasurementError(f"{variant.engine} computes other logits than torch (relative error {error:.1e})")


def _require_same_pixels(preprocess: Callable[[Image.Image], torch.Tensor], settings: dict[str, Any]) -> None:
    """What `example.py` makes of an image must be what the checkpoint's own preprocessor makes of it."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((420, 270), Image.Resampling.BICUBIC)
    wanted, found = preprocess(image).numpy(), pixels(image, settings)[0]
    if wanted.shape != found.shape or float(np.abs(wanted - found).mean()) > 0.02:
        raise UnsupportedError(
            f"{type(preprocess).__name__} prepares images in a way that example.py does not: it knows resize, centre "
            "crop, rescale and normalise"
        )
