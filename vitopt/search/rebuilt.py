"""The analysis of an engine, whose files exchange no layers: every list of kept layers is a file of its own, measured.

A file takes from seconds to minutes to make, so what is scored is only what keeping a unit brings back, not what it
breaks alone. Images are answered one at a time, as they are timed: a scale that is found in each call depends on them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from vitopt import progress, storage
from vitopt.data.images import ImageSet
from vitopt.data.pixels import Preprocessor
from vitopt.engines.note import installed_version
from vitopt.engines.package import calibration_pixels, require_runs, write_model
from vitopt.engines.runtime import EngineRunnable, opened
from vitopt.environment import machine
from vitopt.measure.latency import clock_for, time_interleaved
from vitopt.measure.predictions import Predictions
from vitopt.models.checkpoint import Checkpoint, load_processor
from vitopt.optimize.quantize import plan_for
from vitopt.recipe import VariantSpec
from vitopt.search.confirmation import loss, loss_with_share
from vitopt.search.costs import LATENCY
from vitopt.search.goal import Goal
from vitopt.search.results import Loss, SearchResult, UnitScores
from vitopt.search.reuse import taken_over
from vitopt.search.sensitivity import Calibration, Granularity, Unit, calibration_of, units
from vitopt.search.skiplist import MS_STEP, Objective, search_skip_list

_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Measured:
    """One list in the engine: its answers to the choosing images, and what it costs beyond the list of none."""

    predictions: Predictions
    extra_bytes: int
    extra_ms: float | None


class Rebuilt:
    """One checkpoint and format in an engine, and every list that was built of them; as `analysis._Analysis`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        variant: VariantSpec,
        granularity: Granularity,
        scales: ImageSet | None,
        device: torch.device,
    ):
        require_runs(checkpoint, variant, device)
        self._checkpoint, self._variant, self._device = checkpoint, variant.skipping(()), device
        self._scales = calibration_pixels(checkpoint, variant, scales)
        plan = plan_for(checkpoint, self._variant)
        self.units = units([one.layer for one in plan.layers if one.format == variant.format], granularity)
        self._preprocess = Preprocessor(load_processor(checkpoint))
        settings = variant.model_dump(mode="json", include={"format", "engine", "static_scales"})
        made_by = [installed_version(variant.engine), machine.provenance(device)]
        self._identity = [checkpoint.fingerprint(), settings, granularity, scales and scales.sha256, made_by]
        self._lists: dict[frozenset[str], _Measured] = {}

    def start(self, images: ImageSet, output: Path) -> None:
        """Take over what an interrupted analysis of the same inputs left, and nothing of another's."""
        self.calibration = self._calibration(images)
        self.partial = taken_over(output, [*self._identity, list(images.image_hashes)])
        layers = self._quantized.describe()["layers"]
        self.half = layers[next(name for name in reversed(layers))]  # of the head, which is last and never quantized

    def sample_scores(self, images: ImageSet) -> dict[str, float]:
        """KL on a few images with each unit kept; labels are not used."""
        sample = self._calibration(images)
        exact = self._predictions(self._exact, sample)
        return {
            unit.name: loss(exact, exact, self._predictions(self._runnable(frozenset({unit.name})), sample)).kl
            for unit in self.units
        }

    def scores(self, chosen: Sequence[Unit]) -> list[UnitScores]:
        """What keeping each of `chosen` brings back and costs."""
        self.exact = self._predictions(self._exact, self.calibration)
        packed = self._measured(_NONE).predictions
        self.quantized = loss(self.exact, self.exact, packed)
        found = {unit.name: self._measured(frozenset({unit.name})) for unit in chosen}
        return [
            UnitScores(
                unit=name,
                recovery=loss(self.exact, packed, one.predictions),
                extra_bytes=one.extra_bytes,
                extra_ms=one.extra_ms,
            )
            for name, one in found.items()
        ]

    def search(
        self, scores: Sequence[UnitScores], confirming: ImageSet, goal: Goal, objective: Objective
    ) -> SearchResult:
        """The cheapest skip list for `goal` on the calibration images, decided upon on `confirming`."""

        def evaluate(names: frozenset[str]) -> Loss:
            packed = self._measured(_NONE).predictions
            return loss_with_share(self.exact, packed, self._measured(names).predictions)

        def confirm(names: frozenset[str]) -> Loss:
            others = self._calibration(confirming)
            three = (self._exact, self._quantized, self._runnable(names) if names else self._quantized)
            return loss_with_share(*(self._predictions(one, others) for one in three))

        def cost(names: frozenset[str]) -> float:
            one = self._measured(names)
            return one.extra_bytes if objective == "size" or one.extra_ms is None else one.extra_ms / MS_STEP

        found = search_skip_list(
            scores,
            evaluate,
            confirm,
            goal,
            quantized=self.quantized,
            images=len(self.calibration.ids),
            confirming_images=len(confirming),
            objective=objective,
            untried=len(self.units) - len(scores),
            tried={names: evaluate(names) for score in scores for names in [frozenset({score.unit})]},
            cost_of=cost,
        )
        measured = {point: self._measured(frozenset(point.skip)) for point in found.points}
        points = [
            point.model_copy(update={"extra_bytes": one.extra_bytes, "extra_ms": one.extra_ms})
            for point, one in measured.items()
        ]
        return found.model_copy(update={"points": tuple(points)})

    def _calibration(self, images: ImageSet) -> Calibration:
        return calibration_of(images, self._preprocess, self._device, batch_size=1)

    def _measured(self, names: frozenset[str]) -> _Measured:
        """From the file beside the result where an interrupted analysis left it."""
        if names not in self._lists:
            file = self.partial / f"{storage.sha256_of_json(sorted(names))[:16]}.safetensors"
            if not file.is_file():
                runnable = self._runnable(names) if names else self._quantized
                extra_ms = self._extra_ms(runnable) if names else 0.0
                logits = torch.from_numpy(self._predictions(runnable, self.calibration).logits)
                extra_bytes = runnable.weight_bytes() - self._quantized.weight_bytes()
                costs = torch.tensor([extra_bytes, math.nan if extra_ms is None else extra_ms], dtype=torch.float64)
                storage.write_bytes(file, safetensors.torch.save({"logits": logits, "costs": costs}))
            stored = safetensors.torch.load_file(file)
            extra_bytes, extra_ms = int(stored["costs"][0]), float(stored["costs"][1])
            predictions = self.calibration.predictions([stored["logits"]])
            self._lists[names] = _Measured(predictions, extra_bytes, None if math.isnan(extra_ms) else extra_ms)
        return self._lists[names]

    def _extra_ms(self, runnable: EngineRunnable) -> float | None:
        """Milliseconds that one image takes more than in the list of none, the calls of both in turn."""
        pixels = next(iter(self.calibration.stream()))
        calls = {"quantized": lambda: self._quantized(pixels), "kept": lambda: runnable(pixels)}
        timings = time_interleaved(calls, LATENCY, clock_for(self._device), "cost")
        if any(timing.failure for timing in timings.values()):
            return None
        medians = {name: float(np.median(timing.samples_ms)) for name, timing in timings.items()}
        return medians["kept"] - medians["quantized"]

    @functools.cached_property
    def _exact(self) -> EngineRunnable:
        return self._runnable(None)

    @functools.cached_property
    def _quantized(self) -> EngineRunnable:
        return self._runnable(_NONE)

    def _runnable(self, names: frozenset[str] | None) -> EngineRunnable:
        """The engine with these units in floating point, or with the whole model for None; a file is made for it."""
        exact = {"format": "fp32", "static_scales": False, "skip": ()}
        variant = self._variant.model_copy(update=exact if names is None else {"skip": tuple(sorted(names))})
        what = "fp32" if names is None else " ".join(variant.skip) or "nothing"
        with progress.task(f"{variant.engine} keeping {what}", None), storage.temporary_folder() as folder:
            write_model(self._checkpoint, variant, folder, None if names is None else self._scales, self._device)
            made = opened(self._checkpoint, folder, name=what, device=self._device, run=variant.run, asked=variant)
        return replace(made, folder=None)

    def _predictions(self, runnable: EngineRunnable, calibration: Calibration) -> Predictions:
        stream = progress.track(calibration.stream(), runnable.name, calibration.count)
        return calibration.predictions([runnable(pixels).cpu() for pixels in stream])
