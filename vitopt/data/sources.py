"""Which data set a string such as `photos:test` names, and which of its splits."""

import re
from pathlib import Path

from vitopt.paths import existing

# What folders and the hub call a split; anything else behind a colon is a part of the path.
_SPLIT = re.compile(r"[\w-]+(\.[\w-]+)*")


def parse_source(text: str) -> tuple[str, str | None]:
    """The data set and the split that `text` names, None where it names none.

    The last colon divides the two. It belongs to the data set's own name where a folder of the whole name exists
    (`frames:2024`), or where what follows can be no split (`C:\\photos`).
    """
    source, _, split = text.rpartition(":")
    if not source or not _SPLIT.fullmatch(split) or existing(text):
        return text, None
    return source, split


def may_be_on_hub(source: str) -> bool:
    """Whether `source` has the form of a Hugging Face data set id: `NAME` or `OWNER/NAME`."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) is not None


def hub_id(source: str) -> str | None:
    """The data set on the hub that `source` names; None for a local folder, and for the built-in set."""
    local = source == "digits" or existing(source) is not None
    return source if may_be_on_hub(source) and not local else None


def public_name(source: str) -> str:
    """What a data set can be called elsewhere: its hub id, or the name of its folder without the path."""
    return hub_id(source) or (existing(source) or Path(source)).resolve().name
