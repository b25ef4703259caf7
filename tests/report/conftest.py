"""Records and run folders in code: every test says only what it is about."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vitopt.layers import LINEARS
from vitopt.measure import accuracy
from vitopt.measure.predictions import Predictions, save_predictions
from vitopt.records import Dataset, Latency, Model, Record, Roofline, Size, Variant, save_record
from vitopt.search.goal import Goal
from vitopt.search.results import Loss, Sensitivity, UnitScores
from vitopt.search.skiplist import search_skip_list

CLASSES = ("circle", "cross", "square", "stripe")
ENVIRONMENT = {
    "vitopt": "0.1.0",
    "processor": "Test CPU",
    "device": "cpu",
    "libraries": {"torch": "2.13.0", "flash-attn": None},
    "gpu": None,
}


def make_layers(format: str, half: str = "bf16", blocks: int = 12, **exceptions: str) -> dict[str, str]:
    """A layer plan with the head in 16 bit; exceptions are like `block_3="bf16"` or `block_3_fc2="bf16"`."""
    head = half if format in ("nf4", "int8", "w8a8", "fp8") else format
    layers = {f"block.{block}.{linear}": format for block in range(blocks) for linear in LINEARS}
    for name, other in exceptions.items():
        pattern = name.replace("_", ".")
        layers |= {layer: other for layer in layers if layer == pattern or layer.startswith(pattern + ".")}
    return layers | {"classifier": head}


def make_latency(batch_size: int, p50_ms: float, *, baseline_ms: float | None = None, count: int = 100) -> Latency:
    """Samples in ten rounds, 20 % apart between the fastest and the slowest, the median at `p50_ms`."""
    samples = p50_ms * np.linspace(0.9, 1.1, count).reshape(-1, 10).T.ravel()
    speedup = None if baseline_ms is None else baseline_ms / p50_ms
    return Latency(
        batch_size=batch_size,
        iterations=count,
        rounds=10,
        mean_ms=p50_ms,
        std_ms=0.06 * p50_ms,
        min_ms=float(samples.min()),
        p50_ms=p50_ms,
        p95_ms=float(np.percentile(samples, 95)),
        p99_ms=float(np.percentile(samples, 99)),
        images_per_second=1000 * batch_size / p50_ms,
        speedup_vs_baseline=speedup,
        speedup_ci95=None if speedup is None else (0.95 * speedup, 1.05 * speedup),
        warmup_ms=250.0,
        warmup_iterations=10,
        samples_ms=tuple(samples.tolist()),
    )


def make_predictions(wrong: Sequence[int] = (), images: int = 40, sharpness: float = 3.0) -> Predictions:
    """Image i is of class i modulo 4; the images in `wrong` are taken for the next class."""
    labels = np.arange(images) % len(CLASSES)
    chosen = labels.copy()
    chosen[list(wrong)] = (labels[list(wrong)] + 1) % len(CLASSES)
    logits = np.zeros((images, len(CLASSES)), np.float32)
    # Some images are clearer than others, so that they have an order.
    logits[np.arange(images), chosen] = sharpness + 0.05 * np.arange(images)
    names = tuple(f"{CLASSES[label]}/{index:02d}.png" for index, label in enumerate(labels))
    hashes = tuple(hashlib.sha256(name.encode()).hexdigest() for name in names)
    return Predictions(names, hashes, labels, logits)


def make_record(
    name: str,
    format: str = "fp32",
    *,
    p50_ms: dict[int, float] | None = None,
    floor_ms: dict[int, float] | None = None,
    baseline: tuple[str, Predictions] | None = None,
    baseline_ms: dict[int, float] | None = None,
    predictions: Predictions | None = None,
    weight_bytes: int | None = 20_000_000,
    layers: dict[str, str] | None = None,
    **fields: Any,
) -> Record:
    """A record with what is given; fields of Variant and of Record may be set by name.

    With `floor_ms` it has a roofline, and a utilisation as if arithmetic alone made the floor.
    """
    of_variant = {key: fields.pop(key) for key in list(fields) if key in Variant.model_fields}
    run = {"asked": {"attention": "sdpa"}, "ran": {"attention": "sdpa"}}
    variant = {"name": name, "format": format} | run | of_variant
    timed = {} if p50_ms is None else p50_ms
    content: dict[str, Any] = {
        "model": Model(
            source="model",
            architecture="ViTForImageClassification",
            parameters=5_717_416,
            image_size=(224, 224),
            flops_per_image=2_512_000_000,
            classes=len(CLASSES),
        ),
        "layers": make_layers(format) if layers is None else layers,
        "latency": tuple(
            make_latency(size, ms, baseline_ms=(baseline_ms or {}).get(size)) for size, ms in timed.items()
        ),
        "size": None if weight_bytes is None else Size(weight_bytes=weight_bytes, disk_bytes=weight_bytes + 70_000),
        "environment": ENVIRONMENT,
        "measured_together": "one session",
        "command": "vitopt run recipe.yaml",
        "created": "2026-01-02T03:04:05+00:00",
    }
    if floor_ms is not None:
        content["roofline"] = Roofline(
            gemm_format="bf16", gemm_flops_per_second=7.12e14, copy_bytes_per_second=4.104e12
        )
        content["latency"] = tuple(
            row.model_copy(update=_limits(floor_ms[row.batch_size], row.p50_ms)) for row in content["latency"]
        )
    if predictions is not None:
        content["accuracy"] = accuracy.summarise(predictions, CLASSES)
        content["dataset"] = Dataset(
            name="/data/shapes", split="test", images=len(predictions.ids), sha256="0" * 64, preprocessor="Processor"
        )
        if baseline is not None:
            content["versus_baseline"] = accuracy.compare(*baseline, predictions)
    return Record(variant=Variant(**variant), **(content | fields))


def _limits(floor_ms: float, p50_ms: float) -> dict[str, float]:
    return {"floor_ms": floor_ms, "model_flop_utilisation_percent": 100 * floor_ms / p50_ms}


def write_run(
    folder: Path, records: Sequence[Record], predictions: dict[str, Predictions] | None = None, waterfall: bool = False
) -> Path:
    """A run's folder as the pipeline leaves it, without weights; with `waterfall`, its recipe names all variants so."""
    if waterfall:
        names = [record.variant.name for record in records]
        variants = [{"name": name, "format": "bf16"} for name in names]
        recipe = {"name": "x", "model": "x", "variants": variants, "waterfall": names}
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
    for index, record in enumerate(records):
        # Names of folders follow the recipe's rules, names in records come from anywhere.
        place = folder / "variants" / f"{index:02d}"
        place.mkdir(parents=True)
        save_record(record, place)
        (place / "config.json").write_text(json.dumps({"id2label": dict(enumerate(CLASSES))}))
        if predictions and record.variant.name in predictions:
            save_predictions(predictions[record.variant.name], place)
    return folder


