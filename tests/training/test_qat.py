"""Quantization-aware training: what it computes with is what the quantized checkpoint holds, to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from vitopt.data.images import ImageSet
from vitopt.data.pixels import random_pixels
from vitopt.errors import PatternError, UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.models.names import linear_layers
from vitopt.models.origin import load_origin
from vitopt.optimize.quantize import quantize
from vitopt.recipe import FinetuneSpec, Recipe, VariantSpec
from vitopt.training import finetune as training
from vitopt.training.finetune import finetune
from vitopt.training.qat import ROUNDINGS, RoundedLinear, round_int4, train_rounded

FORMATS = [pytest.param({"format": "nf4"}, id="nf4"), pytest.param({"format": "w8a8"}, id="w8a8")]


def dequantized(linear: Any) -> torch.Tensor:
    """The weight of a layer as its own library gives it back."""
    if type(linear).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return linear.weight.data.dequantize(output_dtype=torch.float32)


@pytest.mark.parametrize("keys", FORMATS)
def test_the_quantized_checkpoint_holds_and_answers_what_the_training_computed(
    keys: dict[str, Any], tiny: Checkpoint, train: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    evaluate = training.top1_percent

    def kept(trainer: Any, data: Any) -> float:
        trained.append(trainer.model.eval())
        return evaluate(trainer, data)

    monkeypatch.setattr(training, "top1_percent", kept)
    spec = FinetuneSpec(method="qat", epochs=1, batch_size=8, learning_rate=1e-3, precision="fp32", **keys)
    finetune(tiny, spec, tmp_path / "out", "cpu", images=train, test=train)
    quantize(open_checkpoint(str(tmp_path / "out")), VariantSpec(name="v", **keys), tmp_path / "q", "cpu")
    packed, (model,) = load_model(open_checkpoint(str(tmp_path / "q"))), trained
    layers = [layer for layer in linear_layers(model, "vit") if not layer.is_head]
    for layer in layers:
        last = model.get_submodule(layer.module)
        assert isinstance(last, RoundedLinear)
        held = dequantized(packed.get_submodule(layer.module))
        assert torch.equal(held.float(), ROUNDINGS[keys["format"]][0](last.weight.detach()).float())
    pixels = random_pixels(8, (32, 32)).bfloat16()
    with torch.inference_mode():
        answers, last_answers = packed(pixels).logits, model.bfloat16()(pixels).logits
        plain = load_model(tiny, dtype=torch.bfloat16)(pixels).logits
    torch.testing.assert_close(answers, last_answers, rtol=0.02, atol=0.04)
    assert (answers - plain).abs().max() > 0.5  # so far the training went
    noted = load_origin(tmp_path / "out").last("finetune")
    assert noted is not None and (noted["method"], noted["format"]) == ("qat", keys["format"])


def test_int4_rounds_to_sixteen_values_of_a_group() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    rounded = round_int4(weight).float()
    for group in range(2):
        part, exact = (values[:, 64 * group :][:, :64] for values in (rounded, weight))
        assert all(len(row.unique()) <= 16 for row in part)
        step = (exact.amax(1) - exact.amin(1)) / 15
        assert ((part - exact).abs().amax(1) <= 0.5 * step + 0.02).all()  # bf16 keeps 8 bits of scale and zero point


@pytest.mark.parametrize("format", ROUNDINGS)
def test_gradients_pass_the_rounding(format: str) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 32)
    rounded = RoundedLinear(plain, format)
    inputs = torch.randn(4, 64, requires_grad=True)
    of_weight, of_inputs = ROUNDINGS[format]
    out = rounded(inputs)
    seen = inputs if of_inputs is None else of_inputs(inputs.detach())
    torch.testing.assert_close(out, seen @ of_weight(plain.weight.detach()).float().T + plain.bias)
    out.sum().backward()
    torch.testing.assert_close(plain.weight.grad, seen.sum(0).expand(32, 64).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs.grad, of_weight(plain.weight.detach()).float().sum(0).expand(4, 64))


def test_only_targets_are_rounded(tiny: Checkpoint) -> None:
    model = load_model(tiny)
    train_rounded(model, FinetuneSpec(method="qat", format="nf4", targets=("block.1.query", "fc2")))
    assert [name for name, module in model.named_modules() if isinstance(module, RoundedLinear)] == [
        "vit.layers.0.mlp.fc2",
        "vit.layers.1.attention.q_proj",
        "vit.layers.1.mlp.fc2",
        "vit.layers.2.mlp.fc2",
    ]
    with pytest.raises(PatternError, match="'dense'"):
        train_rounded(model, FinetuneSpec(method="qat", format="nf4", targets=("dense",)))
    with pytest.raises(UnsupportedError, match="nf4"):
        train_rounded(load_model(tiny), FinetuneSpec(method="qat", format="nf4", targets=("classifier",)))


def test_a_resumed_training_is_rounded_too(
    tiny: Checkpoint, train: ImageSet, resumes: Callable[[Checkpoint, FinetuneSpec, ImageSet], None]
) -> None:
    spec = FinetuneSpec(method="qat", format="nf4", epochs=2, batch_size=16, precision="fp32")
    resumes(tiny, spec, train)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"method": "qat"}, "needs a `format`"),
        ({"method": "qat", "format": "int8"}, "cannot train for int8"),
        ({"method": "qat", "format": "nf4", "rank": 4}, "`rank`"),
        ({"method": "full", "format": "nf4"}, "`format`"),
        ({"format": "w8a8"}, "nf4 alone, not in w8a8"),
        ({"format": "nf4", "dropout": 0.2}, "`dropout`"),
    ],
)
def test_keys_that_the_method_has_no_use_for_are_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        FinetuneSpec.model_validate(keys)


def test_a_variant_is_held_in_the_format_that_its_step_trains_for() -> None:
    def recipe(format: str, **keys: Any) -> Recipe:
        steps = [{"finetune": {"method": "qat", "format": "nf4"}}]
        variant = {"name": "a", "format": format, "steps": steps} | keys
        return Recipe.model_validate({"name": "r", "model": "m", "data": "d", "variants": [variant]})

    assert recipe("nf4") and recipe("bf16")
    with pytest.raises(ValidationError, match="trains for nf4, and `format` is w8a8"):
        recipe("w8a8")
    with pytest.raises(ValidationError, match="leave `rounding` out"):
        recipe("nf4", rounding="gptq")
