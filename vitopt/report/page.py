"""The report of a run: `report.md` and one self-contained `report.html`."""

from pathlib import Path

from vitopt import storage
from vitopt.errors import RecordError
from vitopt.recipe import load_recipe
from vitopt.records import RECORD_FILE, Record, load_record
from vitopt.report.card import templates
from vitopt.report.table import HEADINGS, batch_sizes, markdown_table, notes, row


def load_run(folder: Path) -> list[Record]:
    """Records of all variants of a run, in the order of its recipe.

    Raises:
        RecordError: the folder holds no records.
    """
    found = sorted(folder.glob(f"variants/*/{RECORD_FILE}"))
    if not found:
        raise RecordError(f"{folder} holds no records (variants/*/{RECORD_FILE}): give the folder of a `vitopt run`")
    records = {path.parent.name: load_record(path) for path in found}
    recipe = folder / "recipe.yaml"
    order = [variant.name for variant in load_recipe(recipe).variants] if recipe.is_file() else []
    return [records[name] for name in sorted(records, key=lambda n: order.index(n) if n in order else len(order))]


def write_report(folder: Path) -> Path:
    """Write `report.md` and `report.html` into the folder of a run and return the path of the page."""
    records = load_run(folder)
    sizes = batch_sizes(records)
    parts = [f"# {folder.name}"]
    for size in sizes or (None,):
        parts += [f"## Batch size {size}" if size else "## Comparison", markdown_table(records, size)]
    parts += ["\n".join(f"- {line}" for line in notes(records))]
    storage.write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    path = folder / "report.html"
    tables = [(size, [row(record, size) for record in records]) for size in sizes]
    storage.write_text(
        path,
        templates.get_template("report.html").render(
            title=folder.name, headings=HEADINGS, tables=tables, notes=notes(records)
        ),
    )
    return path
