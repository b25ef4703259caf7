"""Pruned models: ordinary ones of fewer blocks and narrower layers, whose rest is fitted to what was there."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional
from transformers import AutoModelForImageClassification

from vitopt.data.images import ImageSet, open_images
from vitopt.data.pixels import Preprocessor
from vitopt.errors import CheckpointError, DataError, MeasurementError, RecipeError
from vitopt.models.calibration import load_uses
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint
from vitopt.models.families import FAMILIES
from vitopt.models.origin import load_origin
from vitopt.optimize.prune import prune, pruned_config, without_units
from vitopt.optimize.quantize import quantize
from vitopt.recipe import DataSpec, VariantSpec
from vitopt.steps import PruneSpec

# Two blocks of 128 units or more, of which 64 are kept.
DESCRIBED = ["vit", "deit", "vit_msn", "ijepa", "beit", "clip"]


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "train")


def pixels_of(checkpoint: Checkpoint, images: ImageSet) -> torch.Tensor:
    preprocess = Preprocessor(load_processor(checkpoint))
    return torch.stack([preprocess(images.image(index)) for index in range(len(images))])


def plain_logits(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)(pixels).logits


def kl(reference: torch.Tensor, found: torch.Tensor) -> float:
    p, q = (values.double().softmax(-1) for values in (reference, found))
    return float((p * (p.log() - q.log())).sum(-1).mean())


def test_the_units_that_go_are_those_whose_loss_costs_least_and_the_rest_is_fitted() -> None:
    """Against all pairs of units, each with a least-squares fit on the rows themselves, in numpy."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
    inputs = np.hstack([mixed, np.ones((500, 1))])
    weight = rng.normal(size=(4, 7))
    outputs = inputs @ weight.T

    def error(kept: tuple[int, ...]) -> float:
        some = inputs[:, [*kept, 6]]
        return float(((some @ np.linalg.lstsq(some, outputs, rcond=None)[0] - outputs) ** 2).mean())

    moments = torch.from_numpy(inputs.T @ inputs / 500)
    kept, fitted = without_units(torch.from_numpy(weight), moments, 5)
    assert tuple(kept.tolist()) == min(itertools.combinations(range(6), 5), key=error)
    found = ((inputs[:, [*kept.tolist(), 6]] @ fitted.numpy().T - outputs) ** 2).mean()
    assert found == pytest.approx(error(tuple(kept.tolist())), rel=1e-2)  # the damping makes it a little larger
    kept, fitted = without_units(torch.from_numpy(weight), moments, 3)
    found = ((inputs[:, [*kept.tolist(), 6]] @ fitted.numpy().T - outputs) ** 2).mean()
    assert found == pytest.approx(error(tuple(kept.tolist())), rel=1e-2)
    assert fitted.shape == (4, 4) and kept.tolist() == sorted(kept.tolist())


