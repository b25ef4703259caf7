"""Whether a model file that is machine code was written here: a seal by a key that only this user has.

Opening such a file runs it, so it is opened where its bytes are those that vitopt wrote, on this machine and for this
user. What came with a downloaded folder has no such seal, whatever its notes say (HMAC-SHA256, RFC 2104).
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from vitopt import storage

_KEY_BYTES = 32


def sealed(file: Path, checkpoint: str) -> str | None:
    """The seal of a model file for the checkpoint of this fingerprint; None where no key can be kept."""
    key = _key()
    if key is None:
        return None
    content = f"{storage.sha256_of_file(file)} {checkpoint}"
    return hmac.new(key, content.encode(), hashlib.sha256).hexdigest()


def is_sealed(file: Path, checkpoint: str, seal: str | None) -> bool:
    """Whether this `seal` is that of the file as it is now."""
    wanted = sealed(file, checkpoint) if seal and file.is_file() else None
    return wanted is not None and hmac.compare_digest(wanted.encode(), str(seal).encode())


def _key() -> bytes | None:
    """This user's key, made when it is first needed; readable by no one else."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "vitopt" / "key"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes()
            return key if len(key) == _KEY_BYTES else None
        with os.fdopen(descriptor, "wb") as file:
            file.write(key := secrets.token_bytes(_KEY_BYTES))
        return key
    except (OSError, RuntimeError):  # no home folder, or none that can be written to
        return None
