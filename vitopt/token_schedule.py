"""How many tokens leave in which block, as text that a recipe, an option and a record can hold. Imports no torch.

`8`: in every block but the last, after which nothing could be saved. `16..0`: the same, from 16 in the first of them to
0 in the last, evenly. `48@4_24@8`: 48 in block 4, 24 in block 8; blocks count from 0.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from vitopt.errors import RecipeError

_FORM = re.compile(r"\d{1,6}(\.\.\d{1,6})?|\d{1,6}@\d{1,4}(_\d{1,6}@\d{1,4})*")


def schedule_text(value: Any) -> Any:
    """A schedule as text, from that text, a number, or a mapping from blocks to numbers.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, Mapping):
        value = "_".join(f"{removed}@{block}" for block, removed in value.items())
    text = str(value) if isinstance(value, int | str) else ""
    if not _FORM.fullmatch(text):
        raise ValueError(f"{value!r} is no schedule: give 8 (in every block), 16..0 (falling) or 48@4_24@8 (in blocks)")
    steps = _steps(text)
    if len({block for _, block in steps}) < len(steps):
        raise ValueError(f"{text} names a block twice")
    if any(removed == 0 for removed, _ in steps) or set(text) <= set("0."):
        raise ValueError(f"{text} removes nothing: leave it out")
    return text


Schedule = Annotated[str, BeforeValidator(schedule_text)]


def removed_in(schedule: str, blocks: int) -> tuple[int, ...]:
    """How many tokens leave in each of so many blocks.

    Raises:
        RecipeError: it names a block that is not there, or the last.
    """
    if steps := _steps(schedule):
        by_block = {block: removed for removed, block in steps}
        if (latest := max(by_block)) > blocks - 2:
            why = "is the last, after which nothing is left to save" if latest == blocks - 1 else "is not there"
            raise RecipeError(f"{schedule}: block {latest} {why}; the model has block 0 to {blocks - 1}")
        return tuple(by_block.get(block, 0) for block in range(blocks))
    first, _, last = schedule.partition("..")
    start, end, span = int(first), int(last or first), max(blocks - 2, 1)
    return (*(round(start + (end - start) * block / span) for block in range(blocks - 1)), 0)


def written(removed: Sequence[int]) -> str:
    """A schedule by its blocks, from the tokens that leave each."""
    return "_".join(f"{gone}@{block}" for block, gone in enumerate(removed) if gone)


def _steps(schedule: str) -> list[tuple[int, int]]:
    """(tokens, block) of each that is named."""
    if "@" not in schedule:
        return []
    return [(int(removed), int(block)) for removed, block in (step.split("@") for step in schedule.split("_"))]