def make_loss(kl: float, images: int = 400, flips: int | None = None) -> Loss:
    """A loss of one flipped image per 0.004 nats, or of `flips`; the interval is as wide as with that many flips."""
    lost = round(kl / 0.004) if flips is None else flips
    delta, half = -100 * lost / images, 100 * 1.96 * (abs(lost) + 4) ** 0.5 / images
    return Loss(
        top1_delta_points=delta,
        top1_delta_ci95_points=(delta - half, delta + half),
        agreement_percent=100 - 100 * min(1.0, 2 * kl),
        kl=kl,
        logit_error=kl**0.5,
    )


def make_sensitivity(
    blocks: int = 12,
    granularity: str = "block",
    *,
    goal: Goal | None = Goal(max_kl_share=0.5),  # noqa: B008
    sample: int | None = None,
    extra_ms: float | None = 0.1,
    images: int = 400,
    **fields: Any,
) -> Sensitivity:
    """An analysis whose gains add up to all of the KL, spread without chance; `sample` scores only so many exactly.

    Every seventh unit makes things worse when it is kept.
    """
    names = [f"block.{block}" for block in range(blocks)]
    if granularity == "linear":
        names = [f"{name}.{linear}" for name in names for linear in LINEARS]
    total = 0.12
    shares = 1 + 3 * ((1 + np.arange(len(names))) * 0.618034 % 1)
    gains = dict(
        zip(names, (total * shares / shares.sum() * np.where(np.arange(len(names)) % 7 == 6, -0.3, 1)), strict=True)
    )
    scale = total / sum(gains.values())
    gains = {name: float(gain * scale) for name, gain in gains.items()}
    best = sorted(names, key=lambda name: -gains[name])[:sample]

    def mixture(kept: frozenset[str]) -> Loss:
        found = make_loss(max(0.0, total - sum(gains[name] for name in kept)), images)
        share = found.kl / total
        return found.model_copy(update={"kl_share": share, "kl_share_ci95": (0.95 * share, share)})

    units = [
        UnitScores(
            unit=name,
            damage=make_loss(abs(gains[name]) / 2, images),
            recovery=make_loss(total - gains[name], images, flips=-round(gains[name] / 0.004)),
            extra_bytes=650_000 if granularity == "block" else 50_000 * (1 + 3 * name.endswith(("fc1", "fc2"))),
            extra_ms=extra_ms,
        )
        for name in names
        if name in best
    ]
    quantized = mixture(frozenset())
    untried = len(names) - len(units)
    looks: dict[str, Any] = {"quantized": quantized, "images": images, "confirming_images": 3 * images}
    search = None if goal is None else search_skip_list(units, mixture, mixture, goal, **looks, untried=untried)
    content: dict[str, Any] = {
        "checkpoint": "/models/vit",
        "checkpoint_sha256": "a" * 64,
        "format": "nf4",
        "half": "bf16",
        "granularity": granularity,
        "images": images,
        "dataset": "/data/shapes",
        "dataset_sha256": "b" * 64,
        "sample_images": None if sample is None else 64,
        "sample_kl": {} if sample is None else {name: total - 0.9 * gains[name] for name in names},
        "quantized": quantized,
        "units": tuple(units),
        "seconds": 33.5,
        "search": search,
        "environment": ENVIRONMENT,
    }
    return Sensitivity(**(content | fields))


