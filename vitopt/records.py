"""The measured result of one variant: what is stored in `record.json`, with its JSON schema.

Numbers are numbers, units are in the names, unknown is null. `SCHEMA` changes whenever a field changes its
meaning or goes away; records of another schema are refused rather than misread.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from vitopt import record_upgrade, storage
from vitopt.errors import RecordError
from vitopt.section import Section
from vitopt.serving_record import Serving

SCHEMA = record_upgrade.NEW
RECORD_FILE = "record.json"

Option = str | bool | None  # what an option of a run is set to
# What a model gives: a logit for each class, of which one is right; a logit for each of independent labels; or vectors.
Outputs = Literal["classes", "labels", "embedding"]


class Variant(Section):
    """What was asked for and what ran."""

    name: str
    format: str = Field(
        description="as asked for: what layers expand to at load, else what they are made in; of a checkpoint from "
        "elsewhere, what it is stored in"
    )
    half: str | None = Field(None, description="16-bit type of the layers that are not quantized")
    skip: tuple[str, ...] = Field((), description="patterns that were kept in 16 bit")
    layers: dict[str, str] = Field(default_factory=dict, description="patterns that got another format")
    rounding: dict[str, Any] | None = Field(
        None, description="settings of weights rounded on calibration images; null: each to its nearest, or not known"
    )
    stored_format: str | None = Field(None, description="format on disk where the layers were expanded at load")
    steps: tuple[dict[str, Any], ...] = Field(
        (), description="what was done to the checkpoint before its format was made, in order: name -> settings"
    )
    chosen: str | None = Field(
        None, description="why it has this format and runs so, where `format: auto` asked for the fastest"
    )
    asked: dict[str, Option] = Field(default_factory=dict, description="how it was to be run, by option")
    ran: dict[str, Option] = Field(
        default_factory=dict, description="how it ran, by option, read back from what ran; empty if nothing did"
    )
    tokens: tuple[int, ...] | None = Field(
        None, description="tokens that each block is given, then those that the last one leaves; null where all stay"
    )
    reasons: dict[str, str] = Field(default_factory=dict, description="option -> why it ran otherwise than asked")


class Model(Section):
    """What was loaded."""

    source: str
    sha256: str | None = Field(None, description="of the weight files, in order of name")
    architecture: str
    parameters: int = Field(description="logical count: a packed 4-bit matrix counts its original elements")
    image_size: tuple[int, int] = Field(description="height, width in pixels")
    flops_per_image: int | None = Field(None, description="of matrix products and convolutions, a multiply-add as 2")
    classes: int


class Accuracy(Section):
    """Top-k accuracy over one data set."""

    images: int
    top1_percent: float
    top1_ci95_percent: tuple[float, float] = Field(description="Wilson interval")
    top5_percent: float | None = Field(description="null with fewer than six classes")
    expected_calibration_error: float = Field(description="15 bins of equal width, 0 to 1")
    calibration_noise: float | None = Field(
        None, description="mean of calibration_error on this many images if every confidence were true"
    )
    classes: tuple["ClassAccuracy", ...] = ()


class ClassAccuracy(Section):
    """Top-1 accuracy on the images of one class."""

    label: int
    name: str
    images: int
    top1_percent: float


class VersusBaseline(Section):
    """Paired comparison with the baseline on the same images."""

    baseline: str
    top1_delta_points: float
    top1_delta_ci95_points: tuple[float, float] = Field(description="Tango's score interval for paired proportions")
    agreement_percent: float = Field(description="images on which both give the same class")
    agreement_ci95_percent: tuple[float, float] | None = Field(None, description="Wilson interval")
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float = Field(description="exact; of groups of images, by flipping the signs of whole groups")
    mcnemar_holm_p: float | None = Field(
        None, description="the same, adjusted for all variants that were compared with this baseline (Holm 1979)"
    )
    mean_kl_divergence: float = Field(description="nats, KL(baseline || variant) of the softmax outputs")
    kl_ci95: tuple[float, float] | None = Field(None, description="nats, bootstrap over images")
    normalised_logit_error: float = Field(description="norm of the difference over norm of the baseline's logits")
    smallest_visible_loss_points: float = Field(description="a true loss of this size is seen 8 times in 10")
    verdict: str


class Metric(Section):
    """A metric of the user's own over all images, and its change against the baseline on the same images."""

    value: float = Field(description="over all images, or the mean of a value for each")
    ci95: tuple[float, float] | None = Field(None, description="bootstrap over images, or over their groups")
    baseline: str | None = Field(None, description="what `delta` is against")
    delta: float | None = Field(None, description="value minus the baseline's")
    delta_ci95: tuple[float, float] | None = Field(None, description="paired: both on the same resampled images")


