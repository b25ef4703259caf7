"""The layer plan as a strip: one cell per block, in it one per linear layer, the head at the end."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitopt.layers import LINEARS, QKV, Linear
from vitopt.records import Record

HEAD = "classifier"


@dataclass(frozen=True)
class Strip:
    """One variant's layer plan, ready to draw."""

    variant: str
    blocks: Mapping[int, tuple[str | None, ...]]  # by number: formats in the order of LINEARS, None for an absent layer
    head: str | None
    formats: Mapping[str, int]  # how many layers each format holds


def strips(records: Sequence[Record]) -> list[Strip]:
    """A strip for every variant whose layer plan is known."""
    return [strip_of(record.variant.name, record.layers) for record in records if record.layers]


def strip_of(name: str, layers: Mapping[str, str]) -> Strip:
    """The strip of a layer plan: logical name -> format."""
    numbers = sorted({int(logical.split(".")[1]) for logical in layers if logical.startswith("block.")})
    blocks = {number: tuple(_format(layers, number, linear) for linear in LINEARS) for number in numbers}
    # A model with two heads holds them alike.
    head = next((format for logical, format in layers.items() if logical.split(".")[0] == HEAD), None)
    return Strip(name, blocks, head, Counter(layers.values()))


def _format(layers: Mapping[str, str], block: int, linear: Linear) -> str | None:
    fused = layers.get(f"block.{block}.{QKV}") if linear in ("query", "key", "value") else None
    return layers.get(f"block.{block}.{linear}", fused)
