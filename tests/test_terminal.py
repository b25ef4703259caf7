import io
import logging

import pytest
from rich.table import Table

from vitopt import progress
from vitopt.terminal import Console, NoteFormatter, visible

NASTY = "[/red]\x1b[31m\x9b2J\r:warning:\u202e[b]é 猫"
SHOWN = "[/red]\\x1b[31m\\x9b2J\\r:warning:\\u202e[b]é 猫"


def test_text_without_control_characters_stays_as_it_is() -> None:
    text = "vit [large] · 99.2 % ± 0.5\tμs\nzweite Zeile 👨‍👩‍👧 猫"
    assert visible(text) == text


@pytest.mark.parametrize("code", [*range(32), *range(0x7F, 0xA0), 0x2028, 0x202E, 0x2066, 0xDC80])
def test_characters_that_a_terminal_obeys_are_written_out(code: int) -> None:
    shown = visible(f"a{chr(code)}b")
    if chr(code) in "\t\n":
        assert shown == f"a{chr(code)}b"
    else:
        assert shown.isprintable() and shown == f"a{chr(code).encode('unicode_escape').decode()}b"


def test_whatever_is_printed_is_visible() -> None:
    console = Console()
    console.file, console.width = io.StringIO(), 200
    table = Table(NASTY, title=NASTY)
    table.add_row(NASTY)
    console.print(NASTY)
    console.print(table)
    text = console.file.getvalue()
    assert text.count(SHOWN) == 4 and "\x1b" not in text


def test_notes_are_visible() -> None:
    record = logging.LogRecord("vitopt", logging.WARNING, __file__, 1, "bad image %s", (NASTY,), None)
    assert NoteFormatter("note: %(message)s").format(record) == f"note: bad image {SHOWN}"


def test_a_bar_shows_a_name_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    progress.enable("bars")
    try:
        assert list(progress.track([1, 2], f"memory of {NASTY}", 2)) == [1, 2]
    finally:
        progress.enable("off")
    shown = capsys.readouterr().err
    assert f"memory of {SHOWN}" in shown and "\x1b[31m\x9b" not in shown