def test_units_that_others_make_up_for_cost_nothing(
    tiny: Checkpoint, images: ImageSet, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Every unit of the first half stands twice, so that half of them can go without a change of any answer."""
    assert tiny.folder is not None
    folder = copy_of(tiny.folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.vit.layers:
            for parameter in (layer.mlp.fc1.weight, layer.mlp.fc1.bias):
                parameter[64:] = parameter[:64]
    model.save_pretrained(folder)
    outcome = prune(open_checkpoint(str(folder)), PruneSpec(mlp=0.5), tmp_path / "out", "cpu", images=images)
    assert outcome.units == (128, 64) and outcome.kl < 1e-3
    pixels = pixels_of(tiny, images)
    before, after = plain_logits(folder, pixels), plain_logits(tmp_path / "out", pixels)
    torch.testing.assert_close(after, before, rtol=0, atol=0.02)


def test_a_block_that_does_nothing_goes_first(
    tiny: Checkpoint, images: ImageSet, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    assert tiny.folder is not None
    folder = copy_of(tiny.folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for last in (model.vit.layers[1].attention.o_proj, model.vit.layers[1].mlp.fc2):
            last.weight.zero_(), last.bias.zero_()
    model.save_pretrained(folder)
    outcome = prune(open_checkpoint(str(folder)), PruneSpec(depth=1), tmp_path / "out", "cpu", images=images)
    assert outcome.removed == (1,) and "block.1" in outcome.summary()
    pixels = pixels_of(tiny, images)
    torch.testing.assert_close(plain_logits(tmp_path / "out", pixels), plain_logits(folder, pixels))


def test_what_is_told_is_what_the_written_checkpoint_does(tiny: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    outcome = prune(tiny, PruneSpec(depth=1, mlp=0.5), tmp_path / "out", "cpu", images=images)
    written = open_checkpoint(str(tmp_path / "out"))
    assert (written.config.num_hidden_layers, written.config.intermediate_size) == (2, 64)
    pixels = pixels_of(tiny, images)
    assert tiny.folder is not None
    assert outcome.kl == pytest.approx(
        kl(plain_logits(tiny.folder, pixels), plain_logits(tmp_path / "out", pixels)), rel=1e-3
    )
    model = load_model(written)
    assert outcome.parameters[1] == sum(parameter.numel() for parameter in model.parameters())
    assert model.vit.layers[0].mlp.fc1.out_features == 64
    noted = load_origin(tmp_path / "out").last("prune")
    assert noted is not None and noted["removed_blocks"] == list(outcome.removed) and noted["units"] == 64
    (use,) = load_uses(tmp_path / "out")
    assert (use.purpose, set(use.image_sha256)) == ("pruning", set(images.image_hashes))
    quantize(written, VariantSpec(name="v", format="nf4"), tmp_path / "nf4", "cpu")


@pytest.mark.parametrize("model_type", [name for name, of in FAMILIES.items() if of.shape in ("plain", "vision")])
def test_every_plain_family_opens_in_plain_transformers(
    model_type: str, make_family: Callable[..., Checkpoint], images: ImageSet, tmp_path: Path
) -> None:
    checkpoint = make_family(model_type)
    spec = PruneSpec(depth=1, mlp=0.5 if model_type in DESCRIBED else 0)
    outcome = prune(checkpoint, spec, tmp_path / "out", "cpu", images=images)
    assert checkpoint.folder is not None
    pixels = pixels_of(checkpoint, images)
    before, after = plain_logits(checkpoint.folder, pixels), plain_logits(tmp_path / "out", pixels)
    assert outcome.kl == pytest.approx(kl(before, after), rel=1e-2, abs=1e-4)
    assert outcome.parameters[1] < outcome.parameters[0]


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in DESCRIBED])
def test_a_width_that_no_configuration_describes_is_refused(
    model_type: str, make_family: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(RecipeError, match=model_type):
        pruned_config(make_family(model_type).config, PruneSpec(mlp=0.5))


@pytest.mark.parametrize(
    ("keys", "named"), [({"depth": 3}, "3 blocks"), ({"mlp": 0.1}, "128 units"), ({"mlp": 0.99}, None)]
)
def test_what_leaves_too_little_or_everything_is_refused(
    keys: dict[str, Any], named: str | None, tiny: Checkpoint
) -> None:
    if named is None:
        assert pruned_config(tiny.config, PruneSpec(**keys)).intermediate_size == 64
        return
    with pytest.raises(RecipeError, match=named):
        pruned_config(tiny.config, PruneSpec(**keys))


def test_nothing_to_remove_nothing_to_see_and_packed_weights_are_refused(
    tiny: Checkpoint, images: ImageSet, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="nothing is removed"):
        PruneSpec()
    with pytest.raises(DataError, match="calibration images"):
        prune(tiny, PruneSpec(depth=1), tmp_path / "out", "cpu")
    quantize(tiny, VariantSpec(name="v", format="nf4"), tmp_path / "nf4", "cpu")
    with pytest.raises(CheckpointError, match="quantized already"):
        prune(open_checkpoint(str(tmp_path / "nf4")), PruneSpec(depth=1), tmp_path / "out", "cpu", images=images)


def test_inputs_that_are_no_numbers_are_refused(
    tiny: Checkpoint, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "gelu", lambda inputs, **_: inputs * torch.inf)
    monkeypatch.setattr("transformers.activations.GELUActivation.forward", lambda self, inputs: inputs * torch.inf)
    with pytest.raises(MeasurementError, match="not all finite"):
        prune(tiny, PruneSpec(mlp=0.5), tmp_path / "out", "cpu", images=images)
    assert not (tmp_path / "out").exists()
