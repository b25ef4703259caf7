"""The layer plan: which format every linear layer gets, and why."""

import itertools
from collections import Counter
from dataclasses import dataclass

from torch import nn

from vitopt.errors import RecipeError, UnsupportedError
from vitopt.formats import FORMATS, QUANTIZED_FORMATS, Format
from vitopt.models.names import Layer, linear_layers, select
from vitopt.recipe import VariantSpec

# torchao chooses per layer, bitsandbytes per checkpoint
_MIXABLE: set[Format] = {format for format, facts in FORMATS.items() if facts.mixes}


@dataclass(frozen=True)
class PlannedLayer:
    """One linear layer's format and the reason for it."""

    layer: Layer
    format: Format
    reason: str
    misfit: bool = False  # its shape cannot be held in the format that was asked for


@dataclass(frozen=True)
class LayerPlan:
    """Formats of all linear layers, in order of execution."""

    layers: tuple[PlannedLayer, ...]
    unlisted: tuple[str, ...] = ()  # modules of linear layers without a logical name, which stay in 16 bit

    def modules(self, *formats: Format) -> list[str]:
        """Full module names of the layers that get one of `formats`."""
        return [planned.layer.module for planned in self.layers if planned.format in formats]

    @property
    def quantized_formats(self) -> list[Format]:
        """The quantized formats in use, most frequent first."""
        counted = Counter(planned.format for planned in self.layers if planned.format in QUANTIZED_FORMATS)
        return [format for format, _ in counted.most_common()]

    def summary(self) -> str:
        """How many layers are in which format, in words."""
        return ", ".join(f"{count} {format}" for format, count in self.counts().items())

    def counts(self) -> dict[str, int]:
        """Format -> number of linear layers."""
        return dict(Counter(planned.format for planned in self.layers))

    def misfits(self) -> dict[str, int]:
        """Reason for which a shape does not fit the format that was asked for -> number of linear layers."""
        return dict(Counter(planned.reason for planned in self.layers if planned.misfit))

    def groups(self) -> list[tuple[PlannedLayer, PlannedLayer, int]]:
        """(first, last, count) of neighbouring layers that share a format and a reason."""
        runs = itertools.groupby(self.layers, key=lambda planned: (planned.format, planned.reason))
        members = [list(group) for _, group in runs]
        return [(group[0], group[-1], len(group)) for group in members]


def plan_layers(model: nn.Module, model_type: str, variant: VariantSpec) -> LayerPlan:
    """Resolve a variant's format, skip list and exceptions against a model (the meta device suffices).

    The head stays in 16 bit: it is small, it decides, and bitsandbytes cannot hold every width of it. So do layers
    whose shape a format cannot hold.

    Raises:
        PatternError: a pattern of `skip` or `layers` matches nothing.
        RecipeError: the formats cannot be held in one checkpoint.
        UnsupportedError: no layer has a shape that they hold.
    """
    layers = linear_layers(model, model_type)
    skipped = select(variant.skip, layers)
    excepted = select(variant.layers, layers)
    listed = {layer.module for layer in layers}
    plan = LayerPlan(
        tuple(_fitting(_plan_one(layer, variant, skipped, excepted), model, variant) for layer in layers),
        tuple(n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in listed),
    )
    _require_one_checkpoint(plan, variant)
    if plan.misfits() and not plan.quantized_formats:
        reasons = "; ".join(plan.misfits())
        raise UnsupportedError(f"no layer of this model can be quantized as asked: {reasons}; use int8 or w8a8")
    return plan


def _require_one_checkpoint(plan: LayerPlan, variant: VariantSpec) -> None:
    quantized = plan.quantized_formats
    if len(quantized) > 1 and not set(quantized) <= _MIXABLE:
        raise RecipeError(
            f"formats {' and '.join(quantized)} cannot be mixed in one checkpoint; {', '.join(sorted(_MIXABLE))} "
            "can, and each can be mixed with 16 bit"
        )
    # One checkpoint has one floating-point type; where layers differ it is that of the norms and activations.
    other = [format for format in plan.counts() if format not in (*QUANTIZED_FORMATS, variant.half)]
    if other and len(plan.counts()) > 1:
        raise RecipeError(
            f"layers in {other[0]} cannot be mixed with other formats here: what is not quantized is held in "
            f"{variant.half} (`half`); use {variant.half} for them, or set `half`"
        )


def _plan_one(layer: Layer, variant: VariantSpec, skipped: dict[str, str], excepted: dict[str, str]) -> PlannedLayer:
    if variant.format not in QUANTIZED_FORMATS and not excepted:
        return PlannedLayer(layer, variant.format, f"format {variant.format}")
    if layer.logical in skipped:
        return PlannedLayer(layer, variant.half, f"skip {skipped[layer.logical]}")
    if layer.is_head:
        return PlannedLayer(layer, variant.half, "the head stays in 16 bit")
    if layer.logical in excepted:
        pattern = excepted[layer.logical]
        return PlannedLayer(layer, variant.layers[pattern], f"layers {pattern}")
    return PlannedLayer(layer, variant.format, f"format {variant.format}")


def _fitting(planned: PlannedLayer, model: nn.Module, variant: VariantSpec) -> PlannedLayer:
    """The same, or in 16 bit where the layer's shape is not one that its format can hold."""
    linear = model.get_submodule(planned.layer.module)
    for name, multiple in zip(("in_features", "out_features"), FORMATS[planned.format].multiples, strict=True):
        width = getattr(linear, name)
        if width % multiple:
            reason = f"{name} {width} is no multiple of {multiple}, as {planned.format} needs"
            return PlannedLayer(planned.layer, variant.half, reason, misfit=True)
    return planned
