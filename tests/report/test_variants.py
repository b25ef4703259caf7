"""How a variant is held and how it ran, in words."""

from collections import Counter
from types import SimpleNamespace

import pytest

from vitopt.records import Model, Routing
from vitopt.report.table import notes
from vitopt.report.variants import describe_format, describe_run, kept_layers

FLASH_2 = {"attention": "flash_attention_2"}
CUDNN = {"sdpa_kernel": "cudnn"}


@pytest.mark.parametrize(
    ("asked", "ran", "reasons", "text"),
    [
        ({}, {}, {}, "sdpa"),
        ({}, {"sdpa_kernel": "flash"}, {}, "sdpa flash"),
        (CUDNN, CUDNN, {}, "sdpa cudnn"),
        (CUDNN, {"sdpa_kernel": "math"}, {"sdpa_kernel": "no cuDNN"}, "sdpa math (not cudnn)"),
        (CUDNN, {}, {"sdpa_kernel": "no cuDNN"}, "sdpa (not cudnn)"),
        (CUDNN, {}, {}, "sdpa"),  # it ran, and the profile showed no name that is known
        (CUDNN, {"sdpa_kernel": "flash"}, {}, "sdpa flash (not cudnn)"),
        (FLASH_2, {"sdpa_kernel": "flash"}, {}, "sdpa flash (not flash_attention_2)"),
        (FLASH_2, FLASH_2, {}, "flash_attention_2"),
        ({}, {"fuse_qkv": True, "channels_last": False}, {}, "sdpa + fuse qkv"),
        ({"compile": True}, {"compile": False}, {"compile": "graph breaks"}, "sdpa"),
        ({}, {"compile": True, "autotune": True}, {}, "sdpa + compile + autotune"),
        ({"backend": "x"}, {"attention": None, "backend": "x", "turbo": True}, {}, "x + turbo"),
    ],
)
def test_how_a_variant_ran_is_told_for_any_option(make: SimpleNamespace, asked, ran, reasons, text):
    assert describe_run(make.record("a", **make.ran(asked, ran, **reasons))) == text


def test_of_what_did_not_run_nothing_is_told(make: SimpleNamespace):
    assert describe_run(make.record("a", ran={})) is None


def passed_first(architecture="ViT", side=224, **ran) -> Routing:
    first = Model(source="a", architecture=architecture, parameters=1, image_size=(side, side), classes=2)
    return Routing(
        first=first,
        first_format="bf16",
        first_ran=ran,
        proxy="margin",
        threshold=0.5,
        temperature=1.0,
        promise="about 10 % get the second pass",
    )


@pytest.mark.parametrize(
    ("routing", "text"),
    [
        (passed_first(side=112), "112 x 112 px"),
        (passed_first(merge_tokens="14", compile=False, sdpa_kernel=None), "merge tokens 14, compile off"),
        (passed_first("LeViT", 128), "LeViT, 128 x 128 px"),
        (passed_first(), "another checkpoint"),
    ],
)
def test_the_first_pass_is_told_by_what_differs_and_its_promise_is_a_note(make: SimpleNamespace, routing, text):
    second = Model(source="a", architecture="ViT", parameters=1, image_size=(224, 224), classes=2)
    record = make.record("a", **make.ran(ran={"compile": True})).model_copy(
        update={"routing": routing, "model": second}
    )
    assert describe_run(record) == f"sdpa + compile; first pass: {text}"
    assert f"a: {routing.promise}" in notes([record])


@pytest.mark.parametrize(
    ("format", "fields", "text"),
    [
        ("nf4", {}, "nf4"),
        ("nf4", {"skip": ("block.0", "block.1"), "layers": {}}, "nf4, block.0 block.1 in 16 bit"),
        ("bf16", {"stored_format": "nf4"}, "bf16 (stored as nf4)"),
        ("bf16", {"stored_format": "bf16"}, "bf16"),
        ("w8a8", {"stored_format": "nf4", "skip": ("block.0",)}, "w8a8 (stored as nf4, block.0 in 16 bit)"),
    ],
)
def test_format_says_what_is_on_disk(make: SimpleNamespace, format, fields, text):
    assert describe_format(make.record("a", format, **fields)) == text


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        ({"block.0.query": "nf4", "block.0.fc1": "nf4", "classifier": "bf16"}, {"bf16": ["classifier"]}),
        (
            {"block.0.query": "bf16", "block.0.fc1": "bf16", "block.1.query": "nf4", "block.1.fc1": "bf16"},
            {"bf16": ["block.0", "block.1.fc1"]},
        ),
        ({"block.0.query": "w8a8", "block.1.query": "w8a8", "block.2.query": "int4"}, {"int4": ["block.2"]}),
        ({"block.0.query": "bf16", "classifier": "bf16"}, {}),
    ],
)
def test_layers_in_another_format_than_most_are_named_and_blocks_as_a_whole(make: SimpleNamespace, formats, expected):
    plan = dict(Counter(formats.values()))
    record = make.record("a", "nf4").model_copy(update={"layers": formats, "layer_plan": plan})
    assert kept_layers(record) == expected
