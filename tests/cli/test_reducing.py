"""What `vitopt tokens` says of the schedules that it measured."""

from pathlib import Path
from typing import Any

import pytest
from commands import done

from vitopt.search import fewer_tokens
from vitopt.search.fewer_tokens import Confirmed, TokenSearch


def found(difference: float, interval: tuple[float, float] | None, schedule: str = "3") -> TokenSearch:
    both: dict[str, Any] = {"flops_share": 0.8, "kl": 0.05, "agreement_percent": 99.0, "kl_ci95": None}
    searched = Confirmed(kind="searched", schedule="4@1", **both)
    constant = Confirmed(
        kind="constant", schedule=schedule, kl_above_searched=difference, kl_above_searched_ci95=interval, **both
    )
    return TokenSearch.model_construct(chosen="4@1", confirmed=(searched, constant), confirming_images=40)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (found(0.02, (0.01, 0.03)), "0.0200 (0.0100 to 0.0300): searched is better"),
        (found(-0.02, (-0.03, -0.01)), "-0.0200 (-0.0300 to -0.0100): constant is better"),
        (found(0.02, (-0.00001, 0.04)), "0.0200 (0.0000 to 0.0400): neither is shown to be better"),
        (found(0.02, None), "0.0200: too few images to tell"),
        (found(0.0, None, "4@1"), "the searched schedule is the constant one"),
    ],
)
def test_whether_the_search_was_worth_it_is_told(
    result: TokenSearch, words: str, tiny_checkpoint: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewer_tokens, "find_schedule", lambda *_, **__: result)
    ended = done("tokens", tiny_checkpoint, "--data", shapes, "--target-flops", 0.8)
    assert words in " ".join(ended.stderr.split())
    assert ended.stdout == "--merge-tokens 4@1\n"
