"""Sensitivity on tiny models: the same as the naive loop, and a fragile block is found."""

import weakref
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
from vitopt.errors import BadImageError, CheckpointError, DataError, RecipeError, UnsupportedError
from vitopt.measure.logit_statistics import mean_kl_divergence
from vitopt.models.checkpoint import Checkpoint, load_model, load_processor, open_checkpoint
from vitopt.models.names import block_names, linear_layers
from vitopt.optimize.formats import quantization_config
from vitopt.optimize.hybrid import Boundary, Hybrid
from vitopt.optimize.quantize import plan_for, quantize
from vitopt.recipe import AutoSkipSpec, DataSpec, VariantSpec
from vitopt.search import analysis, sensitivity
from vitopt.search.analysis import analyse, analyse_for, require_disjoint
from vitopt.search.confirmation import divide
from vitopt.search.goal import Goal
from vitopt.search.results import load_sensitivity
from vitopt.search.sensitivity import Calibration, mixture_logits, units

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
    pixels = pixels_of(images, checkpoint, batch_size)
    return Calibration(images.ids, images.image_hashes, np.array(fitted.labels), lambda: pixels, len(pixels))


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
        mixture_logits(hybrid, calibration, chosen, done=found.__setitem__)
        assert list(found) == [unit.name for unit in chosen]
        for unit in chosen:
            with hybrid.lending(unit.layers):
                naive = [hybrid.logits(pixels) for pixels in calibration.stream()]
            assert all(torch.equal(a, b) for a, b in zip(found[unit.name], naive, strict=True)), unit.name


