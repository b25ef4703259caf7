"""What stands at a path that somebody typed: any text may be asked about, and none raises."""

import os
from pathlib import Path


def existing(text: str | Path) -> Path | None:
    """The file or folder that `text` names, `~` expanded; None where there is none, or no path looks like that."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:  # ~ of a user that is not known
        return None
    return path if os.path.exists(path) else None  # noqa: PTH110 (Path.exists raises for names that are too long)
