"""A whole sensitivity analysis of one checkpoint and format: tables, costs, and, if asked, the skip list."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from vitopt import environment, progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.data.pixels import Preprocessor, batches
from vitopt.environment import DTYPES
from vitopt.errors import CheckpointError, DataError, RecipeError
from vitopt.formats import QUANTIZED_FORMATS, Format, HalfFormat
from vitopt.measure import statistics
from vitopt.measure.accuracy import compare
from vitopt.measure.latency import clock_for, time_interleaved
from vitopt.measure.predictions import Predictions
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, weight_bytes
from vitopt.models.names import block_names
from vitopt.optimize.formats import quantization_config
from vitopt.optimize.quantize import plan_for
from vitopt.recipe import LatencySpec, VariantSpec
from vitopt.search.hybrid import Hybrid
from vitopt.search.results import Loss, SearchResult, Sensitivity, UnitScores, save_sensitivity
from vitopt.search.sensitivity import (
    DEFAULT_MEMORY_BYTES,
    Calibration,
    Granularity,
    Table,
    Unit,
    table_logits,
    units,
)
from vitopt.search.skiplist import Goal, Objective, search_skip_list

_FINGERPRINT_FILE = "inputs.sha256"
_LATENCY = LatencySpec(batch_sizes=(1,), iterations=60, rounds=10, warmup_seconds=5)


def analyse(
    checkpoint: Checkpoint,
    images: ImageSet,
    format: Format,
    output: Path,
    *,
    half: HalfFormat = "bf16",
    granularity: Granularity = "block",
    sample: int | None = None,
    candidates: int = 8,
    goal: Goal | None = None,
    objective: Objective = "size",
    device: str = "auto",
    batch_size: int = 32,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
) -> Sensitivity:
    """Score every unit of `checkpoint` in `format`; with a `goal`, also search the skip list that meets it.

    `sample` first ranks all units by their KL on so many images, labels unused, and scores only the best
    `candidates` exactly. The result is the file `output`; finished units are stored beside it as they come, and
    an interrupted analysis goes on from there.

    Raises:
        RecipeError: the format quantizes nothing.
        UnsupportedError: the device cannot run the format.
        CheckpointError: the checkpoint is quantized already.
        DataError: the labels do not fit the head.
    """
    if format not in QUANTIZED_FORMATS:
        raise RecipeError(f"format {format} quantizes nothing; sensitivity needs one of {', '.join(QUANTIZED_FORMATS)}")
    if checkpoint.is_quantized:
        raise CheckpointError(f"{checkpoint.source} is quantized already; give the 16- or 32-bit checkpoint")
    target = environment.resolve_device(device)
    environment.require_format(format, target)
    started = time.perf_counter()
    images = fit_labels(images, checkpoint.label_names)
    analysis = _Analysis(checkpoint, format, half, granularity, target, memory_bytes)
    calibration = _calibrate(images, checkpoint, target, batch_size)
    analysis.start(calibration, output)
    sample_kl: dict[str, float] = {}
    chosen = analysis.units
    if sample is not None and len(chosen) > candidates:
        sample_kl = analysis.sample_scores(sample)
        best = sorted(sample_kl, key=lambda name: sample_kl[name])[:candidates]
        chosen = [unit for unit in chosen if unit.name in best]
    scores = analysis.scores(chosen)
    found = analysis.search(scores, goal, objective) if goal is not None else None
    result = Sensitivity(
        checkpoint=checkpoint.source,
        checkpoint_sha256=checkpoint.fingerprint(),
        format=format,
        half=half,
        granularity=granularity,
        images=len(images),
        dataset=images.name,
        dataset_sha256=images.sha256,
        sample_images=min(sample, len(images)) if sample_kl and sample is not None else None,
        sample_kl=sample_kl,
        quantized=analysis.quantized,
        units=tuple(scores),
        seconds=round(time.perf_counter() - started, 1),
        search=found,
        environment=environment.describe(target),
    )
    save_sensitivity(result, output)
    storage.remove(analysis.partial)
    return result


def analyse_for(
    checkpoint: Checkpoint, images: ImageSet, variant: VariantSpec, output: Path, device: str = "auto"
) -> Sensitivity:
    """The analysis and search that a variant with `skip: auto` asks for; see `analyse`."""
    auto = variant.auto
    return analyse(
        checkpoint,
        images,
        variant.format,
        output,
        half=variant.half,
        granularity=auto.granularity,
        sample=auto.sample,
        goal=Goal(auto.max_top1_drop, auto.max_kl_share),
        objective=auto.objective,
        device=device,
    )


def require_disjoint(calibration: ImageSet, test: ImageSet) -> None:
    """Refuse calibration images that are also test images: a skip list chosen on them would flatter itself.

    Raises:
        DataError: at least one image is in both, by content.
    """
    shared = set(calibration.image_hashes) & set(test.image_hashes)
    if shared:
        first = next(n for n, h in zip(calibration.ids, calibration.image_hashes, strict=True) if h in shared)
        raise DataError(
            f"{len(shared)} calibration images are also test images (first: {first}); choose the skip list on other "
            "images, such as the training split"
        )


def _calibrate(images: ImageSet, checkpoint: Checkpoint, device: torch.device, batch_size: int) -> Calibration:
    stream = batches(images, Preprocessor(load_processor(checkpoint)), batch_size)
    steps = -(-len(images) // batch_size)
    pixels = [batch.pixel_values.to(device) for batch in progress.track(stream, "calibration images", steps)]
    return Calibration(images.ids, images.image_hashes, np.array(images.labels), tuple(pixels))


class _Analysis:
    """The two models, what is known so far, and where it is stored."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        format: Format,
        half: HalfFormat,
        granularity: Granularity,
        device: torch.device,
        memory_bytes: int,
    ):
        variant = VariantSpec(name=format, format=format, half=half)
        plan = plan_for(checkpoint, variant)
        config = quantization_config(plan, DTYPES[half])
        exact = load_model(checkpoint, dtype=DTYPES[half], device=device)
        packed = load_model(checkpoint, dtype=DTYPES[half], device=device, quantization=config)
        layers = [planned.layer for planned in plan.layers if planned.format == format]
        blocks = block_names(exact, checkpoint.config.model_type)
        self.from_exact = Hybrid(exact, packed, blocks)
        self.from_packed = Hybrid(packed, exact, blocks)
        self.units = units(layers, granularity)
        self._device, self._memory_bytes = device, memory_bytes
        self._identity = [checkpoint.fingerprint(), format, half, granularity]

    def start(self, calibration: Calibration, output: Path) -> None:
        """Take over what an interrupted analysis of the same inputs has left, and nothing of another's."""
        self.calibration = calibration
        self.partial = output.with_suffix(".partial")
        fingerprint = storage.sha256_of_json([*self._identity, list(calibration.image_sha256)])
        left = self.partial / _FINGERPRINT_FILE
        if not left.is_file() or left.read_text() != fingerprint:
            with storage.staged_folder(self.partial) as folder:
                storage.write_text(folder / _FINGERPRINT_FILE, fingerprint)

    def sample_scores(self, images: int) -> dict[str, float]:
        """Recovery KL of every unit on the first batches that hold `images` images; labels are not used."""
        size = len(self.calibration.batches[0])
        count = max(1, min(len(self.calibration.batches), round(images / size)))
        few = self.calibration.batches[:count]
        if images < size:
            few = (self.calibration.batches[0][:images],)
        seen = sum(map(len, few))
        sample = Calibration(
            self.calibration.ids[:seen], self.calibration.image_sha256[:seen], self.calibration.labels[:seen], few
        )
        reference = sample.predictions([self.from_exact.logits(pixels) for pixels in few]).logits
        found: dict[str, float] = {}

        def done(unit: str, logits: list[torch.Tensor]) -> None:
            found[unit] = statistics.mean_kl_divergence(reference, sample.predictions(logits).logits)

        self._run(self.from_packed, sample, self.units, done, "sampling")
        return found

    def scores(self, chosen: Sequence[Unit]) -> list[UnitScores]:
        """Both tables for `chosen`, with what keeping each unit costs."""
        self.exact = self._fill("damage", self.from_exact, chosen)
        self.packed = self._fill("recovery", self.from_packed, chosen)
        self.quantized = _loss(self.exact, self.exact, self.packed)
        milliseconds = self._extra_ms(chosen)
        return [
            UnitScores(
                unit=unit.name,
                damage=_loss(self.exact, self.exact, self._stored("damage", unit)),
                recovery=_loss(self.exact, self.packed, self._stored("recovery", unit)),
                extra_bytes=self._extra_bytes(unit),
                extra_ms=milliseconds[unit.name],
            )
            for unit in chosen
        ]

    def _fill(self, table: Table, hybrid: Hybrid, chosen: Sequence[Unit]) -> Predictions:
        """Store the logits of every mixture that is not stored yet; return those of the unmixed model."""

        def done(unit: str, logits: list[torch.Tensor]) -> None:
            storage.write_bytes(self._file(table, unit), safetensors.torch.save({"logits": torch.cat(logits)}))

        missing = [unit for unit in chosen if not self._file(table, unit.name).is_file()]
        return self.calibration.predictions(self._run(hybrid, self.calibration, missing, done, table))

    def _file(self, table: Table, unit: str) -> Path:
        return self.partial / f"{table}-{unit}.safetensors"

    def _stored(self, table: Table, unit: Unit) -> Predictions:
        return self.calibration.predictions([safetensors.torch.load_file(self._file(table, unit.name))["logits"]])

    def _run(
        self,
        hybrid: Hybrid,
        calibration: Calibration,
        chosen: Sequence[Unit],
        done: Callable[[str, list[torch.Tensor]], None],
        description: str,
    ) -> list[torch.Tensor]:
        return table_logits(
            hybrid, calibration, chosen, memory_bytes=self._memory_bytes, done=done, description=description
        )

    def _extra_bytes(self, unit: Unit) -> int:
        exact, packed = self.from_exact.base, self.from_packed.base
        return sum(
            weight_bytes(exact.get_submodule(layer.module)) - weight_bytes(packed.get_submodule(layer.module))
            for layer in unit.layers
        )

    def _extra_ms(self, chosen: Sequence[Unit]) -> dict[str, float | None]:
        """Milliseconds that each unit costs in 16 bit, at batch 1, measured once per kind of unit.

        Units of the same shapes take the same time; one block of each kind is timed with and without it.
        """
        found: dict[tuple[object, ...], float | None] = {}
        result: dict[str, float | None] = {}
        for unit in chosen:
            kind = tuple((layer.logical.rsplit(".", 1)[-1], layer.parameters) for layer in unit.layers)
            if kind not in found:
                found[kind] = self._time_unit(unit)
            result[unit.name] = found[kind]
        return result

    def _time_unit(self, unit: Unit) -> float | None:
        hybrid = self.from_packed
        call = hybrid.block_call(self.calibration.batches[0][:1], unit.block)

        @torch.inference_mode()
        def packed() -> object:
            return call()

        def kept() -> object:
            with hybrid.lending(unit.layers):
                return packed()

        timings = time_interleaved({"packed": packed, "kept": kept}, _LATENCY, clock_for(self._device), "cost")
        if any(timing.failure for timing in timings.values()):
            return None
        medians = {name: float(np.median(timing.samples_ms)) for name, timing in timings.items()}
        return medians["kept"] - medians["packed"]

    def search(self, scores: Sequence[UnitScores], goal: Goal, objective: Objective) -> SearchResult:
        """The cheapest skip list that meets `goal` on the calibration images."""
        by_name = {unit.name: unit for unit in self.units}

        def evaluate(names: frozenset[str]) -> Loss:
            kept = [layer for name in names for layer in by_name[name].layers]
            with self.from_packed.lending(kept):
                logits = [self.from_packed.logits(pixels) for pixels in self.calibration.batches]
            return _loss(self.exact, self.exact, self.calibration.predictions(logits))

        return search_skip_list(
            scores, evaluate, goal, quantized=self.quantized, images=len(self.calibration.ids), objective=objective
        )


def _loss(exact: Predictions, reference: Predictions, changed: Predictions) -> Loss:
    """`changed` against the 16-bit model; its top-1 against `reference`."""
    versus = compare("reference", reference, changed)
    return Loss(
        top1_delta_points=versus.top1_delta_points,
        top1_delta_ci95_points=versus.top1_delta_ci95_points,
        agreement_percent=100 * statistics.agreement(exact.classes, changed.classes),
        kl=statistics.mean_kl_divergence(exact.logits, changed.logits),
        logit_error=statistics.normalised_error(exact.logits, changed.logits),
    )
