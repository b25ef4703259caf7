"""How models are served. Imports no torch."""

from typing import Annotated

from pydantic import Field, model_validator

from vitopt.spec import Spec

TOKEN_VARIABLE = "VITOPT_SERVE_TOKEN"  # of the environment: what callers must send, and what `vitopt load` sends

Positive = Annotated[float, Field(gt=0)]


class ServeSpec(Spec):
    """How requests are taken, gathered and refused."""

    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0 is reached from other machines")
    port: int = Field(8000, ge=0, le=65535, description="port; 0 takes a free one")
    batch_sizes: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        (1, 2, 4, 8), min_length=1, description="batches that are built at the start; requests are gathered into them"
    )
    target_p99_ms: Positive | None = Field(
        None,
        description="refuse at once what would wait longer; without it `queue` alone limits",
    )
    queue: int = Field(64, ge=1, le=100_000, description="requests that may wait; more are refused with 503")
    decoders: int = Field(2, ge=1, le=1024, description="threads that decode and resize images beside the model")
    timeout_s: Positive = Field(30.0, description="a request that has no answer by then gets 504")
    max_bytes: int = Field(20_000_000, ge=1, description="size of a request")
    max_pixels: int = Field(50_000_000, ge=1, description="pixels of an image, known before it is decoded")
    ab: bool = Field(False, description="requests that name no model are divided evenly among the models")

    @model_validator(mode="after")
    def _sizes_ascend(self) -> "ServeSpec":
        if sorted(set(self.batch_sizes)) != list(self.batch_sizes):
            raise ValueError("`batch_sizes` must ascend, each once, as in 1,2,4,8")
        if self.queue < self.batch_sizes[-1]:
            raise ValueError(f"`queue` holds {self.queue} requests, fewer than the largest of `batch_sizes`")
        return self
