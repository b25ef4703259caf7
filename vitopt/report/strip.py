"""The layer plan as a strip: one cell per block, in it one per linear layer, the head at the end."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitopt.recipe import LINEARS
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
        present = [(linear, format) for linear, format in zip(LINEARS, self.formats, strict=True) if format]
        formats = [format for _, format in present]
        most = max(dict.fromkeys(formats), key=formats.count, default="nothing")
        others = [
            f"{' '.join(linear for linear, own in present if own == format)} {format}"
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
    def words(self) -> str:
        """The plan in one sentence, neighbouring blocks alike taken together."""
        groups = [list(group) for _, group in itertools.groupby(self.blocks, key=lambda block: block.words)]
        if len(groups) == 1:
            parts = [f"all {len(self.blocks)} blocks {groups[0][0].words}"]
        else:
            parts = [f"{_span(group)} {group[0].words}" for group in groups]
        return "; ".join([*parts, f"head {self.head}"] if self.head else parts)


def strips(records: Sequence[Record]) -> list[Strip]:
    """A strip for every variant whose layer plan is known."""
    return [strip_of(record.variant.name, record.layers) for record in records if record.layers]


def strip_of(name: str, layers: Mapping[str, str]) -> Strip:
    """The strip of a layer plan: logical name -> format."""
    numbers = sorted({int(parts[1]) for parts in map(_parts, layers) if parts[0] == "block"})
    blocks = tuple(
        Block(number, tuple(layers.get(f"block.{number}.{linear}") for linear in LINEARS)) for number in numbers
    )
    # A model with two heads holds them alike.
    head = next((format for logical, format in layers.items() if _parts(logical)[0] == HEAD), None)
    return Strip(name, blocks, head)


def formats_in(found: Sequence[Strip]) -> list[str]:
    """Formats that occur, in order of first occurrence."""
    used: list[str] = []
    for one in found:
        used += [format for block in one.blocks for format in block.formats if format]
        used += [one.head] if one.head else []
    return list(dict.fromkeys(used))


def _parts(logical: str) -> list[str]:
    return logical.split(".")


def _span(group: Sequence[Block]) -> str:
    first, last = group[0].number, group[-1].number
    return f"block {first}" if first == last else f"blocks {first}–{last}"
