"""README's table of families, made from the one that vitopt reads.

python scripts/families_table.py           writes it between the markers in README.md
python scripts/families_table.py --check   exits with 1 if README.md says anything else
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vitopt.models.families import FAMILIES

BEGIN, END = "<!-- families: scripts/families_table.py -->", "<!-- end of families -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where README is not up to date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = replaced(before)
    if arguments.check and after != before:
        sys.exit("README.md lists other families: run python scripts/families_table.py")
    if not arguments.check:
        readme.write_text(after, encoding="utf-8")


def replaced(readme: str) -> str:
    """README with the table between the markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        sys.exit(f"README.md lacks the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"


def table() -> str:
    """One row for each family."""
    rows = [
        f"| {family.title} | `{model_type}` | {', '.join(f'`{name}`' for name in family.classes)} | {family.note} |"
        for model_type, family in FAMILIES.items()
    ]
    return "\n".join(["| family | `model_type` | random models | what is different |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    main()
