"""Tables fit the terminal, and no name is cut."""

import io
import re
from collections.abc import Sequence

import pytest

from vitopt.cli.tables import Column, print_columns
from vitopt.terminal import Console

LONG = "vit-tiny-patch16-224 nf4 compile fuse-qkv"
COLUMNS = [
    Column("variant", ["fp32", "bf16-compiled", LONG], text=True),
    Column("format", ["fp32", "bf16", "nf4, block.0 block.11 in 16 bit"], text=True),
    Column("top-1 %", ["89.1", "89.0", "86.7"]),
    Column("Δ points (95 %)", ["–", "-0.1 (-1.0 to +0.8)", "-2.4 (-4.5 to -0.3)"]),
    Column("p50 ms", ["123.4", "61.7", "110.2"]),
    Column("p95 ms", ["130.1 (≤ 145.3)", "62.0 (≤ 70.1)", "119.0 (≤ 131.2)"]),
    Column("weights", ["22 MB", "11 MB", "3.64 MB"]),
    Column("on disk", ["22 MB", "11 MB", "3.76 MB"]),
    Column("required", ["–", "met", "not shown"]),
]
IMPORTANT = ("top-1 %", "Δ points (95 %)", "p50 ms", "weights", "required")


def shown(
    width: int, columns: Sequence[Column] = COLUMNS, important: Sequence[str] | None = IMPORTANT, wide: bool = False
) -> tuple[list[str], list[str]]:
    """The lines on a terminal so wide, and the headings left out."""
    console = Console()
    console.file, console.width, console._force_terminal, console.no_color = io.StringIO(), width, True, True
    left_out = print_columns(console, "batch size 1", columns, important, wide=wide)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()
    return [line.rstrip() for line in lines], left_out


def column(lines: Sequence[str], width: int) -> str:
    """The first `width` characters of all lines, as one text without spaces."""
    return re.sub(r"\s", "", "".join(line[:width] for line in lines))


@pytest.mark.parametrize("width", [70, 80, 120, 200])
def test_nothing_is_wider_than_the_terminal_and_what_decides_is_there(width: int) -> None:
    lines, left_out = shown(width)
    assert max(map(len, lines)) <= width
    text = " ".join(lines)
    for one in COLUMNS:
        if one.heading in IMPORTANT:
            assert one.heading not in left_out
            assert all(part in text for cell in one.cells for part in re.split(r" (?=\()", cell))
    assert not re.search("…", text)


def test_more_columns_follow_as_far_as_they_fit() -> None:
    assert [len(shown(width)[1]) for width in (70, 120, 200)] == [3, 1, 0]
    assert shown(200)[0][3].split()[:4] == ["fp32", "fp32", "89.1", "–"]


@pytest.mark.parametrize("width", [70, 80, 120])
def test_a_long_name_breaks_at_spaces_and_hyphens_and_loses_nothing(width: int) -> None:
    lines, _ = shown(width)
    named = lines[next(index for index, line in enumerate(lines) if line.startswith("vit-")) :]
    pieces = [re.split(r"\s{2,}", line)[0].strip() for line in named]
    assert "".join(pieces).replace(" ", "").startswith(LONG.replace(" ", ""))
    assert all(piece.endswith("-") or piece in LONG for piece in pieces)


def test_wide_shows_all_columns_in_further_tables_of_the_same_rows() -> None:
    lines, left_out = shown(80, wide=True)
    assert left_out == [] and max(map(len, lines)) <= 80
    assert sum(line.startswith("fp32") for line in lines) == 2
    headings = re.sub(r"\s+", " ", " ".join(lines))
    assert all(word in headings for one in COLUMNS for word in one.heading.split())


def test_a_pipe_gets_all_columns_and_nothing_is_broken() -> None:
    console = Console()
    console.file, console.width = io.StringIO(), 40
    assert print_columns(console, "batch size 1", COLUMNS, IMPORTANT) == []
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3 + len(COLUMNS[0].cells) and console.width == 40
    assert all(cell in lines[3 + row] for one in COLUMNS for row, cell in enumerate(one.cells))


def test_texts_share_what_room_there_is() -> None:
    reason = "its shape cannot be held, because 100 is no multiple of 64"
    columns = [
        Column("layers", ["block.0"], True),
        Column("reason", [reason], True),
        Column("module", ["vit." * 9], True),
    ]
    lines, left_out = shown(60, columns, important=None)
    assert left_out == [] and max(map(len, lines)) <= 60
    assert all(word in " ".join(lines) for word in reason.split())
