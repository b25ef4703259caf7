"""The measured result of one variant: what is stored in `record.json`, with its JSON schema.

Numbers are numbers, units are in the names, unknown is null. `SCHEMA` changes whenever a field changes its
meaning or goes away; records of another schema are refused rather than misread.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitopt import storage
from vitopt.errors import RecordError

SCHEMA = "vitopt.record/1"
RECORD_FILE = "record.json"


class Part(BaseModel):
    """Base of all parts of a record: immutable, complete, no NaN (JSON has none)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Variant(Part):
    """What was asked for and what ran."""

    name: str
    format: str = Field(description="format of most quantized layers, or of all when none is quantized")
    half: str | None = Field(None, description="16-bit type of the layers that are not quantized")
    skip: tuple[str, ...] = Field((), description="patterns that were kept in 16 bit")
    attention_requested: str
    layers: dict[str, str] = Field(default_factory=dict, description="patterns that got another format")
    attention_used: str | None = Field(description="read back from the live model; null if it never ran")
    attention_reason: str | None = Field(None, description="why another attention than the requested one ran")
    sdpa_kernel_requested: str = "auto"
    sdpa_kernel_used: str | None = Field(None, description="read from a profiled call; null if none was recognised")
    sdpa_kernel_reason: str | None = Field(None, description="why another kernel than the requested one ran")
    stored_format: str | None = Field(None, description="format on disk where the layers were expanded at load")
    fused_attentions: int = Field(0, description="attentions whose query, key and value run as one matrix product")
    channels_last: bool = Field(False, description="pixels and patch embedding in NHWC memory order")
    compile_requested: bool = False
    compile_used: bool = False
    compile_reason: str | None = Field(
        None, description="why compilation was asked for and did not happen, at all or for one batch size"
    )
    autotune: bool = Field(False, description="whether the compiler was asked to time its kernels first")


class Model(Part):
    """What was loaded."""

    source: str
    sha256: str | None = Field(None, description="of the weight files, in order of name")
    architecture: str
    parameters: int = Field(description="logical count: a packed 4-bit matrix counts its original elements")
    image_size: tuple[int, int] = Field(description="height, width in pixels")
    flops_per_image: int | None = Field(None, description="of matrix products and convolutions, a multiply-add as 2")
    classes: int


class Accuracy(Part):
    """Top-k accuracy over one data set."""

    images: int
    top1_percent: float
    top1_ci95_percent: tuple[float, float] = Field(description="Wilson interval")
    top5_percent: float | None = Field(description="null with fewer than six classes")
    expected_calibration_error: float = Field(description="15 bins of equal width, 0 to 1")
    classes: tuple["ClassAccuracy", ...] = ()


class ClassAccuracy(Part):
    """Top-1 accuracy on the images of one class."""

    label: int
    name: str
    images: int
    top1_percent: float


class VersusBaseline(Part):
    """Paired comparison with the baseline on the same images."""

    baseline: str
    top1_delta_points: float
    top1_delta_ci95_points: tuple[float, float] = Field(description="Tango's score interval for paired proportions")
    agreement_percent: float = Field(description="images on which both give the same class")
    agreement_ci95_percent: tuple[float, float] | None = Field(None, description="Wilson interval")
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float
    mcnemar_holm_p: float | None = Field(
        None, description="the same, adjusted for all variants that were compared with this baseline (Holm 1979)"
    )
    mean_kl_divergence: float = Field(description="nats, KL(baseline || variant) of the softmax outputs")
    kl_ci95: tuple[float, float] | None = Field(None, description="nats, bootstrap over images")
    normalised_logit_error: float = Field(description="norm of the difference over norm of the baseline's logits")
    smallest_visible_loss_points: float = Field(description="a smaller true loss would likely go unseen here")
    verdict: str


class Floor(Part):
    """The floor that an automatic skip list was given, judged on the tested images, which had no part in its choice."""

    max_top1_drop: float = Field(description="points of top-1 against the baseline")
    decision: Literal["shown", "failed", "undecided"] = Field(description="by the 95 % interval of the change of top-1")


class Latency(Part):
    """Time per call at one batch size: what a caller waits, inputs already on the device."""

    batch_size: int
    iterations: int
    rounds: int = Field(description="interleaved with the other variants round by round")
    mean_ms: float
    std_ms: float | None
    min_ms: float
    p50_ms: float
    p95_ms: float | None = Field(description="null under 20 samples")
    p99_ms: float | None = Field(description="null under 100 samples")
    p50_ci95_ms: tuple[float | None, float | None] | None = Field(
        None, description="by order statistics, as the next two; a limit that so few samples cannot give is null"
    )
    p95_ci95_ms: tuple[float | None, float | None] | None = None
    p99_ci95_ms: tuple[float | None, float | None] | None = Field(
        None, description="a service level is judged by the upper limit"
    )
    device_p50_ms: float | None = Field(None, description="CUDA event time; null on the CPU")
    images_per_second: float = Field(description="batch size over the median")
    speedup_vs_baseline: float | None = None
    speedup_ci95: tuple[float, float] | None = None
    floor_ms: float | None = Field(None, description="what the device's GEMM and copy rates allow at this batch size")
    model_flop_utilisation_percent: float | None = Field(None, description="share of the measured GEMM rate")
    peak_bytes: int | None = Field(None, description="CUDA: as `memory.peak_bytes`, at this batch size")
    warmup_ms: float = Field(description="first calls, compilation included; in no other figure")
    warmup_iterations: int
    settled: bool | None = Field(None, description="whether the warm-up ended because calls took a steady time")
    discarded_calls: int = Field(0, description="first calls after a switch between variants; in no other figure")
    samples_ms: tuple[float, ...] = Field(description="in order of time; equal shares per round")
    device_samples_ms: tuple[float, ...] | None = None


