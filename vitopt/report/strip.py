"""The layer plan as a strip: one cell per block, in it one per linear layer, the head at the end."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitopt.recipe import LINEARS, QKV, Linear
from vitopt.records import Record

HEAD = "classifier"


@dataclass(frozen=True)
class Block:
    """The formats of one block's linear layers, in the order of LINEARS; None where the block has none."""

    number: int
    formats: tuple[str | None, ...]

    @property
    def words(self) -> str:
        """As in `nf4`, or `query key bf16, others nf4` where they differ."""
        present = {linear: format for linear, format in zip(LINEARS, self.formats, strict=True) if format}
        formats = list(present.values())
        most = max(dict.fromkeys(formats), key=formats.count, default="nothing")
        others = [
            f"{' '.join(linear for linear, own in present.items() if own == format)} {format}"
            for format in dict.fromkeys(formats)
            if format != most
        ]
        return ", ".join([*others, f"others {most}" if others else most])


@dataclass(frozen=True)
class Strip:
    """One variant's layer plan, ready to draw."""

    variant: str
    blocks: tuple[Block, ...]
    head: str | None

    @property
    def formats(self) -> list[str]:
        """Formats that occur, in order of first occurrence."""
        cells = [*itertools.chain(*(block.formats for block in self.blocks)), self.head]
        return list(dict.fromkeys(format for format in cells if format))

    @property
    def words(self) -> str:
        """The plan in one sentence, neighbouring blocks alike taken together."""
        parts = []
        for words, group in itertools.groupby(self.blocks, key=lambda block: block.words):
            first, *rest = (block.number for block in group)
            parts.append(f"blocks {first}–{rest[-1]} {words}" if rest else f"block {first} {words}")
        if len(parts) == 1:
            parts = [f"all {len(self.blocks)} blocks {self.blocks[0].words}"]
        return "; ".join([*parts, f"head {self.head}"] if self.head else parts)


def strips(records: Sequence[Record]) -> list[Strip]:
    """A strip for every variant whose layer plan is known."""
    return [strip_of(record.variant.name, record.layers) for record in records if record.layers]


def strip_of(name: str, layers: Mapping[str, str]) -> Strip:
    """The strip of a layer plan: logical name -> format."""
    numbers = sorted({int(logical.split(".")[1]) for logical in layers if logical.startswith("block.")})
    blocks = tuple(Block(number, tuple(_format(layers, number, linear) for linear in LINEARS)) for number in numbers)
    # A model with two heads holds them alike.
    head = next((format for logical, format in layers.items() if logical.split(".")[0] == HEAD), None)
    return Strip(name, blocks, head)


def _format(layers: Mapping[str, str], block: int, linear: Linear) -> str | None:
    fused = layers.get(f"block.{block}.{QKV}") if linear in ("query", "key", "value") else None
    return layers.get(f"block.{block}.{linear}", fused)
