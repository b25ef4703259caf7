"""What is at a path that a user typed: any text is accepted, none raises."""

import os
from pathlib import Path


def existing(text: str | Path) -> Path | None:
    """The file or folder that `text` names, `~` expanded; None where there is none, or the text cannot be a path."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # ~ of a user that is not known
        return None
    return path if os.path.exists(path) else None  # noqa: PTH110 (Path.exists raises for names that are too long)