@pytest.fixture(scope="session")
def comparison() -> tuple[list[Record], dict[str, Predictions]]:
    """Four variants at two batch sizes: fp32, bf16 as good, nf4 that loses, and one that failed."""
    before = make_predictions(wrong=(0, 5))
    found = {"fp32": before, "bf16": before, "nf4": make_predictions(wrong=(0, *range(8, 32)))}
    against = ("fp32", before)
    times = {1: 30.0, 8: 180.0}
    records = [
        make_record("fp32", "fp32", p50_ms=times, predictions=found["fp32"]),
        make_record(
            "bf16",
            "bf16",
            p50_ms={1: 20.0, 8: 100.0},
            baseline=against,
            baseline_ms=times,
            predictions=found["bf16"],
            weight_bytes=10_000_000,
        ),
        make_record(
            "nf4",
            "nf4",
            p50_ms={1: 24.0, 8: 120.0},
            baseline=against,
            baseline_ms=times,
            predictions=found["nf4"],
            weight_bytes=3_600_000,
        ),
        make_record("fp8", "fp8", failure="fp8 cannot run on cpu", layers={}, model=None, size=None, weight_bytes=None),
    ]
    return records, found


def fields_of_run(asked: Any = (), ran: Any = (), **reasons: str) -> dict[str, Any]:
    """Fields of a variant that asks for plain sdpa, and more."""
    plain = {"attention": "sdpa", "sdpa_kernel": "auto"}
    return {
        "asked": plain | dict(asked),
        "ran": {"attention": "sdpa", "sdpa_kernel": None} | dict(ran),
        "reasons": reasons,
    }


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """Makers of records, latencies, predictions, layer plans, run folders and sensitivity analyses."""
    return SimpleNamespace(
        record=make_record,
        latency=make_latency,
        predictions=make_predictions,
        layers=make_layers,
        run=write_run,
        ran=fields_of_run,
        loss=make_loss,
        sensitivity=make_sensitivity,
    )
