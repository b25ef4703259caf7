"""`--format auto`: the fastest way to run a checkpoint on this device that still agrees with it in fp32.

Nothing is looked up. Every format that the device can run is made, run in every way that may be its fastest, and
measured against fp32 on the same images and, turn by turn, for the same time.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vitopt import environment
from vitopt.data.images import ImageSet
from vitopt.data.labels import fit_labels
from vitopt.errors import CheckpointError, MeasurementError, UnsupportedError
from vitopt.formats import FORMATS, QUANTIZED_FORMATS, HalfFormat
from vitopt.measure.evaluator import evaluate
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
            return f"nothing faster agrees with fp32 on {self.min_agreement_percent:g} % of the images: fp32 it is"
        return (
            f"{self.variant.name} is the fastest: {chosen.latency[0].speedup_vs_baseline:.2f} times fp32, and agrees "
            f"with it on {chosen.versus_baseline.agreement_percent:.1f} % of {chosen.dataset.images} images"
        )


def candidates(device: torch.device, half: HalfFormat, compile: bool) -> list[VariantSpec]:
    """Ways to run that may be the fastest on a device: fp32 as it is, then each format, plain and compiled."""
    found = [VariantSpec(name=REFERENCE, format="fp32")]
    for format, facts in FORMATS.items():
        if (
            not facts.can_be_fast
            or environment.why_not_format(format, device) is not None
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
    """Name of the fastest record that agrees with the first on so many of the images; the first if none does."""
    agreeing = [
        record
        for record in records[1:]
        if record.latency
        and record.versus_baseline is not None
        and record.versus_baseline.agreement_percent >= min_agreement_percent
    ]
    fastest = min([records[0], *agreeing], key=lambda record: record.latency[0].p50_ms)
    return fastest.variant.name


def find_fastest(
    checkpoint: Checkpoint,
    images: ImageSet,
    spec: EvaluateSpec,
    *,
    min_agreement_percent: float,
    half: HalfFormat = "bf16",
    compile: bool = True,
    device: str = "auto",
) -> Choice:
    """Measure all candidates of this device and choose.

    Raises:
        DataError: the images' classes are not the checkpoint's.
        UnsupportedError: not even fp32 could be measured.
    """
    target = environment.resolve_device(device)
    with tempfile.TemporaryDirectory() as folder:
        made = list(_prepared(checkpoint, candidates(target, half, compile), Path(folder), target))
        variants = [variant for variant, _ in made]
        measured = evaluate(
            [runnable for _, runnable in made],
            spec,
            images=fit_labels(images, checkpoint.label_names),
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
