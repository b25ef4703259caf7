"""How many tokens leave in which block, from what a recipe says."""

import pytest

from vitopt.errors import RecipeError
from vitopt.recipe import RunSpec
from vitopt.recipe_file import validate
from vitopt.token_schedule import removed_in


@pytest.mark.parametrize(
    ("said", "text", "removed"),
    [
        (8, "8", (8, 8, 8, 8, 0)),
        ("8", "8", (8, 8, 8, 8, 0)),
        ("16..4", "16..4", (16, 12, 8, 4, 0)),
        ("0..9", "0..9", (0, 3, 6, 9, 0)),
        ("48@0_24@3", "48@0_24@3", (48, 0, 0, 24, 0)),
        ({0: 48, 3: 24}, "48@0_24@3", (48, 0, 0, 24, 0)),
        ({"2": 5}, "5@2", (0, 0, 5, 0, 0)),
    ],
)
def test_a_schedule_says_how_many_tokens_leave_each_block(said: object, text: str, removed: tuple[int, ...]) -> None:
    run = validate(RunSpec, {"merge_tokens": said}, where="r")
    assert run.merge_tokens == run.schedule == text
    assert removed_in(text, blocks=5) == removed
    assert RunSpec.model_validate_json(run.model_dump_json()) == run


@pytest.mark.parametrize(
    "said", ["", "eight", "-8", 0, "0", "0..0", True, 1.5, "8@", "0@3", "8@1_8@1", "8@1,8@2", {1: 0}, {}, "9999999"]
)
def test_what_is_no_schedule_is_refused(said: object) -> None:
    with pytest.raises(RecipeError, match="merge_tokens"):
        validate(RunSpec, {"merge_tokens": said}, where="r")


@pytest.mark.parametrize(("block", "word"), [(4, "last"), (5, "not there"), (40, "not there")])
def test_a_block_where_nothing_can_leave_is_named(block: int, word: str) -> None:
    with pytest.raises(RecipeError, match=rf"block {block} .*{word}"):
        removed_in(f"8@1_8@{block}", blocks=5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"merge_tokens": 8, "prune_tokens": 8}, "one of them"),
        ({"size_bias": False}, "size_bias"),
        ({"prune_tokens": 8, "size_bias": False}, "size_bias"),
        ({"merge_tokens": 8, "fuse_pruned": True}, "fuse_pruned"),
        ({"prune_tokens": 8, "attention": "eager"}, "eager"),
        ({"merge_tokens": 8, "fused_kernels": True, "compile": True}, "fused_kernels"),
        ({"merge_tokens": 8, "attention": "flash_attention_2"}, "size_bias: false"),
        ({"merge_tokens": 8, "sdpa_kernel": "flash"}, "size_bias: false"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        validate(RunSpec, options, where="r")


def test_flash_kernels_take_what_needs_no_mask() -> None:
    for options in ({"merge_tokens": 8, "size_bias": False}, {"prune_tokens": 8}):
        assert validate(RunSpec, {"attention": "flash_attention_2", **options}, where="r").schedule == "8"