def test_a_mixture_equals_the_checkpoint_that_quantize_writes(
    fragile: Checkpoint, images: ImageSet, tmp_path: Path
) -> None:
    hybrid = hybrid_of(fragile, "nf4")
    kept = [unit for unit in units(linear_layers(hybrid.base, "vit"), "block") if unit.name == "block.1"]
    found: dict[str, list[torch.Tensor]] = {}
    recovery = Hybrid(hybrid.donor, hybrid.base, hybrid.blocks)
    calibration = calibration_of(images, fragile)
    mixture_logits(recovery, calibration, kept, done=found.__setitem__)
    quantize(fragile, VariantSpec(name="x", format="nf4", skip="block.1"), tmp_path / "kept")
    written = load_model(open_checkpoint(str(tmp_path / "kept")))
    with torch.inference_mode():
        for pixels, logits in zip(calibration.stream(), found["block.1"], strict=True):
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
    hybrid.logits_from(hybrid.block_input(next(iter(calibration.stream())), 1), 1)
    # A block that only passes on runs none of its parts, so its first norm is what counts.
    for name in hybrid.blocks:
        hybrid.base.get_submodule(f"{name}.layernorm_before").register_forward_hook(count)
    mixture_logits(hybrid, calibration, units(linear_layers(hybrid.base, "vit"), "block"), done=lambda *_: None)
    per_batch = calls / calibration.count
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
    mixture_logits(hybrid, calibration, chosen, done=in_memory.__setitem__)
    mixture_logits(hybrid, calibration, chosen, done=spilled.__setitem__, memory_bytes=0)
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
    assert (scores.search.choosing_images, scores.search.confirming_images) == (8, 24)
    assert scores.images == 8
    assert scores.search.confirmed.kl_share is not None and scores.search.confirmed.kl_share < 0.5
    assert scores.search.decision == "shown"


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

    goal = Goal(max_kl_share=0.5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(analysis.storage, "write_bytes", interrupt_after_three)
        analyse(fragile, images, "nf4", path, goal=goal)
    return path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The units that are run from now on."""
    units_run: list[str] = []
    run = analysis.mixture_logits

    def watching(hybrid, calibration, chosen, **options):
        units_run.extend(unit.name for unit in chosen)
        return run(hybrid, calibration, chosen, **options)

    monkeypatch.setattr(analysis, "mixture_logits", watching)
    return units_run


def test_an_interrupted_analysis_goes_on(
    fragile: Checkpoint, images: ImageSet, interrupted: Path, seen: list[str], result
) -> None:
    assert not interrupted.exists()
    assert interrupted.with_suffix(".partial").exists()
    resumed = analyse(fragile, images, "nf4", interrupted, goal=Goal(max_kl_share=0.5))
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
    here = analysis.machine.provenance
    monkeypatch.setattr(analysis.machine, "provenance", lambda device: here(device) | provenance)
    analyse(fragile, images, "nf4", interrupted, goal=Goal(max_kl_share=0.5), **options)
    assert seen == [f"block.{n}" for n in range(BLOCKS)] * 2


def test_a_sample_without_labels_picks_the_candidates(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    found = analyse(fragile, images, "nf4", tmp_path / "s.json", sample=8, candidates=2, batch_size=4)
    assert found.sample_images == 8
    assert found.search is None
    assert len(found.sample_kl) == BLOCKS
    assert [unit.unit for unit in found.units if unit.unit == f"block.{FRAGILE}"]
    assert len(found.units) == 2


def test_a_sample_holds_all_classes_and_counts_what_it_holds(
    fragile: Checkpoint, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images come sorted by class, so the first batches would hold one or two classes."""
    seen: list[Calibration] = []
    run = analysis.mixture_logits

    def watching(hybrid, calibration, chosen, **options):
        seen.append(calibration)
        return run(hybrid, calibration, chosen, **options)

    monkeypatch.setattr(analysis, "mixture_logits", watching)
    found = analyse(fragile, images, "nf4", tmp_path / "s.json", sample=9, candidates=2, batch_size=4)
    assert sorted(seen[0].labels.tolist()) == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert found.sample_images == 9
    few = analyse(fragile, images, "nf4", tmp_path / "few.json", sample=100, candidates=2, goal=Goal(max_kl_share=0.5))
    assert few.sample_images == 8  # all that choose


def test_what_was_not_tried_is_not_spoken_of(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    goal = Goal(max_kl_share=0.01)
    found = analyse(fragile, images, "nf4", tmp_path / "s.json", sample=8, candidates=1, goal=goal)
    assert found.search is not None and found.search.advice is not None
    assert f"{BLOCKS - 1} units were not tried" in found.search.advice


# The two parts of the images


def test_the_search_never_sees_the_images_that_confirm(
    fragile: Checkpoint, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    parts: list[tuple[str, ...]] = []
    make = analysis.calibration_of

    def watching(images: ImageSet, *rest):
        parts.append(images.ids)
        return make(images, *rest)

    confirmed: list[frozenset[str]] = []
    search = analysis.search_skip_list

    def counting(scores, evaluate, confirm, goal, **options):
        def once(names: frozenset[str]):
            confirmed.append(names)
            return confirm(names)

        return search(scores, evaluate, once, goal, **options)

    monkeypatch.setattr(analysis, "calibration_of", watching)
    monkeypatch.setattr(analysis, "search_skip_list", counting)
    found = analyse(fragile, images, "nf4", tmp_path / "s.json", goal=Goal(max_top1_drop=50)).search
    choosing, confirming = parts
    assert not set(choosing) & set(confirming)
    assert set(choosing) | set(confirming) == set(images.ids)
    assert found is not None and confirmed == [frozenset(found.chosen)]
    assert any("there are 32" in message for message in caplog.messages)  # said before the work


def test_the_confirming_loss_is_that_of_the_checkpoint_that_quantize_writes(
    fragile: Checkpoint, images: ImageSet, tmp_path: Path
) -> None:
    found = analyse(fragile, images, "nf4", tmp_path / "s.json", goal=Goal(max_kl_share=0.5)).search
    assert found is not None
    quantize(fragile, VariantSpec(name="x", format="nf4", skip=found.chosen), tmp_path / "kept")
    written, exact = load_model(open_checkpoint(str(tmp_path / "kept"))), load_model(fragile, dtype=torch.bfloat16)
    _, confirming = divide(fit_labels(images, fragile.label_names))
    with torch.inference_mode():
        pixels = torch.cat(pixels_of(confirming, fragile, 32)).bfloat16()
        before, after = (model(pixels).logits.float().numpy() for model in (exact, written))
    assert found.confirmed.kl == pytest.approx(mean_kl_divergence(before, after), rel=1e-5)
    lost = (before.argmax(1) == confirming.labels).mean() - (after.argmax(1) == confirming.labels).mean()
    assert found.confirmed.top1_delta_points == pytest.approx(-100 * lost)


def test_never_are_the_pixels_of_all_batches_held(
    fragile: Checkpoint, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    read = sensitivity.batches

    def counting(*args, **options):
        nonlocal most
        for batch in read(*args, **options):
            alive.add(batch.pixel_values)
            most = max(most, len(alive))
            yield batch

    monkeypatch.setattr(sensitivity, "batches", counting)
    analyse(fragile, images, "nf4", tmp_path / "s.json", goal=Goal(max_kl_share=0.5), sample=4, batch_size=1)
    assert 1 <= most <= 3  # of 32 batches; decoding is at most four ahead


@pytest.fixture
def with_a_broken_one(shapes: Path, copy_of: Callable[[Path], Path]) -> ImageSet:
    folder = copy_of(shapes)
    (folder / "train" / "cross" / "03.png").write_bytes(b"no image")
    return open_images(DataSpec(source=str(folder)), "train")


def test_broken_images_are_an_error_or_left_out(
    fragile: Checkpoint, with_a_broken_one: ImageSet, tmp_path: Path, caplog
) -> None:
    goal = Goal(max_kl_share=0.5)
    with pytest.raises(BadImageError, match=r"cross/03\.png"):
        analyse(fragile, with_a_broken_one, "nf4", tmp_path / "s.json", goal=goal)
    found = analyse(fragile, with_a_broken_one, "nf4", tmp_path / "s.json", goal=goal, skip_bad=True).search
    assert found is not None and (found.choosing_images, found.confirming_images) == (8, 23)
    assert any("1 calibration images" in message and "cross/03.png" in message for message in caplog.messages)


def test_what_another_batch_size_left_is_not_gone_on_with(
    fragile: Checkpoint, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.json"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(analysis, "extra_ms", interrupt)
        analyse(fragile, images, "nf4", path, batch_size=4)
    left = (path.with_suffix(".partial") / "inputs.sha256").read_text()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(analysis, "extra_ms", interrupt)
        analyse(fragile, images, "nf4", path, batch_size=8)
    assert (path.with_suffix(".partial") / "inputs.sha256").read_text() != left


def test_linear_granularity_names_the_fragile_layers(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    found = analyse(fragile, images, "nf4", tmp_path / "s.json", granularity="linear")
    assert len(found.units) == 6 * BLOCKS
    worst = sorted(found.units, key=lambda unit: unit.damage.kl)[-2:]
    assert {unit.unit for unit in worst} <= {f"block.{FRAGILE}.{name}" for name in ("query", "key", "value", "fc1")}


def test_kinds_are_kept_in_all_blocks(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    result = analyse(fragile, images.limited(16), "nf4", tmp_path / "s.json", granularity="kind", device="cpu")
    units_ = {unit.unit: unit for unit in result.units}
    assert list(units_) == ["query", "key", "value", "output", "fc1", "fc2"]
    assert all(unit.damage is not None and unit.extra_ms is not None for unit in result.units)
    kept = VariantSpec(name="v", format="nf4", skip=("fc1",))
    quantize(fragile, kept, tmp_path / "kept", "cpu")
    exact = load_model(fragile, dtype=torch.bfloat16)
    mixed = load_model(open_checkpoint(str(tmp_path / "kept")))
    batches_ = pixels_of(images.limited(16), fragile, 32)
    with torch.inference_mode():
        logits = [
            torch.cat([model(pixel_values=pixels).logits.float() for pixels in batches_]).numpy()
            for model in (exact, mixed)
        ]
    assert units_["fc1"].recovery is not None
    assert units_["fc1"].recovery.kl == pytest.approx(mean_kl_divergence(*logits), rel=1e-3)


def test_a_variant_gets_the_list_that_its_floor_asks_for(fragile: Checkpoint, images: ImageSet, tmp_path: Path) -> None:
    variant = VariantSpec(
        name="auto", format="nf4", skip="auto", auto=AutoSkipSpec(max_top1_drop=None, max_kl_share=0.5)
    )
    found = analyse_for(fragile, images, variant, tmp_path / "s.json")
    chosen = variant.skipping(found.search.chosen)
    assert chosen.skip == (f"block.{FRAGILE}",)
    plan = plan_for(fragile, chosen)
    assert plan.counts() == {"nf4": 6 * (BLOCKS - 1), "bf16": 7}


def test_an_engine_that_compiles_torchs_model_takes_torchs_analysis(
    fragile: Checkpoint, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"device": "cpu", "batch_size": 8}
    found = analyse(fragile, images, "w8a8", tmp_path / "sensitivity.json", **asked)
    monkeypatch.setattr(analysis, "_Analysis", lambda *_: pytest.fail("analysed again"))
    assert analyse(fragile, images, "w8a8", tmp_path / "sensitivity.json", engine="aoti", **asked) == found


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
