"""How variants are measured. Imports no torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vitopt.spec import BatchSize, Name, Spec, Workers, as_list


class LatencySpec(Spec):
    """How variants are timed."""

    batch_sizes: Annotated[tuple[BatchSize, ...], BeforeValidator(as_list)] = Field(
        (1,), min_length=1, description="batch sizes to time, as in 1,8,32"
    )
    only: dict[Name, Annotated[tuple[BatchSize, ...], BeforeValidator(as_list)]] = Field(
        default_factory=dict, description="variants that are timed at some of the batch sizes only, as in fp32: [1]"
    )
    iterations: int = Field(100, ge=1, le=1_000_000_000, description="timed calls per variant and batch size")
    rounds: int = Field(10, ge=1, le=1_000_000, description="interleaved rounds that the calls are spread over")
    warmup_seconds: float = Field(20, ge=0, le=1e6, description="longest warm-up per variant and batch size")
    inputs: Literal["random", "data"] = Field(
        "random", description="data: real images in turn, for models that take longer on some images"
    )

    @model_validator(mode="before")
    @classmethod
    def _few_iterations_take_as_many_rounds(cls, content: Any) -> Any:
        if isinstance(content, dict) and "rounds" not in content and isinstance(content.get("iterations"), int):
            return content | {"rounds": max(1, min(content["iterations"], cls.model_fields["rounds"].default))}
        return content

    def times(self, name: str, batch_size: int) -> bool:
        """Whether the variant of this name is timed at this batch size."""
        return batch_size in self.only.get(name, self.batch_sizes)

    @model_validator(mode="after")
    def _only_narrows(self) -> "LatencySpec":
        for name, sizes in self.only.items():
            if not sizes or not set(sizes) <= set(self.batch_sizes):
                raise ValueError(
                    f"`only: {name}` must name some of the batch_sizes {', '.join(map(str, self.batch_sizes))}"
                )
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> "LatencySpec":
        if self.rounds > self.iterations:
            raise ValueError(f"{self.rounds} rounds need at least as many iterations, not {self.iterations}")
        return self


class EvaluateSpec(Spec):
    """How variants are measured."""

    batch_size: BatchSize = Field(32, description="images per call while accuracy is measured")
    workers: Workers = Field(0, description="processes that decode images; 0 uses one background thread")
    look_alikes: bool = Field(
        True, description="also count tested images that look like others or like training images"
    )
    latency: LatencySpec = LatencySpec()
    end_to_end: bool = Field(True, description="also time decode, preprocess, copy, model, postprocess")
    throughput: bool = Field(False, description="also find the highest rate by doubling the batch")
    roofline: bool = Field(False, description="also measure the device's GEMM and copy rates and what they allow")
