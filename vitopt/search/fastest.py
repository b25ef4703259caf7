"""`--format auto`: the fastest way to run a checkpoint on this device that still agrees with it in fp32.

Nothing is looked up. Every format that the device can run is made, run in every way that may be its fastest, and
measured against fp32 on the same images and, turn by turn, for the same time.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vitopt import storage
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.environment import devices, support
from vitopt.errors import CheckpointError, MeasurementError, RecipeError, UnsupportedError
from vitopt.formats import FORMATS, QUANTIZED_FORMATS, HalfFormat
from vitopt.measure.claims import at_least
from vitopt.measure.comparison import paired_speedup
from vitopt.measure.evaluator import evaluate
from vitopt.measure.latency_statistics import Speedup
from vitopt.measure.power import trials_to_bound_share
from vitopt.measure.statistics import Interval, wilson_interval
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.optimize.runtime import TorchRunnable, prepare
from vitopt.recipe import EvaluateSpec, VariantSpec
from vitopt.records import Record

logger = logging.getLogger(__name__)

REFERENCE = "fp32"


@dataclass(frozen=True)
class Choice:
    """What was chosen, and the records of all that was measured, the reference first."""

    variant: VariantSpec
    records: list[Record]
    min_agreement_percent: float

    def sentence(self) -> str:
        """What was chosen and why, in one line."""
        chosen = next(record for record in self.records if record.variant.name == self.variant.name)
        if chosen.versus_baseline is None or chosen.dataset is None:
            return (
                f"nothing is shown to be faster and to agree with fp32 on {self.min_agreement_percent:g} %: fp32 it is"
            )
        speed, agreed = speedup(self.records[0], chosen), _agreement(chosen)
        return (
            f"{self.variant.name} is chosen: {speed.ratio:.2f} times as fast as fp32{_range(speed.interval)}, and "
            f"agrees with it on {chosen.versus_baseline.agreement_percent:.1f} % ({100 * agreed.low:.1f} to "
            f"{100 * agreed.high:.1f}) of {chosen.dataset.images:,} images"
        )

    def undecided(self) -> list[str]:
        """A line for each candidate that was faster, but on so few images is neither shown to agree nor not to."""
        limit = self.min_agreement_percent / 100
        lines = []
        for record in self.records[1:]:
            if record.dataset is None or record.versus_baseline is None or not record.latency:
                continue
            if at_least(_agreement(record), limit) == "undecided" and speedup(self.records[0], record).ratio > 1:
                found = record.versus_baseline.agreement_percent
                more = _images_to_show(found / 100, limit)
                remedy = f"give about {more:,} images" if more else "allow less agreement"
                lines.append(
                    f"{record.variant.name} agrees on {found:.1f} % of {record.dataset.images:,} images, which does "
                    f"not show {self.min_agreement_percent:g} % (95 %): {remedy}"
                )
        return lines


def candidates(device: torch.device, half: HalfFormat, compile: bool) -> list[VariantSpec]:
    """Ways to run that may be the fastest on a device: fp32 as it is, then each format, plain and compiled."""
    found = [VariantSpec(name=REFERENCE, format="fp32")]
    for format, facts in FORMATS.items():
        if (
            not facts.can_be_fast
            or support.why_not_format(format, device) is not None
            or (format == "fp16" and device.type == "cpu")
        ):
            continue
        held = {"half": half} if format in QUANTIZED_FORMATS else {}
        if format != "fp32":
            found.append(VariantSpec(name=format, format=format, **held))
        if compile:
            name = f"{format}-compiled"
            found.append(VariantSpec(name=name, format=format, compile=True, fuse_qkv=True, **held))
    return found


def choose(records: list[Record], min_agreement_percent: float) -> str:
    """Name of the fastest record that is shown to agree with the first; the first itself if none is.

    An agreement is shown by the lower end of its interval. Of those that agree the fastest leads, but what comes
    earlier in the list is simpler, and stays unless the leader is shown to be faster.
    """
    limit = min_agreement_percent / 100
    agreeing = [one for one in records[1:] if one.latency and one.dataset and one.versus_baseline]
    known = [records[0], *(one for one in agreeing if at_least(_agreement(one), limit) == "shown")]
    leader = max(known, key=lambda record: speedup(records[0], record).ratio)
    for record in known:
        interval = speedup(record, leader).interval
        if record is leader or interval is None or interval.low <= 1:
            return record.variant.name
    return leader.variant.name


def speedup(slower: Record, faster: Record) -> Speedup:
    """How many times faster one record is than another whose calls took turns with it; 1 for the same record."""
    if slower is faster:
        return Speedup(1.0, Interval(1.0, 1.0))
    return paired_speedup(slower.latency[0], faster.latency[0])


def _agreement(record: Record) -> Interval:
    """Interval of the share of images, 0 to 1, that get the same class, as the record shows it."""
    assert record.versus_baseline is not None and record.versus_baseline.agreement_ci95_percent is not None
    low, high = record.versus_baseline.agreement_ci95_percent
    return Interval(low / 100, high / 100)


def _images_to_show(agreement: float, limit: float) -> int | None:
    """Images on which such an agreement likely shows `limit`, both shares from 0 to 1; None where no number would."""
    return math.ceil(trials_to_bound_share(limit, agreement)) if agreement > limit else None


def _range(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval.low:.2f} to {interval.high:.2f})"


def find_fastest(
    checkpoint: Checkpoint,
    images: ImageSet,
    spec: EvaluateSpec,
    *,
    min_agreement_percent: float,
    half: HalfFormat = "bf16",
    compile: bool = True,
    device: str = "auto",
    skip_bad: bool = False,
) -> Choice:
    """Measure all candidates of this device and choose.

    Raises:
        RecipeError: so few images could not show the agreement even if they all agreed.
        DataError: the images' classes are not the checkpoint's.
        UnsupportedError: not even fp32 could be measured.
    """
    if wilson_interval(len(images), len(images)).low < min_agreement_percent / 100:
        fewest = _images_to_show(1.0, min_agreement_percent / 100)
        remedy = f"give at least {fewest:,}" if fewest else "no number of images does; ask for less than 100 %"
        raise RecipeError(
            f"{len(images):,} images cannot show (95 %) that a format agrees with fp32 on {min_agreement_percent:g} %, "
            f"not even if it agrees on each of them: {remedy}"
        )
    target = devices.resolve_device(device)
    with storage.temporary_folder() as folder:
        made = list(_prepared(checkpoint, candidates(target, half, compile), folder, target))
        variants = [variant for variant, _ in made]
        measured = evaluate(
            [runnable for _, runnable in made],
            spec,
            images=fit_labels(images, checkpoint.label_names),
            skip_bad=skip_bad,
            baseline=REFERENCE,
            untrained=checkpoint.is_random,
        )
    records = [one.record for one in measured]
    if records[0].failure or not records[0].latency:
        raise UnsupportedError(f"fp32 itself could not be measured: {records[0].failure or 'no latency'}")
    chosen = choose(records, min_agreement_percent)
    return Choice(next(v for v in variants if v.name == chosen), records, min_agreement_percent)


def _prepared(
    checkpoint: Checkpoint, variants: list[VariantSpec], folder: Path, device: torch.device
) -> Iterator[tuple[VariantSpec, TorchRunnable]]:
    for variant in variants:
        made = folder / variant.format
        try:
            if not made.exists():
                quantize(checkpoint, variant, made, str(device))
            made_as = open_checkpoint(str(made))
            runnable = prepare(made_as, name=variant.name, device=device, run=variant.run, asked=variant)
        except (CheckpointError, MeasurementError, UnsupportedError) as error:
            if variant.name == REFERENCE:
                raise
            logger.warning("%s is left out: %s", variant.name, error)
        else:
            yield variant, runnable
