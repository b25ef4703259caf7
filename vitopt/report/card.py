"""The model card of one variant: what it is, what was measured, how to load it."""

from collections.abc import Sequence
from pathlib import Path

from vitopt import storage
from vitopt.formats import FORMATS
from vitopt.records import Record, Variant
from vitopt.report.rendering import templates
from vitopt.report.summary import listed
from vitopt.report.table import (
    chosen,
    describe_device,
    describe_format,
    describe_run,
    expansion,
    markdown_table,
    notes,
    stored_as,
    switched_on,
)

CARD_FILE = "README.md"


def write_card(record: Record, folder: Path, records: Sequence[Record]) -> None:
    """Write `README.md` into the checkpoint folder of `record`; `records` are all rows of its comparison."""
    on_disk = _formats_on_disk(record)
    text = templates.get_template("card.md").render(
        record=record,
        format=describe_format(record),
        attention=describe_run(record),
        device=describe_device(record),
        table=markdown_table(records),
        notes=notes(records),
        packages=sorted({facts.library for name, facts in FORMATS.items() if name in on_disk and facts.library}),
        code=loading_code(record, "FOLDER"),
        stored=stored_as(record.variant),
        expansion=expansion(record.variant),
        left_out=listed(_left_out(record.variant)),
    )
    storage.write_text(folder / CARD_FILE, text)


def _formats_on_disk(record: Record) -> list[str]:
    stored = stored_as(record.variant)
    return list(record.layer_plan) if stored is None else [stored, *record.variant.layers.values()]


def _left_out(variant: Variant) -> list[str]:
    """What the variant was measured with and the loading code does without."""
    kernel = chosen(variant, "sdpa_kernel")
    return ([f"the {kernel} kernel"] if kernel else []) + switched_on(variant)


def loading_code(record: Record, folder: str) -> str:
    """Python that loads the checkpoint with plain transformers and classifies one image."""
    attention = record.variant.ran.get("attention")
    return "\n".join(
        [
            "from transformers import pipeline",
            f'classify = pipeline("image-classification", "{folder}", '
            f'model_kwargs={{"attn_implementation": "{attention}"}})',
            'print(classify("photo.jpg"))',
        ]
    )
