"""What an engine runs: a folder with a model file and all that turns a photo into a class, made of a checkpoint.

It needs the engine's own package, numpy and Pillow; `example.py` in it shows how. A variant's folder holds it beside
the checkpoint, under the engine's name.
"""

import contextlib
import importlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from vitopt import storage, threads
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor, batches, random_pixels
from vitopt.engines.example import example_text, pixels
from vitopt.engines.note import (
    Package,
    installed_version,
    kind_of_device,
    options_of,
    read_package,
    why_not_used,
    write_note,
)
from vitopt.engines.seal import sealed
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
from vitopt.optimize.formats import stored_formats
from vitopt.optimize.plan import LayerPlan
from vitopt.optimize.quantize import plan_for, quantize
from vitopt.optimize.runtime import prepare
from vitopt.recipe import ENGINES, VariantSpec
from vitopt.transformation import seen

logger = logging.getLogger(__name__)

LABELS_FILE = "labels.json"
CALIBRATED = "activation scales"  # as the step `calibrate` notes its images


class Call(Protocol):
    """A model file that is ready to be called."""

    fixed_shapes: bool  # whether each batch size is built on its own

    def __call__(self, pixel_values: Any) -> Any:
        """`pixel_values`: (batch, 3, height, width), float32; a torch tensor on its device where the engine
        `takes_tensors`, else an array. Returns logits (batch, classes) of the same kind."""
        ...

    def formats(self, modules: Iterable[str]) -> dict[str, str]:
        """Format in which each of these linear modules computes, read back from what runs."""
        ...


class EngineModule(Protocol):
    """What a file of this room must hold; `run_spec.ENGINES` names them."""

    MODEL_FILE: str  # its name in the folder
    EXAMPLE: str  # lines of Python that make `logits` of `values`, the FOLDER of the model file and its SETTINGS

    def why_not(self, format: Format) -> str | None:
        """Why this processor cannot compute in a format that the engine has, or None when it can."""
        ...

    def write(
        self,
        model: Any,
        size: tuple[int, int],
        plan: LayerPlan,
        images: Sequence[np.ndarray] | None,
        folder: Path,
    ) -> dict[str, Any]:
        """Write the model file and return the settings that `load` takes, plain data.

        `model`: `Logits` in fp32, or for an engine with `torch_model` the `TorchRunnable` that it compiles. `images`:
        those that fix the scales of 8-bit activations, (1, 3, height, width) each; None leaves them to each call.
        Settings that a record tells: `weight_bytes`, `ran`, `reasons`.
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


def engine_module(engine: str) -> EngineModule:
    """The file that implements an engine."""
    return cast(EngineModule, importlib.import_module(ENGINES[engine].module))


def answers(engine: str, call: Call, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits (batch, classes) of `pixel_values`, (batch, 3, height, width) on the engine's device."""
    if ENGINES[engine].takes_tensors:
        return cast(torch.Tensor, call(pixel_values))
    return torch.from_numpy(call(pixel_values.numpy()))


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
    target = devices.resolve_device(device)
    require_runs(checkpoint, variant, target)
    calibration = calibration_pixels(checkpoint, variant, images)
    if ENGINES[variant.engine].torch_model:
        with storage.temporary_folder() as place:
            plan = quantize(checkpoint, variant, place / "made", device, images=chosen_on, purpose=purpose)
            made = place / "made"
            write_package(open_checkpoint(str(made)), variant, made / variant.engine, None, target)
            storage.copy_folder(made, output)
        return plan
    with storage.staged_folder(output) as folder:
        dtype = None if variant.format in QUANTIZED_FORMATS else DTYPES[variant.format]
        save_checkpoint(load_model(checkpoint, dtype=dtype), load_processor(checkpoint), folder)
        plan, uses = plan_for(checkpoint, variant), [] if chosen_on is None else [seen(chosen_on, purpose)]
        note_made(checkpoint, variant, plan, folder, images, uses)
        written = open_checkpoint(str(folder))
        write_package(written, variant, folder / variant.engine, calibration, target)
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
    target = devices.resolve_device(device)
    if as_it_is:
        beside = checkpoint.folder / variant.engine if checkpoint.folder else None
        if beside is not None and beside.is_dir() and fits(beside, checkpoint, target):
            storage.copy_folder(beside, output)
            return read_package(output)
        variant = variant.model_copy(update={"format": stored_format(checkpoint)})
    require_runs(checkpoint, variant, target)
    with _held_as_asked(checkpoint, variant, device) as held, storage.staged_folder(output) as folder:
        write_package(held, variant, folder, calibration_pixels(checkpoint, variant, images), target)
        note_made(checkpoint, variant, plan_for(checkpoint, variant), folder, images)
    return read_package(output)


