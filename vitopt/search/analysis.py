"""A whole sensitivity analysis of one checkpoint and format: tables, costs, and, if asked, the skip list."""

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from vitopt import progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.data.pixels import Preprocessor
from vitopt.environment import devices, machine, support
from vitopt.environment.devices import DTYPES
from vitopt.errors import BadImageError, DataError, RecipeError
from vitopt.formats import QUANTIZED_FORMATS, Format, HalfFormat
from vitopt.measure.logit_statistics import mean_kl_divergence
from vitopt.measure.predictions import Predictions
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor
from vitopt.models.names import Layer, block_names
from vitopt.optimize.formats import quantization_config
from vitopt.optimize.hybrid import Boundary, Hybrid
from vitopt.optimize.quantize import plan_for
from vitopt.recipe import Engine, VariantSpec, computes_itself
from vitopt.run_spec import granularity_of, objective_of
from vitopt.search.confirmation import divide, loss, loss_with_share
from vitopt.search.costs import extra_bytes, extra_ms
from vitopt.search.goal import Goal, power_note
from vitopt.search.rebuilt import Rebuilt
from vitopt.search.results import Loss, SearchResult, Sensitivity, UnitScores, save_sensitivity
from vitopt.search.reuse import given, inputs_of, standing, taken_over
from vitopt.search.sensitivity import (
    DEFAULT_MEMORY_BYTES,
    Calibration,
    Granularity,
    Scoring,
    Unit,
    calibration_of,
    mixture_logits,
    units,
)
from vitopt.search.skiplist import Objective, search_skip_list
from vitopt.transformation import require_float

logger = logging.getLogger(__name__)


def analyse(
    checkpoint: Checkpoint,
    images: ImageSet,
    format: Format,
    output: Path,
    *,
    half: HalfFormat = "bf16",
    engine: Engine = "torch",
    static_scales: bool = False,
    scales: ImageSet | None = None,
    granularity: Granularity | None = None,
    sample: int | None = None,
    candidates: int = 8,
    goal: Goal | None = None,
    objective: Objective | None = None,
    device: str = "auto",
    batch_size: int = 32,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    skip_bad: bool = False,
    known: Path | None = None,
) -> Sensitivity:
    """Score every unit of `checkpoint` in `format`; with a `goal`, also search the skip list that meets it.

    With a goal a fixed part of the images scores and chooses, and the rest confirms (see `confirmation`).
    `engine`: what computes; torch searches for one that compiles its model. With `static_scales` the images `scales`
    fix the scales of its activations. Without `granularity` and `objective` they are those of `granularity_of` and
    `objective_of`. `sample` first ranks all units by their KL on so many images, labels unused, and scores only the
    best `candidates` exactly. `skip_bad` leaves out images that cannot be decoded. The result is the file `output`;
    finished units are stored beside it as they come, and an interrupted analysis goes on from there. A result at
    `output` that is of all the same stands; one at `known` is copied, and must be of all the same.

    Raises:
        RecipeError: the format quantizes nothing, or `known` is of other things.
        RecordError: there is no result at `known`.
        UnsupportedError: the device cannot run the format.
        CheckpointError: the checkpoint is quantized already.
        DataError: the labels do not fit the head, or there are too few images.
        BadImageError: an image cannot be decoded and `skip_bad` is false.
    """
    if format not in QUANTIZED_FORMATS:
        raise RecipeError(f"format {format} quantizes nothing; sensitivity needs one of {', '.join(QUANTIZED_FORMATS)}")
    require_float(checkpoint)
    target = devices.resolve_device(device)
    if not computes_itself(engine):
        engine = "torch"  # whose model it is
        support.require_format(format, target)
    started = time.perf_counter()
    granularity = granularity or granularity_of(engine)
    objective = objective or objective_of(engine)
    settings: dict[str, Any] = {"format": format, "half": half, "granularity": granularity, "sample": sample}
    settings |= {"engine": engine, "static_scales": static_scales, "scales": scales and scales.sha256}
    settings |= {"candidates": candidates, "goal": goal and goal.words(), "objective": goal and objective}
    inputs = inputs_of(checkpoint, images, target, **settings, batch_size=batch_size, skip_bad=skip_bad)
    if known is not None:
        result = given(known, inputs, checkpoint, images)
        save_sensitivity(result, output)
        return result
    if (stored := standing(output, inputs)) is not None:
        return stored
    images = fit_labels(_decodable(images) if skip_bad else images, checkpoint.label_names)
    scoring, confirming = (images, None) if goal is None else divide(images)
    if goal is not None and goal.max_top1_drop is not None:
        logger.warning(power_note(goal.max_top1_drop, len(images)))
    analysis: _Analysis | Rebuilt
    if computes_itself(engine):
        variant = VariantSpec(name=format, format=format, engine=engine, static_scales=static_scales)
        analysis = Rebuilt(checkpoint, variant, granularity, scales, target)
    else:
        analysis = _Analysis(checkpoint, format, half, granularity, target, batch_size, memory_bytes)
    analysis.start(scoring, output)
    sample_kl: dict[str, float] = {}
    chosen = analysis.units
    sampled = scoring.limited(sample)
    if sample is not None and len(chosen) > candidates:
        sample_kl = analysis.sample_scores(sampled)
        best = sorted(sample_kl, key=lambda name: sample_kl[name])[:candidates]
        chosen = [unit for unit in chosen if unit.name in best]
    scores = analysis.scores(chosen)
    search = None if goal is None or confirming is None else analysis.search(scores, confirming, goal, objective)
    result = Sensitivity(
        checkpoint=checkpoint.source,
        checkpoint_sha256=checkpoint.fingerprint(),
        format=format,
        half=analysis.half,
        granularity=granularity,
        images=len(scoring),
        dataset=images.name,
        dataset_sha256=images.sha256,
        sample_images=len(sampled) if sample_kl else None,
        sample_kl=sample_kl,
        quantized=analysis.quantized,
        units=tuple(scores),
        seconds=round(time.perf_counter() - started, 1),
        search=search,
        environment=machine.describe(target),
        inputs=inputs,
    )
    save_sensitivity(result, output)
    storage.remove(analysis.partial)
    return result


