"""Tables that fit the terminal: with fewer columns rather than cut names. What is piped keeps all columns."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.cells import cell_len
from rich.table import Table

from vitopt.terminal import Console, visible

_GAP = 2  # characters between columns
_TEXT = 24  # a longer text may break, at spaces and hyphens first,
_NARROW = 10  # into lines of at least so many characters
_PIPED = 10_000  # characters: nothing breaks


@dataclass(frozen=True)
class Column:
    """A heading and its cells, which are figures or a text."""

    heading: str
    cells: Sequence[str]
    text: bool = False

    @property
    def least(self) -> int:
        """Characters of the longest cell, or of a part of the heading that does not break."""
        words, _, interval = self.heading.partition(" (")
        return max(map(_width, [*self.cells, *words.split(), f"({interval}" if interval else ""]))

    @property
    def most(self) -> int:
        """Characters with which nothing breaks."""
        return max(self.least, _width(self.heading))

    def stacked(self) -> "Column":
        """The same with the interval of a figure on a line of its own."""
        return self if self.text else replace(self, cells=[cell.replace(" (", "\n(", 1) for cell in self.cells])

    def broken(self, width: int) -> "Column":
        """The same with texts broken into lines; nothing is cut off."""
        return replace(self, cells=["\n".join(textwrap.wrap(visible(cell), width)) for cell in self.cells])


def print_columns(
    console: Console,
    title: str,
    columns: Sequence[Column],
    important: Sequence[str] | None = None,
    *,
    wide: bool = False,
) -> list[str]:
    """Print a table whose first column names the rows.

    `important`: headings that come first where the width does not suffice for all; None where all are. What does not
    fit is left out, or, if `wide`, follows in further tables. Returns the headings that were left out.
    """
    if not console.is_terminal:
        width, console.width = console.width, _PIPED
        console.print(_table(title, columns, [column.most for column in columns]))
        console.width = width
        return []
    first = [columns[0].heading, *(important or [column.heading for column in columns])]
    if _room([column for column in columns if column.heading in first], _NARROW) > console.width:
        columns = [column.stacked() for column in columns]
    # By place, as two columns may have the same heading.
    rank = lambda place: first.index(columns[place].heading) if columns[place].heading in first else len(first)  # noqa: E731
    left = sorted(range(1, len(columns)), key=rank)
    while left:
        taken = [0]
        for place in left:
            text = _NARROW if columns[place].heading in first else _TEXT
            if len(taken) == 1 or _room([columns[other] for other in (*taken, place)], text) <= console.width:
                taken.append(place)
        shown = [columns[place] for place in sorted(taken)]
        console.print(_table(title, shown, _widths(shown, console.width)))
        left = [place for place in left if place not in taken]
        title = ""
        if not wide:
            break
        if left:
            console.print()
    return [columns[place].heading for place in sorted(left)]


def _room(columns: Sequence[Column], text: int) -> int:
    """Characters that columns take at least, with texts broken to `text` characters."""
    return sum(min(column.least, text) if column.text else column.least for column in columns) + _GAP * (
        len(columns) - 1
    )


def _widths(columns: Sequence[Column], width: int) -> list[int]:
    """Of each column: what is left goes to texts first, then to headings."""
    widths = [min(column.least, _NARROW) if column.text else column.least for column in columns]
    spare = width - sum(widths) - _GAP * (len(columns) - 1)
    texts = [index for index, column in enumerate(columns) if column.text]
    for rank, index in enumerate(sorted(texts, key=lambda index: columns[index].most)):
        more = max(0, min(columns[index].most - widths[index], spare // (len(texts) - rank)))
        widths[index], spare = widths[index] + more, spare - more
    for index, column in enumerate(columns):
        more = column.most - widths[index]
        if 0 < more <= spare:
            widths[index], spare = column.most, spare - more
    return widths


def _table(title: str, columns: Sequence[Column], widths: Sequence[int]) -> Table:
    table = Table(
        title=title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),  # beside the border, which is a space
    )
    for column, width in zip(columns, widths, strict=True):
        heading = column.heading if _width(column.heading) <= width else column.heading.replace(" (", "\n(", 1)
        table.add_column(heading, justify="left" if column.text else "right", overflow="fold", width=width)
    cells = [
        column.broken(width).cells if column.text else column.cells
        for column, width in zip(columns, widths, strict=True)
    ]
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    return table


def _width(text: str) -> int:
    return max((cell_len(line) for line in visible(text).split("\n")), default=0)
