"""What all sections of a record share. Imports no torch."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections of a record: immutable, complete, no NaN (JSON has none)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