def analyse_for(
    checkpoint: Checkpoint,
    images: ImageSet,
    variant: VariantSpec,
    output: Path,
    device: str = "auto",
    *,
    scales: ImageSet | None = None,
    skip_bad: bool = False,
    known: Path | None = None,
) -> Sensitivity:
    """The analysis and search that a variant with `skip: auto` asks for, or the result that it names; see `analyse`."""
    auto = variant.search_spec
    return analyse(
        checkpoint,
        images,
        variant.format,
        output,
        half=variant.half,
        engine=variant.engine,
        static_scales=computes_itself(variant.engine) and variant.static_scales,
        scales=scales,
        granularity=auto.granularity,
        sample=auto.sample,
        goal=Goal.of(auto),
        objective=auto.objective,
        device=device,
        skip_bad=skip_bad,
        known=auto.sensitivity or known,
    )


def require_disjoint(calibration: ImageSet, test: ImageSet) -> None:
    """Refuse calibration images that are also test images: a choice looks better than it is on its own images.

    Raises:
        DataError: at least one image is in both, by content.
    """
    shared = set(calibration.image_hashes) & set(test.image_hashes)
    if shared:
        first = next(n for n, h in zip(calibration.ids, calibration.image_hashes, strict=True) if h in shared)
        raise DataError(
            f"{len(shared)} calibration images are also test images (first: {first}); calibrate on other "
            "images, such as the training split"
        )


def _decodable(images: ImageSet) -> ImageSet:
    """The images that can be decoded; they must be known before the division, which counts them."""
    bad = []
    for index in progress.track(range(len(images)), "looking for broken images", len(images)):
        try:
            images.image(index)
        except BadImageError:
            bad.append(images.ids[index])
    if bad:
        logger.warning("%d calibration images cannot be decoded and are left out (first: %s)", len(bad), bad[0])
    return images.without(bad)


