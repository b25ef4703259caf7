"""The model card of one checkpoint: what it is, where it comes from, what was measured, how to load it.

Its metadata are the hub's (https://huggingface.co/docs/hub/model-cards). No card holds a local path: FOLDER stands for
where the checkpoint is.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from vitopt import storage
from vitopt.data.sources import hub_id, public_name
from vitopt.engines.note import Package
from vitopt.formats import FORMATS, QUANTIZED_FORMATS
from vitopt.models.checkpoint import Checkpoint, empty_model, open_checkpoint, parameter_count
from vitopt.models.origin import FINETUNE, QUANTIZE, Origin, load_origin
from vitopt.ownership import CARD_FILE, is_edited, sealed
from vitopt.recipe import ENGINES
from vitopt.records import Model, Record, Variant
from vitopt.report import table, variants
from vitopt.report.rendering import templates
from vitopt.report.summary import listed

_TASK = "image-classification"
_LIBRARIES = {
    "openvino": "openvino",
    "onnxruntime": "onnx",
    "tensorrt": "tensorrt",
}  # the hub's names for what is no checkpoint
# From the root, the home folder or a parent one; what follows a word or a colon is part of an address or of a unit.
_LOCAL_PATH = re.compile(r"(?<![\w:/.~])(?:~|\.{1,2})?/(?:[^\s/,;:()'\"`|]+/)*([^\s/,;:()'\"`|]+)/?")


def write_card(record: Record, folder: Path, records: Sequence[Record], example: str | None = None) -> None:
    """Write `README.md` into the checkpoint folder of `record`; `records` are all rows of its comparison.

    `example`: the script that runs it in the engine of `record`; without this, its place in a variant's folder.

    A card that a person edited stays as it is.

    Raises:
        CheckpointError: the note of the checkpoint's origin cannot be read.
    """
    if is_edited(folder / CARD_FILE):
        return
    variant, stored = record.variant, variants.stored_as(record.variant)
    kernel, engine = variants.chosen(variant, "sdpa_kernel"), str(variant.ran.get("engine"))
    left_out = ([f"the {kernel} kernel"] if kernel else []) + variants.switched_on(variant)
    origin, on_disk = load_origin(folder), _formats_on_disk(record)
    text = templates.get_template("card.md").render(
        metadata=_metadata(record, origin).to_yaml(),
        record=record,
        origin=origin,
        measured=bool(records),
        data=record.dataset and public_name(record.dataset.name),
        format=variants.describe_format(record),
        attention=variants.describe_run(record) or table.UNKNOWN,
        device=table.device_name(record.environment),
        table=table.markdown(table.comparison(records, None)),
        notes=table.notes(records),
        packages=sorted({facts.library for name, facts in FORMATS.items() if name in on_disk and facts.library}),
        engine=ENGINES.get(engine),
        example=example or f"{engine}/example.py",
        code=loading_code(record, "FOLDER"),
        stored=stored,
        expansion=variants.expansion(variant),
        # What the variant was measured with and the loading code does without; an engine's file holds all of it.
        left_out=listed(left_out if engine not in ENGINES else []),
    )
    storage.write_text(folder / CARD_FILE, sealed(_without_paths(text, [record, *records])))


def write_card_without_figures(folder: Path) -> None:
    """Write `README.md` into the folder of a checkpoint that nothing was measured of, as `write_card` does.

    Raises:
        CheckpointError: it is no checkpoint, or the note of its origin cannot be read.
    """
    checkpoint = open_checkpoint(str(folder))
    held = load_origin(folder).last(QUANTIZE) or {"format": "fp32", "layer_plan": {}}
    model = empty_model(checkpoint)
    as_held = {key: held[key] for key in ("format", "half", "skip", "layers") if key in held}
    record = Record(
        variant=Variant(name=folder.resolve().name, **as_held),
        layer_plan=held["layer_plan"],
        model=Model(
            source=folder.name,
            architecture=type(model).__name__,
            parameters=parameter_count(model),
            image_size=checkpoint.image_size,
            classes=checkpoint.config.num_labels,
        ),
    )
    write_card(record, folder, ())


def write_card_of_export(checkpoint: Checkpoint, package: Package, folder: Path) -> None:
    """Write `README.md` beside the files of an engine, of which nothing was measured, as `write_card` does."""
    held = load_origin(folder).last(QUANTIZE) or {"layer_plan": {}}
    model = empty_model(checkpoint)
    record = Record(
        variant=Variant(name=folder.resolve().name, format=package.format, ran={"engine": package.engine}),
        layer_plan=held["layer_plan"],
        model=Model(
            source=checkpoint.source,
            architecture=type(model).__name__,
            parameters=parameter_count(model),
            image_size=checkpoint.image_size,
            classes=checkpoint.config.num_labels,
        ),
    )
    write_card(record, folder, (), example="example.py")


def loading_code(record: Record, folder: str) -> str:
    """Python that loads the checkpoint with plain transformers and classifies one image."""
    attention = record.variant.ran.get("attention")
    options = f', model_kwargs={{"attn_implementation": "{attention}"}}' if attention else ""
    return (
        "from transformers import pipeline\n"
        f'classify = pipeline("{_TASK}", "{folder}"{options})\n'
        'print(classify("photo.jpg"))'
    )


def _formats_on_disk(record: Record) -> list[str]:
    stored = variants.stored_as(record.variant)
    return list(record.layer_plan) if stored is None else [stored, *record.variant.layers.values()]


def _metadata(record: Record, origin: Origin) -> ModelCardData:
    quantized = [name for name in _formats_on_disk(record) if name in QUANTIZED_FORMATS]
    trained, results = origin.last(FINETUNE), list(_results(record))
    relation = "finetune" if trained else "quantized" if quantized else None
    data = [step["dataset_hub_id"] for step in origin.steps if step.get("dataset_hub_id")]
    return ModelCardData(
        base_model=origin.base_model,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        library_name=_LIBRARIES.get(str(record.variant.ran.get("engine")), "transformers"),
        pipeline_tag=_TASK,
        datasets=data or None,
        metrics=["accuracy"] if record.accuracy else None,
        tags=[
            "vitopt",
            "vision-transformer",
            *(["lora"] if trained and trained["method"] == "lora" else []),
            *(["quantization", *quantized] if quantized else []),
        ],
        model_name=record.variant.name if results else None,
        eval_results=results or None,
        base_model_relation=relation if origin.base_model else None,
    )


def _results(record: Record) -> Iterator[EvalResult]:
    """What was measured on images, each figure with its 95 % interval; shares of one, as the hub's metrics are."""
    data = record.dataset
    if data is None:
        return

    def result(
        kind: str,
        name: str,
        value: float,
        limits: tuple[float | None, float | None] | None,
        unit: float = 1,
        **count: int,
    ) -> EvalResult:
        ends = [round(end / unit, 6) for end in limits or () if end is not None]
        known = len(ends) == 2
        return EvalResult(
            task_type=_TASK,
            dataset_type=hub_id(data.name) or "imagefolder",
            dataset_name=public_name(data.name),
            dataset_split=data.split,
            metric_type=kind,
            metric_name=f"{name} (95 %: {ends[0]:g} to {ends[1]:g})" if known else name,
            metric_value=round(value / unit, 6),
            metric_args=(count or {"images": data.images}) | ({"ci95": ends} if known else {}),
        )

    if (accuracy := record.accuracy) is not None:
        yield result("accuracy", "Top-1 accuracy", accuracy.top1_percent, accuracy.top1_ci95_percent, 100)
        if accuracy.top5_percent is not None:
            yield result("top_5_accuracy", "Top-5 accuracy", accuracy.top5_percent, None, 100)
    if (versus := record.versus_baseline) is not None:
        delta = f"Top-1 accuracy minus that of {versus.baseline}"
        yield result("accuracy_delta", delta, versus.top1_delta_points, versus.top1_delta_ci95_points, 100)
        agreement = f"Agreement with {versus.baseline}"
        yield result("agreement", agreement, versus.agreement_percent, versus.agreement_ci95_percent, 100)
        kl = f"Mean KL divergence from {versus.baseline}, nats"
        yield result("kl_divergence", kl, versus.mean_kl_divergence, versus.kl_ci95)
    for row in record.latency:
        on = f"latency in ms at batch {row.batch_size}, {table.device_name(record.environment)}"
        yield result("latency_p50_ms", f"Median {on}", row.p50_ms, row.p50_ci95_ms, calls=row.iterations)


def _without_paths(text: str, records: Sequence[Record]) -> str:
    """The text with the last name alone of each local path, as in a note about a file."""
    sources = [record.dataset.name for record in records if record.dataset]
    sources += [record.model.source for record in records if record.model]
    for source in filter(re.compile(r"\w/|/\w").search, sources):  # `.` is no word to look for
        text = text.replace(source, public_name(source))
    return _LOCAL_PATH.sub(r"\1", text)
