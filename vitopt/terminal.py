"""Text on a terminal: control characters and markup in names are printed as text and have no effect."""

import logging
import re
from typing import Any

from rich import console
from rich.text import Text

# Control characters but tab and new line, marks that turn the direction of text, and bytes that are no UTF-8.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with its invisible characters written out, as in `\\x1b`."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def spreadsheet_text(text: str) -> str:
    """`text` for a cell of a CSV file: what a spreadsheet would take for a formula is text (OWASP, "CSV Injection")."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


class Console(console.Console):
    """Prints every string visibly, in tables too, and takes no brackets or colons in it for markup or emoji."""

    def __init__(self, stderr: bool = False):
        super().__init__(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """The strings of everything that is printed come through here."""
        return super().render_str(visible(text), **options)


class NoteFormatter(logging.Formatter):
    """A visible line for each warning."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))