@contextlib.contextmanager
def _held_as_asked(checkpoint: Checkpoint, variant: VariantSpec, device: str) -> Iterator[Checkpoint]:
    """The checkpoint itself; for an engine that runs torch's formats it is held in that of the variant."""
    if not ENGINES[variant.engine].torch_model or variant.format == stored_format(checkpoint):
        yield checkpoint
        return
    with storage.temporary_folder() as place:
        quantize(checkpoint, variant, place / "made", device)
        yield open_checkpoint(str(place / "made"))


def fits(folder: Path, checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether the files of an engine that lie in `folder` are those of the checkpoint, here."""
    package = read_package(folder)
    file = folder / engine_module(package.engine).MODEL_FILE
    return why_not_used(package, file, checkpoint, device) is None


def stored_format(checkpoint: Checkpoint) -> Format:
    """Number format of a checkpoint's weights: the quantized one, else the type that is named in its configuration."""
    if checkpoint.is_quantized and (stored := stored_formats(checkpoint.config)):
        return stored[0]
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
    if checkpoint.is_quantized and not ENGINES[variant.engine].torch_model:
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
    checkpoint: Checkpoint,
    variant: VariantSpec,
    folder: Path,
    calibration: Sequence[np.ndarray] | None,
    device: torch.device,
) -> None:
    """Fill `folder` with what the variant's engine runs.

    Raises:
        UnsupportedError: the engine cannot hold this model, or `example.py` cannot prepare images for it.
        MeasurementError: the written model does not compute what it should.
    """
    preprocess = Preprocessor(load_processor(checkpoint))
    write_model(checkpoint, variant, folder, calibration, device)
    storage.write_json(folder / LABELS_FILE, checkpoint.label_names)
    preprocess.processor.save_pretrained(folder)
    _require_same_pixels(preprocess, json.loads((folder / PREPROCESSOR_FILE).read_text(encoding="utf-8")))
    engine = engine_module(variant.engine)
    storage.write_text(folder / "example.py", example_text(ENGINES[variant.engine].example_packages, engine.EXAMPLE))


def write_model(
    checkpoint: Checkpoint,
    variant: VariantSpec,
    folder: Path,
    calibration: Sequence[np.ndarray] | None,
    device: torch.device,
) -> None:
    """Write the model file and `engine.json`, and prove that it computes; `calibration`: see `EngineModule.write`.

    Raises:
        UnsupportedError: the engine cannot hold this model.
        MeasurementError: logits are not finite or, of a format that rounds nothing, not those of torch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    engine, facts = engine_module(variant.engine), ENGINES[variant.engine]
    plan = plan_for(checkpoint, variant)
    model: Any
    if facts.torch_model:
        model = prepare(checkpoint, name=variant.name, device=device, run=variant.run)
    else:
        model = Logits(load_model(checkpoint, dtype=torch.float32)).eval().requires_grad_(False)
    with threads.unbound():  # quantizers compute, and compilers start processes
        settings = engine.write(model, checkpoint.image_size, plan, calibration, folder)
    package = Package(
        engine=variant.engine,
        version=installed_version(variant.engine),
        format=variant.format,
        checkpoint=checkpoint.fingerprint(),
        calibrated=calibration is not None,
        settings=settings,
        device=kind_of_device(variant.engine, device),
        options=options_of(variant.run),
        seal=sealed(folder / engine.MODEL_FILE, checkpoint.fingerprint()) if facts.for_one_device else None,
    )
    write_note(package, folder)
    _require_same_logits(model, engine.load(folder, settings), checkpoint.image_size, variant, device)


def calibration_pixels(
    checkpoint: Checkpoint, variant: VariantSpec, images: ImageSet | None
) -> list[np.ndarray] | None:
    """Pixels that fix the scales of activations, (1, 3, height, width) each; None leaves them to each call.

    Raises:
        UnsupportedError: the variant asks for static scales, and there are no images.
    """
    if ENGINES[variant.engine].torch_model:
        return None
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


def _require_same_logits(
    model: Any, call: Call, size: tuple[int, int], variant: VariantSpec, device: torch.device
) -> None:
    values = random_pixels(2, size)
    on_device = values.to(device)
    with torch.inference_mode():
        wanted = model(on_device if ENGINES[variant.engine].torch_model else values).float().cpu().numpy()
    found = answers(variant.engine, call, on_device).float().cpu().numpy()
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
