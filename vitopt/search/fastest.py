"""`format: auto`: the fastest way to run a checkpoint on this device that still agrees with it in fp32.

Nothing is looked up. Every format that the device can run is made, run in every way that may be its fastest, and
measured against fp32 on the same images and, turn by turn, for the same time.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from vitopt import storage
from vitopt.data.images import ImageSet
from vitopt.engines.package import engine_module
from vitopt.environment import devices, launch, support
from vitopt.errors import RecipeError, RecordError, UnsupportedError
from vitopt.formats import FORMATS, QUANTIZED_FORMATS, Format, HalfFormat
from vitopt.inference import made, measure
from vitopt.measure.claims import at_least
from vitopt.measure.comparison import paired_speedup
from vitopt.measure.intervals import Interval, wilson_interval
from vitopt.measure.latency_statistics import Speedup
from vitopt.measure.power import trials_to_bound_share
from vitopt.models.checkpoint import Checkpoint
from vitopt.recipe import ENGINES, Engine, EvaluateSpec, FastestSpec, Spec, VariantSpec, computes_itself
from vitopt.records import Record

logger = logging.getLogger(__name__)

REFERENCE = "fp32"


class Choice(Spec):
    """What was chosen, and the records of all that was measured, the reference first."""

    variant: VariantSpec
    records: tuple[Record, ...]
    min_agreement_percent: float

    def sentence(self) -> str:
        """What was chosen and why, in one line."""
        chosen = next(record for record in self.records if record.variant.name == self.variant.name)
        if chosen.versus_baseline is None or chosen.dataset is None:
            return (
                f"no format is shown to be faster and to agree with fp32 on {self.min_agreement_percent:g} %: "
                "fp32 is kept"
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
                agreement = record.versus_baseline.agreement_percent
                more = _images_to_show(agreement / 100, limit)
                remedy = f"give about {more:,} images" if more else "allow less agreement"
                lines.append(
                    f"{record.variant.name} agrees on {agreement:.1f} % of {record.dataset.images:,} images, which "
                    f"does not show {self.min_agreement_percent:g} % (95 %): {remedy}"
                )
        return lines


def candidates(
    device: torch.device, half: HalfFormat, compile: bool, engine: Engine = "torch", static_scales: bool = False
) -> list[VariantSpec]:
    """Ways to run that may be the fastest on a device: torch's fp32 as it is, then each format, plain and compiled.

    Of another `engine` each of its formats; with `static_scales` int8 also with scales that images fix.
    """
    variants = [VariantSpec(name=REFERENCE, format="fp32")]
    if engine in ENGINES:
        if support.why_not_engine(engine, device) is not None:
            return variants
        for format in ENGINES[engine].formats:
            if _why_not(engine, format, device) is None and not (format == "fp16" and device.type == "cpu"):
                torchs: dict[str, Any] = {} if computes_itself(engine) else {"fuse_qkv": True}
                if torchs and format in QUANTIZED_FORMATS:
                    torchs["half"] = half
                variants.append(VariantSpec(name=f"{engine}-{format}", format=format, engine=engine, **torchs))
        if static_scales:
            fixed = [one for one in variants if one.format in QUANTIZED_FORMATS]
            static = {"static_scales": True}
            variants += [one.model_copy(update={"name": f"{one.name}-static"} | static) for one in fixed]
        return variants
    for format, facts in FORMATS.items():
        if (
            not facts.can_be_fast
            or support.why_not_format(format, device) is not None
            or (format == "fp16" and device.type == "cpu")
        ):
            continue
        held = {"half": half} if format in QUANTIZED_FORMATS else {}
        if format != "fp32":
            variants.append(VariantSpec(name=format, format=format, **held))
        if compile:
            name = f"{format}-compiled"
            variants.append(VariantSpec(name=name, format=format, compile=True, fuse_qkv=True, **held))
    return variants


def _why_not(engine: str, format: Format, device: torch.device) -> str | None:
    if computes_itself(engine):
        return engine_module(engine).why_not(format)
    return support.why_not_format(format, device)


def choose(records: Sequence[Record], min_agreement_percent: float) -> str:
    """Name of the fastest record that is shown to agree with the first; the first itself if none is.

    An agreement is shown by the lower end of its interval. Of those that agree the fastest leads, but what comes
    earlier in the list is simpler, and stays unless the leader is shown to be faster.
    """
    limit = min_agreement_percent / 100
    compared = [record for record in records[1:] if record.latency and record.dataset and record.versus_baseline]
    agreeing = [records[0], *(record for record in compared if at_least(_agreement(record), limit) == "shown")]
    leader = max(agreeing, key=lambda record: speedup(records[0], record).ratio)
    for record in agreeing:
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


def require_enough_images(images: int, min_agreement_percent: float) -> None:
    """Refuse so few images that they could not show the agreement even if a format agreed on all of them.

    Raises:
        RecipeError: there are too few.
    """
    if wilson_interval(images, images).low < min_agreement_percent / 100:
        fewest = _images_to_show(1.0, min_agreement_percent / 100)
        remedy = f"give at least {fewest:,}" if fewest else "no number of images is enough; ask for less than 100 %"
        raise RecipeError(
            f"{images:,} images cannot show (95 %) that a format agrees with fp32 on {min_agreement_percent:g} %, "
            f"not even if it agrees on each of them: {remedy}"
        )


def how_measured(spec: EvaluateSpec) -> EvaluateSpec:
    """What of `spec` a choice needs: agreement, and the time at the first batch size."""
    latency = spec.latency.model_copy(update={"batch_sizes": spec.latency.batch_sizes[:1]})
    return spec.model_copy(
        update={"latency": latency, "end_to_end": False, "throughput": False, "roofline": False, "look_alikes": False}
    )


def find_fastest(
    checkpoint: Checkpoint,
    images: ImageSet,
    spec: FastestSpec,
    evaluate: EvaluateSpec,
    *,
    half: HalfFormat = "bf16",
    engine: Engine = "torch",
    scales: ImageSet | None = None,
    device: str = "auto",
    skip_bad: bool = False,
) -> Choice | None:
    """Measure all candidates of this device, as `evaluate` says, and choose; None in other processes than the main one.

    `scales`: images that fix the scales of an `engine`'s int8; without them that is not a candidate.

    Raises:
        RecipeError: so few images could not show the agreement even if they all agreed.
        DataError: the images' classes are not the checkpoint's.
        UnsupportedError: not even fp32 could be measured.
    """
    require_enough_images(len(images), spec.min_agreement)
    target = devices.resolve_device(device)
    if engine in ENGINES:
        support.require_engine(engine, target)
    variants = candidates(target, half, spec.compile, engine, scales is not None)
    with storage.temporary_folder() as folder:
        measured = measure(
            list(made(checkpoint, variants, folder, str(target), scales)),
            how_measured(evaluate),
            images=images,
            skip_bad=skip_bad,
            baseline=REFERENCE,
            device=str(target),
            untrained=checkpoint.is_random,
        )
    if not launch.is_main_process():
        return None
    records = tuple(result.record for result in measured)
    if records[0].failure or not records[0].latency:
        raise UnsupportedError(f"fp32 itself could not be measured: {records[0].failure or 'no latency'}")
    for record in records:
        if record.failure:
            logger.warning("%s is left out: %s", record.variant.name, record.failure)
    name = choose(records, spec.min_agreement)
    chosen = next(variant for variant in variants if variant.name == name)
    return Choice(variant=chosen, records=records, min_agreement_percent=spec.min_agreement)


def save_choice(choice: Choice, path: Path) -> None:
    """Write a choice as JSON."""
    storage.write_json(path, choice.model_dump(mode="json", by_alias=True))


def load_choice(path: Path) -> Choice:
    """Read what `save_choice` wrote.

    Raises:
        RecordError: it is missing or not a whole choice.
    """
    try:
        return Choice.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RecordError(f"{path} does not hold a choice of a format: choose again") from error
