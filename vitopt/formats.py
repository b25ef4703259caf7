"""Number formats of linear layers: all that is known about each, in one table. Imports no torch.

A new format is an entry here and a builder in `vitopt/optimize/formats.py`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Format = Literal["fp32", "fp16", "bf16", "nf4", "int4", "int8", "w8a8", "fp8"]
HalfFormat = Literal["fp16", "bf16"]
RunAs = Literal["bf16", "w8a8", "fp8"]

Capability = tuple[int, int]
AMPERE: Capability = (8, 0)
HOPPER: Capability = (9, 0)
ADA: Capability = (8, 9)


@dataclass(frozen=True)
class FormatFacts:
    """What a format is and where it runs.

    `words`: for people. `colour`: hex, the same in all figures. `computes_in`: format of its matrix product; weights
    that are only stored smaller are expanded for it. `library`: package that holds it; None where torch does and
    nothing is quantized. `capability`: least compute capability on CUDA. `not_on_cpu`: why it needs a GPU. `nearest`:
    what to take where it cannot run. `expands`: whether `run_as` can expand a checkpoint stored in it. `mixes`: whether
    one checkpoint can hold other such formats beside it. `can_be_fast`: whether it can beat fp32 in time and not only
    in bytes. `calibrated`: whether its weights can be rounded on calibration images. `multiples`: what a layer's
    in_features and out_features must be multiples of, the same on every device, so that a checkpoint runs wherever its
    format does.
    """

    words: str
    colour: str
    computes_in: str
    nearest: Format
    library: str | None = None
    capability: Capability | None = None
    not_on_cpu: str | None = None
    expands: bool = False
    mixes: bool = False
    can_be_fast: bool = False
    calibrated: bool = False
    multiples: tuple[int, int] = (1, 1)


# Colours after Okabe and Ito ("Color universal design", 2008): told apart by colour-blind readers. Blue and orange are
# shifted a little so that all of them stand out from a white and from a near-black page alike.
FORMATS: dict[Format, FormatFacts] = {
    "fp32": FormatFacts("32-bit floating point", "#8b949e", "fp32", "fp32", expands=True, can_be_fast=True),
    "fp16": FormatFacts("16-bit floating point", "#56b4e9", "fp16", "fp32", expands=True, can_be_fast=True),
    "bf16": FormatFacts(
        "16-bit floating point with the range of fp32",
        "#3381c4",
        "bf16",
        "fp16",
        capability=AMPERE,
        expands=True,
        can_be_fast=True,
    ),
    "nf4": FormatFacts(
        "4-bit weights",
        "#d55e00",
        "bf16",
        "bf16",
        library="bitsandbytes",
        expands=True,
        calibrated=True,
        multiples=(64, 32),  # packed in blocks of 64 along a row and, on a CPU, 32 rows at a time
    ),
    "int4": FormatFacts(
        "4-bit weights",
        "#a8672f",
        "bf16",
        "nf4",
        library="torchao",
        capability=AMPERE,
        not_on_cpu="torchao's packed int4 weights need a CUDA device of compute capability 8.0",
        mixes=True,
        calibrated=True,
        multiples=(64, 8),  # groups of 64
    ),
    "int8": FormatFacts(
        "8-bit weights, outliers in 16 bit", "#009e73", "int8", "bf16", library="bitsandbytes", expands=True
    ),
    "w8a8": FormatFacts(
        "8-bit weights and activations",
        "#cc79a7",
        "int8",
        "int8",
        library="torchao",
        capability=AMPERE,
        mixes=True,
        can_be_fast=True,
        calibrated=True,
    ),
    "fp8": FormatFacts(
        "8-bit floating-point weights and activations",
        "#d99a00",
        "fp8",
        "w8a8",
        library="torchao",
        capability=ADA,
        not_on_cpu="fp8 arithmetic needs a CUDA device of compute capability 8.9",
        mixes=True,
        can_be_fast=True,
        multiples=(16, 16),  # of its matrix product
    ),
}
assert tuple(FORMATS) == get_args(Format)

QUANTIZED_FORMATS: tuple[Format, ...] = tuple(name for name, facts in FORMATS.items() if facts.library)
OTHER_COLOUR = "#a08060"


def colour_of(format: str) -> str:
    """Hex colour of a format, also of one that vitopt does not know."""
    return next((facts.colour for name, facts in FORMATS.items() if name == format), OTHER_COLOUR)
