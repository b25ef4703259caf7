"""Sensitivity on tiny models: the same as the naive loop, and a fragile block is found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_checkpoint

from vitopt.data.images import ImageSet, open_images
from vitopt.data.labels import fit_labels
from vitopt.data.pixels import Preprocessor, batches
from vitopt.errors import CheckpointError, DataError, RecipeError, UnsupportedError
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint
from vitopt.models.names import block_names, linear_layers
from vitopt.optimize.formats import quantization_config
from vitopt.optimize.quantize import plan_for, quantize
from vitopt.recipe import AutoSkipSpec, DataSpec, VariantSpec
from vitopt.search import analysis
from vitopt.search.analysis import analyse, analyse_for, require_disjoint
from vitopt.search.hybrid import Boundary, Hybrid
from vitopt.search.results import load_sensitivity
from vitopt.search.sensitivity import Calibration, table_logits, units
from vitopt.search.skiplist import Goal

BLOCKS = 4
FRAGILE = 2


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A ViT whose block 2 holds outliers that 4 bits cannot: they multiply a feature that is always zero.

    In floating point they change nothing. In NF4 they set the scale of their group of 64 weights, whose other
    weights become zero.
    """
    folder = make_checkpoint(tmp_path_factory.mktemp("fragile") / "fragile", blocks=BLOCKS, seed=3)
    model = load_model(open_checkpoint(str(folder)))
    block = model.vit.layers[FRAGILE]
    attention = block.attention
    with torch.no_grad():
        for norm in (block.layernorm_before, block.layernorm_after):
            norm.weight[0] = norm.bias[0] = 0
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, block.mlp.fc1):
            linear.weight[:, 0] = 100
    model.save_pretrained(folder)
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "train")


def pixels_of(images: ImageSet, checkpoint: Checkpoint, batch_size: int) -> tuple[torch.Tensor, ...]:
    preprocess = Preprocessor(load_processor(checkpoint))
    return tuple(batch.pixel_values for batch in batches(images, preprocess, batch_size))


def calibration_of(images: ImageSet, checkpoint: Checkpoint, batch_size: int = 8) -> Calibration:
    fitted = fit_labels(images, checkpoint.label_names)
    return Calibration(
        images.ids, images.image_hashes, np.array(fitted.labels), pixels_of(images, checkpoint, batch_size)
    )


def hybrid_of(checkpoint: Checkpoint, format: str) -> Hybrid:
    config = quantization_config(plan_for(checkpoint, VariantSpec(name="x", format=format)), torch.bfloat16)
    exact = load_model(checkpoint, dtype=torch.bfloat16)
    packed = load_model(checkpoint, dtype=torch.bfloat16, quantization=config)
    return Hybrid(exact, packed, block_names(exact, checkpoint.config.model_type))


@pytest.mark.parametrize("format", ["nf4", "w8a8"])
@pytest.mark.parametrize("granularity", ["block", "linear"])
def test_both_tables_equal_the_naive_loop_to_the_bit(
    fragile: Checkpoint, images: ImageSet, format: str, granularity: str
) -> None:
    forward = hybrid_of(fragile, format)
    calibration = calibration_of(images, fragile)
    chosen = units(linear_layers(forward.base, "vit"), granularity)
    for hybrid in (forward, Hybrid(forward.donor, forward.base, forward.blocks)):
        found: dict[str, list[torch.Tensor]] = {}
        table_logits(hybrid, calibration, chosen, done=found.__setitem__)
        assert list(found) == [unit.name for unit in chosen]
        for unit in chosen:
            with hybrid.lending(unit.layers):
                naive = [hybrid.logits(pixels) for pixels in calibration.batches]
            assert all(torch.equal(a, b) for a, b in zip(found[unit.name], naive, strict=True)), unit.name


def test_a_mixture_equals_the_checkpoint_that_quantize_writes(
    fragile: Checkpoint, images: ImageSet, tmp_path: Path
) -> None:
    hybrid = hybrid_of(fragile, "nf4")
    kept = [unit for unit in units(linear_layers(hybrid.base, "vit"), "block") if unit.name == "block.1"]
    found: dict[str, list[torch.Tensor]] = {}
    recovery = Hybrid(hybrid.donor, hybrid.base, hybrid.blocks)
    calibration = calibration_of(images, fragile)
    table_logits(recovery, calibration, kept, done=found.__setitem__)
    quantize(fragile, VariantSpec(name="x", format="nf4", skip="block.1"), tmp_path / "kept")
    written = load_model(open_checkpoint(str(tmp_path / "kept")))
    with torch.inference_mode():
        for pixels, logits in zip(calibration.batches, found["block.1"], strict=True):
            assert torch.equal(written(pixels).logits.float(), logits)


