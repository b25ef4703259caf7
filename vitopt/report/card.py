"""The model card of one variant: what it is, what was measured, how to load it."""

from collections.abc import Sequence
from pathlib import Path

from vitopt import storage
from vitopt.records import Record
from vitopt.report.rendering import templates
from vitopt.report.table import describe_attention, describe_device, describe_format, markdown_table, notes

CARD_FILE = "README.md"
_PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int4": "torchao", "w8a8": "torchao", "fp8": "torchao"}


def write_card(record: Record, folder: Path, records: Sequence[Record]) -> None:
    """Write `README.md` into the checkpoint folder of `record`; `records` are all rows of its comparison."""
    text = templates.get_template("card.md").render(
        record=record,
        format=describe_format(record),
        attention=describe_attention(record),
        device=describe_device(record),
        table=markdown_table(records),
        notes=notes(records),
        packages=sorted({_PACKAGES[format] for format in record.layer_plan if format in _PACKAGES}),
        code=loading_code(record, "FOLDER"),
    )
    storage.write_text(folder / CARD_FILE, text)


def loading_code(record: Record, folder: str) -> str:
    """Python that loads the checkpoint with plain transformers and classifies one image."""
    attention = record.variant.attention_used
    return "\n".join(
        [
            "from transformers import pipeline",
            f'classify = pipeline("image-classification", "{folder}", '
            f'model_kwargs={{"attn_implementation": "{attention}"}})',
            'print(classify("photo.jpg"))',
        ]
    )
