"""What all sections of a recipe share: immutable models that take no unknown key. Imports no torch."""

import difflib
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# Numbers and texts that no run can mean are refused before anything acts on them.
PATH_LENGTH = 4096
BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
ImageCount = Annotated[int, Field(ge=1, le=1_000_000_000)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$", max_length=80)]
Workers = Annotated[int, Field(ge=0, le=1_024)]


class Spec(BaseModel):
    """Base of all recipe sections: immutable, unknown keys are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def changed(self, *keys: str) -> str:
        """Those keys whose values are not the defaults, in words; a resolved recipe states the defaults as well."""
        defaults = {key: type(self).model_fields[key].get_default(call_default_factory=True) for key in keys}
        return ", ".join(f"`{key}`" for key in keys if getattr(self, key) != defaults[key])


class CalibrationSpec(Spec):
    """What is chosen or learned on calibration images, and which these are."""

    split: str = Field("train", description="split with the calibration images; never the tested ones")
    images: ImageCount = Field(2048, description="calibration images, spread over the classes")


def suggest(word: str, known: Sequence[str]) -> str:
    """The nearest word that is known, else all of them."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def as_list(value: Any) -> Any:
    """One text or number may stand for a list of one."""
    return [value] if isinstance(value, str | int) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(as_list)]