def test_blocks_that_run_are_counted(fragile: Checkpoint, images: ImageSet) -> None:
    """Of the blocks that a naive loop runs, (L + 3) / (2 L + 2), the base model included: 0.54 at 24 blocks."""
    hybrid = hybrid_of(fragile, "nf4")
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    calibration = calibration_of(images, fragile, batch_size=32)
    # Once before counting: the first call looks at what a block returns.
    hybrid.logits_from(hybrid.block_input(calibration.batches[0], 1), 1)
    # A block that only passes on runs none of its parts, so its first norm is what counts.
    for name in hybrid.blocks:
        hybrid.base.get_submodule(f"{name}.layernorm_before").register_forward_hook(count)
    table_logits(hybrid, calibration, units(linear_layers(hybrid.base, "vit"), "block"), done=lambda *_: None)
    per_batch = calls / len(calibration.batches)
    assert per_batch == BLOCKS * (BLOCKS + 1) / 2 + BLOCKS


def test_boundary_spills_to_files_above_its_limit(tmp_path: Path) -> None:
    tensors = [torch.full((2, 3, 4), float(index), dtype=torch.bfloat16) for index in range(4)]
    boundary = Boundary(tmp_path, memory_bytes=2 * tensors[0].nbytes)
    for index, tensor in enumerate(tensors):
        boundary[index] = tensor
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for index in reversed(range(4)):
        boundary[index] = boundary[index] + 1
    assert all(torch.equal(boundary[index], tensor + 1) for index, tensor in enumerate(tensors))


def test_spilling_changes_no_result(fragile: Checkpoint, images: ImageSet) -> None:
    hybrid = hybrid_of(fragile, "nf4")
    chosen = units(linear_layers(hybrid.base, "vit"), "block")
    calibration = calibration_of(images, fragile)
    in_memory: dict[str, list[torch.Tensor]] = {}
    spilled: dict[str, list[torch.Tensor]] = {}
    table_logits(hybrid, calibration, chosen, done=in_memory.__setitem__)
    table_logits(hybrid, calibration, chosen, done=spilled.__setitem__, memory_bytes=0)
    assert all(torch.equal(a, b) for name in in_memory for a, b in zip(in_memory[name], spilled[name], strict=True))


