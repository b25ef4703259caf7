"""What transformers' classes can do, against what they do when asked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
)

from vitopt.environment import support
from vitopt.models.checkpoint import Checkpoint
from vitopt.models.classes import best_attention, model_class, why_not_attention, why_not_kernel, why_not_trained
from vitopt.models.families import FAMILIES, TIMM

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_is_what_transformers_opens_a_family_with(
    family: str, make_family: Callable[..., Checkpoint]
) -> None:
    config = make_family(family).config
    model = AutoModelForImageClassification.from_config(config)
    assert type(model) is model_class(config)
    assert model.config._attn_implementation == best_attention(config)
    assert (why_not_attention(config, "sdpa", CPU, torch.float32) is None) == (best_attention(config) == "sdpa")
    assert (why_not_attention(config, "eager", CPU, torch.float32) is None) == (family != TIMM)


def test_a_family_without_an_attention_says_so_before_the_device_does(
    make_family: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "why_not_attention", lambda *asked: "the device")
    monkeypatch.setattr(support, "why_not_kernel", lambda *asked: "the device")
    half = torch.bfloat16
    beit, vit = make_family("beit").config, make_family("vit").config
    assert "flash_attention_2 for BeitForImageClassification" in why_not_attention(
        beit, "flash_attention_2", CUDA, half
    )
    assert why_not_attention(vit, "flash_attention_2", CUDA, half) == "the device"
    assert "sdpa for Swinv2" in why_not_kernel(make_family("swinv2").config, "math", CUDA, half)
    assert why_not_kernel(vit, "math", CUDA, half) == "the device"


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, DeiTForImageClassification), ({"with_teacher": True}, DeiTForImageClassificationWithTeacher)],
)
def test_deit_with_a_teacher_alone_has_no_loss(
    options: dict[str, Any], expected: type, make_family: Callable[..., Checkpoint]
) -> None:
    config = make_family("deit", **options).config
    assert model_class(config) is expected
    reason = why_not_trained(config)
    if options:
        assert reason is not None and expected.__name__ in reason
    else:
        assert reason is None