class FailedLatency(Part):
    """A batch size at which the variant could not be timed."""

    batch_size: int
    reason: str


class EndToEnd(Part):
    """Time per call from image file to class, split into its parts, mean milliseconds per call."""

    batch_size: int
    iterations: int
    decode_ms: float
    preprocess_ms: float
    copy_ms: float
    model_ms: float
    postprocess_ms: float
    total_p50_ms: float
    total_p95_ms: float | None
    images_per_second: float


class Throughput(Part):
    """Highest rate over batch sizes that are doubled until memory or the gain runs out."""

    batch_size: int = Field(description="at which the rate was reached")
    images_per_second: float
    largest_batch_size: int = Field(description="largest that was tried and fitted")


class Size(Part):
    """Bytes of the weights as held in memory and of the checkpoint's files."""

    weight_bytes: int
    disk_bytes: int | None = Field(description="null where the weights are not in local files")


class Memory(Part):
    """Peak memory of running this variant alone."""

    peak_bytes: int
    reserved_bytes: int | None = None
    kind: Literal["cuda_allocated", "resident_set"] = Field(
        description="CUDA: peak allocated by tensors, this variant's weights included; CPU: peak resident set of "
        "a process that does nothing but load and run it"
    )
    batch_size: int


class BatchInvariance(Part):
    """Whether an image gets the same answer alone and among other images."""

    images: int
    batch_size: int = Field(description="compared with a batch of one")
    agreement_percent: float
    max_logit_difference: float = Field(description="largest over all images and classes")


class Roofline(Part):
    """What the device gave in the same run, by the formats of vitopt; utilisation and floor are against it."""

    gemm_format: str = Field(description="format of the matrix product behind `gemm_flops_per_second`")
    gemm_flops_per_second: float
    copy_bytes_per_second: float = Field(description="bytes read and written per second by a large copy")


class Dataset(Part):
    """Which images were used."""

    name: str
    split: str | None
    images: int
    sha256: str = Field(description="of all image contents and labels, in order")
    skipped: tuple[str, ...] = Field((), description="images left out because they cannot be decoded")
    preprocessor: str = Field(description="class that turned images into pixels; backends differ slightly")


class Record(Part):
    """Everything measured about one variant; `failure` says why where nothing could be."""

    schema_: str = Field(SCHEMA, alias="schema")
    variant: Variant
    failure: str | None = None
    model: Model | None = None
    layer_plan: dict[str, int] = Field(default_factory=dict, description="format -> number of linear layers")
    layers: dict[str, str] = Field(default_factory=dict, description="logical name -> format, from the live model")
    accuracy: Accuracy | None = None
    versus_baseline: VersusBaseline | None = None
    floor: Floor | None = Field(None, description="null without `skip: auto`, a floor of top-1 and a comparison")
    latency: tuple[Latency, ...] = ()
    latency_failures: tuple[FailedLatency, ...] = ()
    end_to_end: tuple[EndToEnd, ...] = ()
    throughput: Throughput | None = None
    size: Size | None = None
    memory: Memory | None = None
    energy_joules_per_image: float | None = None
    batch_invariance: BatchInvariance | None = Field(None, description="null if not measured")
    roofline: Roofline | None = Field(None, description="the device's rates in the same run; null if not measured")
    environment: dict[str, Any] = Field(default_factory=dict)
    dataset: Dataset | None = None
    warnings: tuple[str, ...] = Field((), description="conditions under which the figures deserve less trust")
    unmeasured: dict[str, str] = Field(default_factory=dict, description="figure that is null -> why")
    measured_together: str | None = Field(
        None, description="the same in all records whose calls were interleaved; only those have comparable times"
    )
    command: str | None = None
    created: str | None = Field(None, description="ISO 8601, UTC")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def to_json(self) -> dict[str, Any]:
        """Plain data as stored in `record.json`."""
        return self.model_dump(mode="json", by_alias=True)


def save_record(record: Record, folder: Path) -> Path:
    """Write `record.json` into `folder` and return its path."""
    path = folder / RECORD_FILE
    storage.write_json(path, record.to_json())
    return path


def load_record(path: Path) -> Record:
    """Read a record from a file or from the folder that holds `record.json`.

    Raises:
        RecordError: missing, not JSON, or of another schema version.
    """
    file = path / RECORD_FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"no record at {file}: run `vitopt evaluate` or `vitopt run` first") from error
    except ValueError as error:
        raise RecordError(f"{file} is not a JSON record: {error}; measure again") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise RecordError(
            f"{file} has schema {schema!r}, this vitopt reads {SCHEMA!r}: measure again with this version"
        )
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecordError(f"{file} is not a complete record: {where}: {first['msg']}; measure again") from error


def json_schema() -> dict[str, Any]:
    """JSON schema of a record, every field described."""
    return Record.model_json_schema(by_alias=True)
