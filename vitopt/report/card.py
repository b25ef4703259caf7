"""The model card of one variant: what it is, what was measured, how to load it."""

from collections.abc import Sequence
from pathlib import Path

from vitopt import storage
from vitopt.formats import FORMATS
from vitopt.records import Record
from vitopt.report import table
from vitopt.report.rendering import templates
from vitopt.report.summary import listed

CARD_FILE = "README.md"


def write_card(record: Record, folder: Path, records: Sequence[Record]) -> None:
    """Write `README.md` into the checkpoint folder of `record`; `records` are all rows of its comparison."""
    variant, stored = record.variant, table.stored_as(record.variant)
    on_disk = list(record.layer_plan) if stored is None else [stored, *variant.layers.values()]
    kernel = table.chosen(variant, "sdpa_kernel")
    text = templates.get_template("card.md").render(
        record=record,
        format=table.describe_format(record),
        attention=table.describe_run(record),
        device=table.device_name(record.environment),
        table=table.markdown(table.comparison(records, None)),
        notes=table.notes(records),
        packages=sorted({facts.library for name, facts in FORMATS.items() if name in on_disk and facts.library}),
        code=loading_code(record, "FOLDER"),
        stored=stored,
        expansion=table.expansion(variant),
        # What the variant was measured with and the loading code does without.
        left_out=listed(([f"the {kernel} kernel"] if kernel else []) + table.switched_on(variant)),
    )
    storage.write_text(folder / CARD_FILE, text)


def loading_code(record: Record, folder: str) -> str:
    """Python that loads the checkpoint with plain transformers and classifies one image."""
    options = f'model_kwargs={{"attn_implementation": "{record.variant.ran.get("attention")}"}}'
    return (
        "from transformers import pipeline\n"
        f'classify = pipeline("image-classification", "{folder}", {options})\n'
        'print(classify("photo.jpg"))'
    )
