"""What `import vitopt` gives: the few functions that a notebook needs.

Keyword arguments are fields of the specs in `recipe.py`, with the same names, defaults and checks as in a recipe.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from torch import nn

from vitopt import inference, storage
from vitopt.adaptive.runtime import AnyPrepared, prepare
from vitopt.data.images import ALL, ImageSet, open_images
from vitopt.data.pairs import images_of
from vitopt.data.sources import parse_source
from vitopt.environment import devices
from vitopt.errors import RecipeError, RecordError
from vitopt.formats import Format
from vitopt.inference import Candidate
from vitopt.keywords import part, takes, validated
from vitopt.measure import comparison, gate, own_metrics
from vitopt.measure.predictions import PREDICTIONS_FILE, Predictions, save_predictions
from vitopt.measure.runnable import HasSeenImages, Preprocess, Runnable, Wrapped
from vitopt.models import checkpoint as checkpoints
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import Checkpoint
from vitopt.optimize.quantize import quantize as write_quantized
from vitopt.prediction import classify
from vitopt.recipe import DataSpec, EvaluateSpec, FinetuneSpec, RequireSpec, RunSpec, VariantSpec, suggest
from vitopt.records import RECORD_FILE, Outputs, Record, save_record
from vitopt.report.shown import Compared, Result, Results
from vitopt.search.analysis import analyse_for
from vitopt.training.finetune import finetune as train

__all__ = ["compare", "evaluate", "finetune", "images", "load", "open_checkpoint", "quantize", "wrap"]

Data = str | Path | ImageSet | Iterable[tuple[Any, Any]]

images = images_of


class _Finetuning(FinetuneSpec, DataSpec):
    """Keyword arguments of `finetune`."""


class _Quantizing(VariantSpec, DataSpec):
    """Keyword arguments of `quantize`."""


class _Evaluating(EvaluateSpec, RunSpec, DataSpec):
    """Keyword arguments of `evaluate`."""


_NOT_FINETUNED = dict.fromkeys(("source", "test", "skip_bad_images"), "fine-tuning does not use it")
_NOT_QUANTIZED = dict.fromkeys(("name", "source", "train", "test"), "quantize does not use it")
_NOT_QUANTIZED |= {"limit": "set the number of images as auto={'images': ...}"}
_NOT_QUANTIZED |= dict.fromkeys(
    RunSpec.model_fields, "a checkpoint does not hold how it is run: give it to load or evaluate"
)
_NOT_EVALUATED = dict.fromkeys(("source", "train"), "evaluate does not use it")


@dataclass(frozen=True, repr=False)
class Loaded:
    """A checkpoint that can be called."""

    runnable: AnyPrepared

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values`: (batch, 3, height, width), as `preprocess` makes them. Returns logits (batch, classes)."""
        return self.runnable(pixel_values.to(self.runnable.device))

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """(3, height, width) of an RGB image."""
        return self.runnable.preprocess(image)

    def predict(self, images: Any, top: int = 5) -> list[dict[str, Any]]:
        """Classify an image, or a list of them; one is a path, a Pillow image or an array, as in `vitopt.images`.

        Per image a dict: `image`, and `classes`, the `top` of them with label, index and percent.
        """
        several = list(images) if isinstance(images, list | tuple) else [images]
        return list(classify(self.runnable, images_of([(image, 0) for image in several]), top))

    def __repr__(self) -> str:
        return f"Loaded({self.runnable.name!r}, device={str(self.runnable.device)!r})"


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Check and open a checkpoint: a folder, a hub id, `vit-quickstart`, or `random:ARCHITECTURE`.

    Raises:
        CheckpointError: missing, unreadable, pickled, or not an image classifier.
    """
    return checkpoints.open_checkpoint(str(source))


@takes(_Finetuning, _NOT_FINETUNED)
def finetune(
    checkpoint: Checkpoint | str | Path,
    data: Data,
    output: str | Path,
    *,
    preprocess: Preprocess | None = None,
    seed: int = 0,
    device: str = "auto",
    **options: Any,
) -> Checkpoint:
    """Fine-tune a checkpoint and write the merged fp32 checkpoint to the folder `output`.

    `data`: a folder, a hub data set id, `digits`, (image, label) pairs, or what `vitopt.images` makes of them. Images
    with sets of labels train a head of independent labels. `preprocess` makes (channels, height, width) of an RGB
    image instead of the checkpoint's own processor; give it to `evaluate` and `load` too. Other keywords are those of
    `finetune` and `data` in a recipe, as `epochs=1`.

    Raises:
        VitoptError: what is wrong with the keywords, the data, the checkpoint or the output, in one line.
    """
    spec = validated(_Finetuning, "finetune", options, _NOT_FINETUNED, source=_name_of(data))
    opened = _opened(checkpoint)
    training, how = _images(data, spec, spec.train), part(spec, FinetuneSpec)
    own = _checked(preprocess)
    train(opened, how, Path(output), device, images=training, seed=seed, preprocess=own)
    return open_checkpoint(output)


@takes(_Quantizing, _NOT_QUANTIZED)
def quantize(
    checkpoint: Checkpoint | str | Path,
    output: str | Path,
    *,
    format: Format,
    data: Data | None = None,
    device: str = "auto",
    **options: Any,
) -> Checkpoint:
    """Write a checkpoint in another format to the folder `output`, which opens with plain transformers.

    `skip=["block.0"]` keeps layers in 16 bit; `skip="auto"` chooses them on `data`, never the tested images, and leaves
    its scores in `OUTPUT.sensitivity`. `rounding="gptq"` rounds weights on `data`. Other keywords are those of a
    variant and of `data` in a recipe.

    Raises:
        VitoptError: what is wrong with the keywords, the data, the checkpoint or the output, in one line.
    """
    spec = validated(
        _Quantizing, "quantize", options, _NOT_QUANTIZED, name="variant", format=format, source=_name_of(data)
    )
    variant, opened, place = part(spec, VariantSpec), _opened(checkpoint), Path(output).resolve()
    if (variant.skips_automatically or variant.rounding is not None) != (data is not None):
        raise RecipeError("quantize: skip='auto', or rounding='gptq', and data belong together: give both, or neither")
    calibration = rounded_on = None
    if data is not None and variant.rounding is not None:
        limited = spec.model_copy(update={"limit": variant.rounding.images})
        rounded_on = _images(data, limited, variant.rounding.split)
    if data is not None and variant.skips_automatically:
        limited = spec.model_copy(update={"limit": variant.auto.images})
        calibration = _images(data, limited, variant.auto.split)
        if calibration.label_sets is not None:
            raise RecipeError("quantize: skip='auto' chooses by top-1 and KL, and images with sets of labels have none")
        scores = place.with_name(f"{place.name}.sensitivity")
        folders = opened.folder, part(spec, DataSpec).folder
        with storage.reserved(place, *folders), storage.claimed(scores, *folders):
            path = scores / "sensitivity.json"
            search = analyse_for(opened, calibration, variant, path, device, skip_bad=spec.skip_bad_images).search
        assert search is not None
        variant = variant.skipping(search.chosen)
    write_quantized(opened, variant, place, device, images=calibration, calibration=rounded_on)
    return open_checkpoint(output)


@takes(_Evaluating, _NOT_EVALUATED)
def evaluate(
    models: Any,
    data: Data | None = None,
    *,
    baseline: str | None = None,
    metrics: Any = None,
    preprocess: Preprocess | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    strict: bool = False,
    **options: Any,
) -> Results:
    """Measure models together: accuracy on `data` where it is given, latency, size and memory.

    `models`: one, or a dict by name, of which the first is the `baseline` unless it is named. Each is a checkpoint,
    what `load` or `wrap` returned, or anything with the members of `vitopt.measure.runnable.Runnable`. `data`: as for
    `finetune`; where vitopt divides it, models that have seen images are measured on its test part. `metrics`: a
    function of (outputs, labels) or an `evaluate.Metric`, or a dict of these by name, see
    `vitopt.measure.own_metrics`. `preprocess` stands instead of the checkpoints' own. `output`: a folder for records
    and predictions. Other keywords are those of a variant's run, of `evaluate` and of `data` in a recipe, as
    `compile=True` or `latency={"batch_sizes": [1, 8]}`.

    Raises:
        VitoptError: what is wrong with the keywords, the data, a model, a metric or the output, in one line.
    """
    spec = validated(_Evaluating, "evaluate", options, _NOT_EVALUATED, source=_name_of(data))
    named = models if isinstance(models, Mapping) else {_label(models): models}
    candidates = [_candidate(str(name), model, part(spec, RunSpec), preprocess) for name, model in named.items()]
    names = [candidate.name for candidate in candidates]
    if not names:
        raise RecipeError("evaluate: no model is given")
    if baseline is not None and baseline not in names:
        raise RecipeError(f"evaluate: baseline {baseline!r} is not one of the models; {suggest(baseline, names)}")
    wanted = own_metrics.named(metrics)
    if wanted and data is None:
        raise RecipeError("evaluate: metrics need data")
    own = _checked(preprocess)
    if not any(isinstance(candidate.source, Checkpoint) for candidate in candidates):
        useless = [*(set(RunSpec.model_fields) & set(options)), *(["preprocess"] if own else [])]
        if useless:
            raise RecipeError(f"evaluate: {min(useless)} is for checkpoints, and none of the models is one")
    folders = {name: Path(output) / "variants" / name for name in names} if output is not None else {}
    for name in folders:
        if Path(name).name != name:
            raise RecipeError(f"evaluate: the model's name {name!r} cannot be the name of a folder: choose another")
    files = [f"variants/{name}/{file}" for name in folders for file in (RECORD_FILE, PREDICTIONS_FILE)]
    with nullcontext() if output is None else storage.claimed(Path(output), part(spec, DataSpec).folder, files=files):
        measured = inference.measure(
            candidates,
            part(spec, EvaluateSpec),
            images=None if data is None else _tested(data, spec, candidates),
            skip_bad=spec.skip_bad_images,
            baseline=baseline or (names[0] if len(names) > 1 else None),
            device=device,
            strict=strict,
            metrics=wanted,
        )
        results = [Result(result.record, result.predictions) for result in measured]
        for result in results if output is not None else ():
            folder = folders[result.record.variant.name]
            save_record(result.record, folder)
            if result.predictions is not None:
                save_predictions(result.predictions, folder)
    return Results(results)


@takes(RequireSpec)
def compare(variant: Result | str | Path, baseline: Result | str | Path, **limits: Any) -> Compared:
    """Compare two results image by image, and decide by their 95 % intervals whether `limits` are kept.

    Each is a result of `evaluate`, or a folder with a stored one. Limits are those of `require` in a recipe, as
    `max_top1_drop=0.5`.

    Raises:
        RecipeError: a limit that does not exist.
        RecordError: one has failed or has no images, or they are over different images.
    """
    require = validated(RequireSpec, "compare", limits)
    compared = comparison.compare_measured(_measured(baseline), _measured(variant))
    before, after = compared.records
    required = gate.judge(require, after, before)
    record = after.model_copy(update={"requirements": required})
    return Compared(compared, record, gate.overall(required) if required else None)


@takes(RunSpec)
def load(
    checkpoint: Checkpoint | str | Path,
    *,
    preprocess: Preprocess | None = None,
    device: str = "auto",
    strict: bool = False,
    **options: Any,
) -> Loaded:
    """Load a checkpoint so that it can be called. Keywords are those of a variant's run in a recipe, as `compile=True`.

    Raises:
        VitoptError: what is wrong with the keywords or the checkpoint, or cannot run here, in one line.
    """
    run = validated(RunSpec, "load", options)
    opened, target = _opened(checkpoint), devices.resolve_device(device)
    runnable = prepare(opened, name=opened.source, device=target, run=run, strict=strict)
    if own := _checked(preprocess):
        runnable.preprocess = own
    return Loaded(runnable)


def wrap(
    model: Callable[[torch.Tensor], Any],
    preprocess: Preprocess,
    *,
    name: str | None = None,
    outputs: Outputs = "classes",
    label_names: Sequence[str] | None = None,
    device: str | None = None,
) -> Runnable:
    """Let a function or a torch module, which is set to evaluation mode, be measured like a checkpoint.

    `model` takes (batch, channels, height, width) and returns (batch, outputs), or something with `logits`.
    `preprocess` makes (channels, height, width) of an RGB image. `outputs`: a logit for each of `classes`, of which
    one is right; a logit for each of independent `labels`; or an `embedding`. `label_names` are what classes or labels
    are called, in order. `device` None is that of the module's weights.

    Raises:
        RecipeError: the model or `preprocess` cannot be called or fails, or there are no such outputs.
    """
    if not callable(model):
        raise RecipeError(f"wrap: the model is a {type(model).__name__}, which cannot be called")
    if outputs not in get_args(Outputs):
        raise RecipeError(f"wrap: outputs {outputs!r} do not exist; {suggest(str(outputs), get_args(Outputs))}")
    if device is None:
        weights = model.parameters() if isinstance(model, nn.Module) else iter(())
        target = next((weight.device for weight in weights), torch.device("cpu"))
    else:
        target = devices.resolve_device(device)
    names = None if label_names is None else tuple(map(str, label_names))
    own = _checked(preprocess)
    assert own is not None
    return Wrapped(model, own, name or _label(model), target, outputs, names)


def _opened(checkpoint: Checkpoint | str | Path) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)


def _name_of(data: Data | None) -> str:
    return str(data) if isinstance(data, str | Path) else "(image, label) pairs"


def _label(model: Any) -> str:
    """The name of a model that is given without one."""
    model = model.runnable.checkpoint if isinstance(model, Loaded) else model
    source = model.source if isinstance(model, Checkpoint) else getattr(model, "name", None)
    if isinstance(model, str | Path) or source is not None:
        return Path(source or model).name
    return getattr(model, "__name__", type(model).__name__)


def _candidate(name: str, model: Any, run: RunSpec, preprocess: Preprocess | None) -> Candidate:
    if isinstance(model, str | Path | Checkpoint):
        return Candidate(name, _opened(model), run, preprocess=preprocess)
    runnable = model.runnable if isinstance(model, Loaded) else model
    missing = [
        member for member in ("name", "device", "preprocess", "describe", "__call__") if not hasattr(runnable, member)
    ]
    if missing:
        raise RecipeError(
            f"evaluate: model {name!r} is a {type(model).__name__}, which has no {missing[0]}: give a checkpoint, or "
            "vitopt.wrap(model, preprocess)"
        )
    return Candidate(name, runnable)


def _images(data: Data, spec: Any, split: str | None) -> ImageSet:
    if isinstance(data, str | Path):
        return open_images(part(spec, DataSpec), split)
    useless = spec.model_fields_set & set(DataSpec.model_fields) - {"source", "limit", "skip_bad_images"}
    if useless:
        raise RecipeError(f"{min(useless)}: it is only for a folder or a data set of the hub, and data is pairs")
    return (data if isinstance(data, ImageSet) else images_of(data)).limited(spec.limit)


def _tested(data: Data, spec: _Evaluating, candidates: Sequence[Candidate]) -> ImageSet:
    opened = _images(data, spec, spec.test)
    divided = isinstance(data, str | Path) and opened.split == ALL
    if divided and spec.test is None and parse_source(str(data))[1] is None and any(map(_has_seen, candidates)):
        return _images(data, spec, "test")
    return opened


def _has_seen(candidate: Candidate) -> bool:
    source = candidate.source
    if isinstance(source, Checkpoint):
        return bool(load_uses(source.folder))
    return isinstance(source, HasSeenImages) and bool(source.images_seen())


def _checked(preprocess: Preprocess | None) -> Preprocess | None:
    """The same function, after it has prepared a test image."""
    if preprocess is None:
        return None
    try:
        made = preprocess(Image.new("RGB", (64, 64)))
    except Exception as error:  # the user's code may raise any type
        raise RecipeError(f"preprocess failed on an image of 64 x 64: {type(error).__name__}: {error}") from error
    if not isinstance(made, torch.Tensor) or made.ndim != 3 or not made.is_floating_point():
        what = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, torch.Tensor) else type(made).__name__
        raise RecipeError(f"preprocess must return a float tensor (channels, height, width), not {what}")
    return preprocess


def _measured(result: Result | str | Path) -> tuple[Record, Predictions]:
    if not isinstance(result, Result):
        return comparison.stored(Path(result))
    if result.predictions is None:
        why = result.record.failure or "it was measured without data"
        raise RecordError(f"{result.record.variant.name} cannot be compared: {why}")
    return result.record, result.predictions