class Latency(Section):
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
    device_p50_ms: float | None = Field(
        None, description="CUDA: time per call of a queue, median over rounds; null on the CPU"
    )
    by_mean: bool = Field(False, description="calls do not all do the same work: the next two figures are of means")
    images_per_second: float = Field(description="batch size over the median, or the mean")
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
    device_samples_ms: tuple[float, ...] | None = Field(None, description="one per round")

    @property
    def typical_ms(self) -> float:
        """What a call takes: the median, or the mean where calls do not all do the same work."""
        return self.mean_ms if self.by_mean else self.p50_ms


class FailedLatency(Section):
    """A batch size at which the variant could not be timed."""

    batch_size: int
    reason: str


class EndToEnd(Section):
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


class Throughput(Section):
    """Highest rate over batch sizes that are doubled until memory or the gain runs out, kept up for 5 s."""

    batch_size: int = Field(description="at which the rate was reached")
    images_per_second: float
    largest_batch_size: int = Field(description="largest that was tried and fitted")


class Size(Section):
    """Bytes of the weights as held in memory and of the checkpoint's files."""

    weight_bytes: int
    disk_bytes: int | None = Field(description="null where the weights are not in local files")


class Memory(Section):
    """Peak memory of running this variant alone."""

    peak_bytes: int
    reserved_bytes: int | None = Field(None, description="CUDA: what the allocator took for one call alone")
    kind: Literal["cuda_allocated", "resident_set"] = Field(
        description="CUDA: peak allocated by tensors, this variant's weights included; CPU: peak resident set of "
        "a process that does nothing but load and run it"
    )
    batch_size: int


class BatchInvariance(Section):
    """Whether an image gets the same answer alone and among other images."""

    images: int = Field(description="spread over the data set")
    batch_size: int = Field(
        description="compared with a batch of one; where that is not compiled, with one of copies of the image"
    )
    agreement_percent: float | None = Field(
        description="images that get the same class; null where outputs are not classes"
    )
    max_logit_difference: float = Field(description="largest over all images and classes")


class Roofline(Section):
    """The rates of the device in the same run, from which utilisation and floor are computed."""

    gemm_format: str = Field(description="format of the matrix product behind `gemm_flops_per_second`")
    gemm_flops_per_second: float = Field(description="of a device that has worked; utilisation is against it")
    gemm_flops_per_second_cold: float | None = Field(None, description="of a device that was idle before")
    copy_bytes_per_second: float = Field(description="bytes read and written per second by a large copy")


class GpuLoad(Section):
    """The GPU while the calls of all variants were timed, looked at several times a second."""

    polls: int = Field(description="number of readings of the GPU")
    mean_power_watts: float | None = Field(description="null where the driver does not tell, as the next three")
    max_power_watts: float | None = Field(description="highest that was seen")
    median_clock_mhz: float | None = Field(description="of its multiprocessors")
    min_clock_mhz: float | None = Field(description="lowest that was seen")
    throttled: dict[str, float] = Field(description="reason for lowered clocks -> share of the looks that saw it")


class Requirement(Section):
    """Something required of a variant, and whether its 95 % interval shows it."""

    name: str = Field(description="key of `require`, or `auto.` and the key of a floor of `skip: auto`")
    limit: float = Field(description="what is asked for, in the unit of the key")
    measured: float | None = Field(description="the estimate, which decides nothing")
    ci95: tuple[float | None, float | None] | None = Field(None, description="an end that is not known is null")
    decision: Literal["shown", "failed", "undecided"] = Field(description="by the whole interval")
    batch_size: int | None = Field(None, description="of what was timed")
    reason: str | None = Field(None, description="why it is undecided, or what would likely decide it")
    would_decide: int | None = Field(None, description="images, of speed calls, in all that would likely decide it")