@pytest.fixture(scope="module")
def result(fragile: Checkpoint, images: ImageSet, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("sensitivity") / "sensitivity.json"
    return analyse(fragile, images, "nf4", path, goal=Goal(max_kl_share=0.5)), path


def test_the_fragile_block_is_found_by_both_tables(result) -> None:
    scores, _ = result
    name = f"block.{FRAGILE}"
    assert max(scores.units, key=lambda unit: unit.damage.kl).unit == name
    assert min(scores.units, key=lambda unit: unit.recovery.kl).unit == name


def test_auto_keeps_exactly_the_fragile_block(result) -> None:
    scores, _ = result
    assert scores.search.chosen == (f"block.{FRAGILE}",)
    assert scores.search.points[0].skip == ()
    assert scores.search.floor_shown


def test_the_stored_result_reads_back_and_nothing_partial_stays(result) -> None:
    scores, path = result
    assert load_sensitivity(path) == scores
    assert [file.name for file in path.parent.iterdir()] == ["sensitivity.json"]


def test_costs_are_those_of_the_weights(result, fragile: Checkpoint) -> None:
    scores, _ = result
    per_block = 4 * 64 * 64 + 2 * 64 * 128
    for unit in scores.units:
        # 16 bit against 4 bit, less what NF4 spends on scales.
        assert 1.3 * per_block < unit.extra_bytes < 1.5 * per_block
        assert unit.extra_ms is not None


@pytest.fixture
def interrupted(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> Path:
    """Where an analysis was interrupted after three mixtures."""
    path = tmp_path / "sensitivity.json"
    write, calls = analysis.storage.write_bytes, 0

    def interrupt_after_three(target: Path, value: bytes) -> None:
        nonlocal calls
        write(target, value)
        calls += 1
        if calls == 4:  # the first is not a mixture but what identifies the inputs
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(analysis.storage, "write_bytes", interrupt_after_three)
        analyse(fragile, images, "nf4", path)
    return path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The units that are run from now on."""
    units_run: list[str] = []
    run = analysis.table_logits

    def watching(hybrid, calibration, chosen, **options):
        units_run.extend(unit.name for unit in chosen)
        return run(hybrid, calibration, chosen, **options)

    monkeypatch.setattr(analysis, "table_logits", watching)
    return units_run


def test_an_interrupted_analysis_goes_on(
    fragile: Checkpoint, images: ImageSet, interrupted: Path, seen: list[str], result
) -> None:
    assert not interrupted.exists()
    assert interrupted.with_suffix(".partial").exists()
    resumed = analyse(fragile, images, "nf4", interrupted)
    assert seen == ["block.3", "block.0", "block.1", "block.2", "block.3"]
    complete, _ = result
    for ours, theirs in zip(resumed.units, complete.units, strict=True):
        assert (ours.damage, ours.recovery) == (theirs.damage, theirs.recovery)


@pytest.mark.parametrize(
    ("provenance", "options"),
    [
        ({"processor": "another processor"}, {}),
        ({"libraries": {"torch": "99"}}, {}),
        ({"code": "other code"}, {}),
        ({}, {"batch_size": 8}),
    ],
)
def test_an_analysis_goes_on_only_where_it_was_begun(
    provenance: dict[str, Any],
    options: dict[str, int],
    fragile: Checkpoint,
    images: ImageSet,
    interrupted: Path,
    seen: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = analysis.environment.provenance
    monkeypatch.setattr(analysis.environment, "provenance", lambda device: here(device) | provenance)
    analyse(fragile, images, "nf4", interrupted, **options)
    assert seen == [f"block.{n}" for n in range(BLOCKS)] * 2


def test_a_sample_without_labels_picks_the_candidates(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    found = analyse(fragile, images, "nf4", tmp_path / "s.json", sample=8, candidates=2, batch_size=4)
    assert found.sample_images == 8
    assert len(found.sample_kl) == BLOCKS
    assert [unit.unit for unit in found.units if unit.unit == f"block.{FRAGILE}"]
    assert len(found.units) == 2


def test_linear_granularity_names_the_fragile_layers(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    found = analyse(fragile, images, "nf4", tmp_path / "s.json", granularity="linear")
    assert len(found.units) == 6 * BLOCKS
    worst = sorted(found.units, key=lambda unit: unit.damage.kl)[-2:]
    assert {unit.unit for unit in worst} <= {f"block.{FRAGILE}.{name}" for name in ("query", "key", "value", "fc1")}


def test_a_variant_gets_the_list_that_its_floor_asks_for(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    variant = VariantSpec(
        name="auto", format="nf4", skip="auto", auto=AutoSkipSpec(max_top1_drop=None, max_kl_share=0.5)
    )
    found = analyse_for(fragile, images, variant, tmp_path / "s.json")
    chosen = variant.skipping(found.search.chosen)
    assert chosen.skip == (f"block.{FRAGILE}",)
    plan = plan_for(fragile, chosen)
    assert plan.counts() == {"nf4": 6 * (BLOCKS - 1), "bf16": 7}


def test_calibration_images_must_not_be_test_images(images: ImageSet, shapes: Path) -> None:
    with pytest.raises(DataError, match="32 calibration images are also test images"):
        require_disjoint(images, images)
    require_disjoint(images, open_images(DataSpec(source=str(shapes)), "test"))


@pytest.mark.parametrize(
    ("format", "error", "message"),
    [
        ("bf16", RecipeError, "format bf16 quantizes nothing"),
        pytest.param(
            "fp8",
            UnsupportedError,
            "format fp8 cannot run on cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
        ),
    ],
)
def test_formats_that_cannot_be_analysed(
    fragile: Checkpoint, images: ImageSet, tmp_path: Path, format: str, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        analyse(fragile, images, format, tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


def test_a_quantized_checkpoint_is_refused(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    quantize(fragile, VariantSpec(name="x", format="nf4"), tmp_path / "nf4")
    with pytest.raises(CheckpointError, match="quantized already"):
        analyse(open_checkpoint(str(tmp_path / "nf4")), images, "nf4", tmp_path / "s.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["beit", "dinov2", "siglip", "swin", "swinv2"])
def test_other_families_run_from_any_block(
    model_type: str, dtype: torch.dtype, make_family: Callable[..., Checkpoint]
) -> None:
    checkpoint = make_family(model_type)
    exact = load_model(checkpoint, dtype=dtype)
    hybrid = Hybrid(exact, load_model(checkpoint, dtype=dtype), block_names(exact, model_type))
    size = checkpoint.image_size
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    whole = hybrid.logits(pixels)
    for block in range(len(hybrid.blocks)):
        hidden = hybrid.block_input(pixels, block)
        assert torch.equal(hybrid.logits_from(hidden, block), whole)
        if block + 1 < len(hybrid.blocks):
            # Also past the patches that Swin merges between two stages.
            assert torch.equal(hybrid.advance(hidden, block), hybrid.block_input(pixels, block + 1))