class _Analysis:
    """The two models, what is known so far, and where it is stored."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        format: Format,
        half: HalfFormat,
        granularity: Granularity,
        device: torch.device,
        batch_size: int,
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
        self.units, self.half = units(layers, granularity), half
        self._device, self._batch_size, self._memory_bytes = device, batch_size, memory_bytes
        self._mixtures = functools.partial(mixture_logits, memory_bytes=memory_bytes)
        self._preprocess = Preprocessor(load_processor(checkpoint))
        # Formats round differently on other devices, in other batches and in other versions.
        made_by = machine.provenance(device)
        self._identity = [checkpoint.fingerprint(), format, half, granularity, batch_size, made_by]

    def _calibration(self, images: ImageSet) -> Calibration:
        return calibration_of(images, self._preprocess, self._device, self._batch_size)

    def start(self, images: ImageSet, output: Path) -> None:
        """Take over what an interrupted analysis of the same inputs has left, and nothing of another's."""
        self.calibration = self._calibration(images)
        self.partial = taken_over(output, [*self._identity, list(images.image_hashes)])

    def sample_scores(self, images: ImageSet) -> dict[str, float]:
        """Recovery KL of every unit on a few images; labels are not used."""
        sample = self._calibration(images)
        reference = sample.predictions([self.from_exact.logits(pixels) for pixels in sample.stream()]).logits
        kl: dict[str, float] = {}

        def done(unit: str, logits: list[torch.Tensor]) -> None:
            kl[unit] = mean_kl_divergence(reference, sample.predictions(logits).logits)

        self._mixtures(self.from_packed, sample, self.units, done=done, description="sampling")
        return kl

    def scores(self, chosen: Sequence[Unit]) -> list[UnitScores]:
        """Both tables for `chosen`, with what keeping each unit costs."""
        self.exact = self._fill("damage", self.from_exact, chosen)
        self.packed = self._fill("recovery", self.from_packed, chosen)
        self.quantized = loss(self.exact, self.exact, self.packed)
        milliseconds = extra_ms(self.from_packed, chosen, next(iter(self.calibration.stream()))[:1])
        return [
            UnitScores(
                unit=unit.name,
                damage=loss(self.exact, self.exact, self._stored("damage", unit)),
                recovery=loss(self.exact, self.packed, self._stored("recovery", unit)),
                extra_bytes=extra_bytes(self.from_packed, unit),
                extra_ms=milliseconds[unit.name],
            )
            for unit in chosen
        ]

    def _fill(self, scoring: Scoring, hybrid: Hybrid, chosen: Sequence[Unit]) -> Predictions:
        """Store the logits of every mixture that is not stored yet; return those of the unmixed model."""

        def done(unit: str, logits: list[torch.Tensor]) -> None:
            storage.write_bytes(self._file(scoring, unit), safetensors.torch.save({"logits": torch.cat(logits)}))

        missing = [unit for unit in chosen if not self._file(scoring, unit.name).is_file()]
        unmixed = self._mixtures(hybrid, self.calibration, missing, done=done, description=scoring)
        return self.calibration.predictions(unmixed)

    def _file(self, scoring: Scoring, unit: str) -> Path:
        return self.partial / f"{scoring}-{unit}.safetensors"

    def _stored(self, scoring: Scoring, unit: Unit) -> Predictions:
        return self.calibration.predictions([safetensors.torch.load_file(self._file(scoring, unit.name))["logits"]])

    def search(
        self, scores: Sequence[UnitScores], confirming: ImageSet, goal: Goal, objective: Objective
    ) -> SearchResult:
        """The cheapest skip list for `goal` on the calibration images, decided upon on `confirming`."""
        layers = {unit.name: unit.layers for unit in self.units}
        packed = self.from_packed
        with storage.temporary_folder() as folder:
            # No look decodes an image or computes its patches again.
            inputs = Boundary(folder, self._memory_bytes)
            for index, pixels in enumerate(self.calibration.stream()):
                inputs[index] = packed.block_input(pixels, 0)

            def evaluate(names: frozenset[str]) -> Loss:
                with packed.lending(layer for name in names for layer in layers[name]):
                    logits = [packed.logits_from(inputs[index], 0) for index in range(self.calibration.count)]
                return loss_with_share(self.exact, self.packed, self.calibration.predictions(logits))

            def confirm(names: frozenset[str]) -> Loss:
                others = self._calibration(confirming)
                kept = [layer for name in names for layer in layers[name]]
                logits = zip(*self._three_models(others, kept), strict=True)
                return loss_with_share(*map(others.predictions, logits))

            return search_skip_list(
                scores,
                evaluate,
                confirm,
                goal,
                quantized=self.quantized,
                images=len(self.calibration.ids),
                confirming_images=len(confirming),
                objective=objective,
                untried=len(self.units) - len(scores),
            )

    def _three_models(
        self, calibration: Calibration, kept: Sequence[Layer]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """By batch the logits of the 16-bit model, of the quantized one, and of that with `kept` in 16 bit."""
        for pixels in progress.track(calibration.stream(), "confirming", calibration.count):
            exact, packed = self.from_exact.logits(pixels), self.from_packed.logits(pixels)
            with self.from_packed.lending(kept):
                mixed = self.from_packed.logits(pixels)
            yield exact, packed, mixed