class Overlap(Section):
    """Tested images that the checkpoint has seen before, or that are tested more than once."""

    where: str = Field(description="`test`, or what the checkpoint saw them for: `training`, `skip list`, `format`")
    same: int = Field(description="tested images with exactly the same content")
    alike: int | None = Field(
        description="others that look like one there: perceptual hashes at most 6 of 64 bits apart; null if unknown"
    )
    examples: tuple[str, ...] = Field((), description="tested image and the one it is or looks like; at most ten")


class Dataset(Section):
    """Which images were used."""

    name: str
    split: str | None
    images: int
    sha256: str = Field(description="of all image contents and labels, in order")
    skipped: tuple[str, ...] = Field((), description="images left out because they cannot be decoded")
    preprocessor: str = Field(description="class that turned images into pixels; backends differ slightly")
    groups: int | None = Field(
        None, description="groups of images that depend on each other, which intervals allow for; null: none were named"
    )
    overlaps: tuple[Overlap, ...] = Field((), description="tested images that are met again; empty where none was")


class Routing(Section):
    """A first pass answers the images that it is sure of, a second one the others."""

    first: Model = Field(
        description="what runs for every image; its `source` lies in that of `model`, which is the second pass"
    )
    first_format: str = Field(description="of the first pass; that of the variant is the second pass's")
    first_ran: dict[str, Option] = Field(description="how it ran, by option, where that differs from the second pass")
    proxy: str = Field(description="what tells how sure the first pass is")
    threshold: float | None = Field(description="images that score lower get the second pass; null: all of them")
    temperature: float = Field(description="that the first pass's logits are divided by before they are scored")
    promise: str = Field(description="what the threshold was chosen for, and on how many images")
    escalated_percent: float | None = Field(
        None, description="tested images that got the second pass; all others were answered by the first"
    )


class Record(Section):
    """Everything measured about one variant; `failure` says why where nothing could be."""

    schema_: str = Field(SCHEMA, alias="schema")
    variant: Variant
    failure: str | None = None
    model: Model | None = None
    layer_plan: dict[str, int] = Field(default_factory=dict, description="format -> number of linear layers")
    layers: dict[str, str] = Field(default_factory=dict, description="logical name -> format, from the live model")
    accuracy: Accuracy | None = None
    versus_baseline: VersusBaseline | None = None
    metrics: dict[str, Metric] = Field(default_factory=dict, description="the user's own, by name")
    routing: Routing | None = Field(None, description="of an adaptive model, else null")
    latency: tuple[Latency, ...] = ()
    latency_failures: tuple[FailedLatency, ...] = ()
    end_to_end: tuple[EndToEnd, ...] = ()
    serving: Serving | None = Field(None, description="what callers of a server felt; null where none was asked")
    throughput: Throughput | None = None
    size: Size | None = None
    memory: Memory | None = None
    energy_joules_per_image: float | None = None
    requirements: tuple[Requirement, ...] = Field((), description="what the recipe requires of this variant")
    batch_invariance: BatchInvariance | None = Field(None, description="null if not measured")
    roofline: Roofline | None = Field(None, description="the device's rates in the same run; null if not measured")
    gpu_load: GpuLoad | None = Field(None, description="null on the CPU and without NVML")
    environment: dict[str, Any] = Field(default_factory=dict)
    dataset: Dataset | None = None
    warnings: tuple[str, ...] = Field((), description="conditions under which the figures deserve less trust")
    unmeasured: dict[str, str] = Field(default_factory=dict, description="figure that is null -> why")
    measured_together: str | None = Field(
        None, description="the same in all records whose calls were interleaved; only those have comparable times"
    )
    baseline_of: tuple[str, ...] = Field(
        (),
        description="earlier sessions in which the same was the baseline; speed-ups of rows measured then are theirs",
    )
    command: str | None = None
    created: str | None = Field(None, description="ISO 8601, UTC")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def latency_at(self, batch_size: int | None) -> Latency | None:
        """Latency at one batch size (None: the first measured); None where it was not measured."""
        return next((row for row in self.latency if batch_size in (None, row.batch_size)), None)

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
    content = record_upgrade.upgraded(content)
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
