"""A rotation of all tokens: the same function, for each family that allows it, and weights without outliers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from vitopt.data.pixels import random_pixels
from vitopt.errors import CheckpointError, UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model, open_checkpoint
from vitopt.models.families import FAMILIES
from vitopt.models.names import linear_layers
from vitopt.models.origin import load_origin
from vitopt.optimize.quantize import quantize
from vitopt.optimize.rotate import rotate, turn
from vitopt.recipe import VariantSpec
from vitopt.steps import RotateSpec

REFUSED = {
    "clip": "2 stand outside",
    "siglip": "2 stand outside",
    "swin": "stand outside",
    "swinv2": "behind attention",
}


def _varied(model: torch.nn.Module) -> None:
    """Norms, factors and offsets that a fresh model does not have."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.rand(parameter.shape, generator=generator)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in REFUSED])
def test_the_function_stays_and_all_columns_are_mixed(
    model_type: str, make_family: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_family(model_type)).double()
    _varied(model)
    pixels = random_pixels(4, (32, 32)).double()
    monkeypatch.setattr("vitopt.models.forward.input_dtype", lambda model: torch.float64)
    with torch.inference_mode():
        weights = {name: one.clone() for name, one in model.state_dict().items()}
        before = model(pixels).logits
        made = turn(model, model_type, 0)
        torch.testing.assert_close(model(pixels).logits, before, rtol=1e-6, atol=1e-6)
    for layer in linear_layers(model, model_type):
        assert not torch.allclose(model.get_submodule(layer.module).weight, weights[f"{layer.module}.weight"])
    assert made.channels == model.get_submodule(linear_layers(model, model_type)[0].module).in_features


@pytest.mark.parametrize(("model_type", "why"), REFUSED.items())
def test_families_whose_tokens_pass_through_more_are_refused(
    model_type: str, why: str, make_family: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=f"cannot be rotated.*{why}"):
        rotate(make_family(model_type), RotateSpec(), tmp_path / "rotated", "cpu")
    assert not (tmp_path / "rotated").exists()


def test_an_outlier_among_columns_is_spread_over_all(tiny_checkpoint: Path) -> None:
    model = load_model(open_checkpoint(str(tiny_checkpoint)))
    model.vit.layers[0].layernorm_before.weight.data[3] = 30

    def outlier() -> float:
        block = model.vit.layers[0]
        sizes = (block.attention.q_proj.weight * block.layernorm_before.weight).detach().norm(dim=0)
        return float(sizes.max() / sizes.median())

    before = outlier()
    turn(model, "vit", 0)
    assert outlier() < before / 5


def test_plain_transformers_gives_the_same_answers_and_the_seed_counts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    opened, pixels = open_checkpoint(str(tiny_checkpoint)), random_pixels(4, (32, 32))
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        made = rotate(opened, RotateSpec(), tmp_path / name, "cpu", seed=seed)
    assert made.summary() == f"rotated {opened.config.hidden_size} channels"
    assert load_origin(tmp_path / "a").steps[-1]["step"] == "rotate"
    models = {
        name: AutoModelForImageClassification.from_pretrained(path).eval()
        for name, path in (("before", tiny_checkpoint), *((name, tmp_path / name) for name in ("a", "again", "b")))
    }
    with torch.inference_mode():
        for name in ("a", "b"):
            torch.testing.assert_close(
                models[name](pixels).logits, models["before"](pixels).logits, rtol=1e-4, atol=1e-4
            )
    heads = {name: model.classifier.weight for name, model in models.items()}
    assert torch.equal(heads["a"], heads["again"]) and not torch.allclose(heads["a"], heads["b"])


def test_a_quantized_checkpoint_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="n", format="nf4"), tmp_path / "nf4", "cpu")
    with pytest.raises(CheckpointError, match="quantized already"):
        rotate(open_checkpoint(str(tmp_path / "nf4")), RotateSpec(), tmp_path / "rotated", "cpu")


def test_a_rotation_that_changes_answers_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of a family in which another layer than fc1 stood behind the second norm.
    monkeypatch.setattr("vitopt.optimize.rotate._TAKES", ({"query", "key", "value"}, set()))
    with pytest.raises(UnsupportedError, match="answers would change"):
        rotate(open_checkpoint(str(tiny_checkpoint)), RotateSpec(), tmp_path / "rotated", "cpu")
    assert not (tmp_path / "rotated").exists()
