"""A schedule is found on some images and told on others, by the FLOPs that the record counts."""

from pathlib import Path

import pytest
import torch

from vitopt.data.images import ImageSet, open_images
from vitopt.data.pixels import Preprocessor
from vitopt.errors import RecipeError, UnsupportedError
from vitopt.measure.logit_statistics import mean_kl_divergence
from vitopt.models.checkpoint import Checkpoint, load_processor, open_checkpoint
from vitopt.optimize.runtime import prepare
from vitopt.recipe import DataSpec, RunSpec
from vitopt.search.confirmation import divide
from vitopt.search.fewer_tokens import TokenSearch, costs_of, find_schedule
from vitopt.token_schedule import removed_in

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "train")


@pytest.fixture(scope="module")
def found(tiny: Checkpoint, images: ImageSet) -> TokenSearch:
    return find_schedule(tiny, images, 0.8, device="cpu")


def kl_of(checkpoint: Checkpoint, images: ImageSet, schedule: str) -> float:
    preprocess = Preprocessor(load_processor(checkpoint))
    pixels = torch.stack([preprocess(images.image(index)) for index in range(len(images))])
    plain, merged = (
        prepare(checkpoint, name="one", device=CPU, run=run) for run in (RunSpec(), RunSpec(merge_tokens=schedule))
    )
    return mean_kl_divergence(plain(pixels).numpy(), merged(pixels).numpy())


@pytest.mark.parametrize("schedule", ["3", "8@0_3@1", "5@1"])
def test_costs_are_the_flops_of_the_record(schedule: str, tiny: Checkpoint) -> None:
    merged = prepare(tiny, name="merged", device=CPU, run=RunSpec(merge_tokens=schedule))
    assert costs_of(tiny).flops(removed_in(schedule, 3)) == merged.flops_per_image()


def test_the_chosen_schedule_is_the_best_of_all_that_were_tried(found: TokenSearch) -> None:
    best = min(found.tried, key=lambda one: one.kl)
    assert found.chosen == best.schedule == found.confirmed[0].schedule
    assert all(one.flops_share <= 0.8 for one in found.tried)
    simple = {one.schedule for one in found.confirmed if one.kind != "searched"}
    assert simple and simple <= {one.schedule for one in found.tried}


def test_its_figures_are_those_of_the_model_that_runs_it(
    found: TokenSearch, tiny: Checkpoint, images: ImageSet
) -> None:
    choosing, confirming = divide(images)
    assert (found.choosing_images, found.confirming_images) == (len(choosing), len(confirming))
    for one in found.tried[:2]:
        assert one.kl == pytest.approx(kl_of(tiny, choosing, one.schedule), rel=1e-3)
    for one in found.confirmed:
        assert one.kl == pytest.approx(kl_of(tiny, confirming, one.schedule), rel=1e-3)
    assert found.damage["block.1"][4] == pytest.approx(kl_of(tiny, choosing, "4@1"), rel=1e-3)


def test_a_limit_of_steps_is_kept(tiny: Checkpoint, images: ImageSet) -> None:
    limited = find_schedule(tiny, images, 0.8, steps=1, device="cpu")
    assert "_" not in limited.chosen
    assert TokenSearch.model_validate(limited.to_json()) == limited


def test_what_cannot_be_saved_is_refused(tiny: Checkpoint, images: ImageSet) -> None:
    with pytest.raises(RecipeError, match=r"0\.1 of the FLOPs"):
        find_schedule(tiny, images, 0.1, device="cpu")
    with pytest.raises(UnsupportedError, match="Swin"):
        find_schedule(open_checkpoint("random:swin-tiny-patch4-window7-224"), images, 0.8, device="cpu")
