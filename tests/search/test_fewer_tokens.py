"""A schedule is found on some images and told on others, by the FLOPs that the record counts."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from numpy.typing import NDArray
from scipy import stats

from vitopt.data.images import ImageSet, open_images
from vitopt.data.pixels import Preprocessor
from vitopt.errors import BadImageError, RecipeError, UnsupportedError
from vitopt.measure.logit_statistics import kl_divergences
from vitopt.models.checkpoint import Checkpoint, load_processor, open_checkpoint
from vitopt.optimize.runtime import prepare
from vitopt.recipe import DataSpec, RunSpec
from vitopt.search import fewer_tokens
from vitopt.search.confirmation import divide
from vitopt.search.fewer_tokens import TokenSearch, costs_of, find_schedule
from vitopt.token_schedule import removed_in

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder = make_images(tmp_path_factory.mktemp("images") / "shapes", {"train": 12})
    return open_images(DataSpec(source=str(folder)), "train")


@pytest.fixture(scope="module")
def found(tiny: Checkpoint, images: ImageSet) -> TokenSearch:
    return find_schedule(tiny, images, 0.8, device="cpu")


def kl_of(checkpoint: Checkpoint, images: ImageSet, schedule: str) -> NDArray[np.float64]:
    """(images,), of the model that runs the schedule."""
    preprocess = Preprocessor(load_processor(checkpoint))
    pixels = torch.stack([preprocess(images.image(index)) for index in range(len(images))])
    plain, merged = (
        prepare(checkpoint, name="one", device=CPU, run=run) for run in (RunSpec(), RunSpec(merge_tokens=schedule))
    )
    return kl_divergences(plain(pixels).numpy(), merged(pixels).numpy())


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
        assert one.kl == pytest.approx(kl_of(tiny, choosing, one.schedule).mean(), rel=1e-3)
    for one in found.confirmed:
        assert one.kl == pytest.approx(kl_of(tiny, confirming, one.schedule).mean(), rel=1e-3)
    assert found.damage["block.1"][4] == pytest.approx(kl_of(tiny, choosing, "4@1").mean(), rel=1e-3)


def test_the_searched_schedule_is_compared_image_by_image(
    found: TokenSearch, tiny: Checkpoint, images: ImageSet
) -> None:
    confirming = divide(images)[1]
    searched, *others = found.confirmed
    assert searched.kl_above_searched is None and searched.kl_above_searched_ci95 is None
    same = [one for one in others if one.schedule == found.chosen]
    assert {(one.kl_above_searched, one.kl_above_searched_ci95) for one in same} <= {(0.0, None)}
    assert len(same) < len(others)
    for one in (one for one in others if one not in same):
        above = kl_of(tiny, confirming, one.schedule) - kl_of(tiny, confirming, found.chosen)
        assert one.kl_above_searched == pytest.approx(above.mean(), rel=1e-3)
        expected = stats.bootstrap((above,), np.mean, method="percentile").confidence_interval
        near = 0.1 * (expected.high - expected.low)
        assert one.kl_above_searched_ci95 == pytest.approx((expected.low, expected.high), abs=near)


def test_a_limit_of_steps_is_kept(tiny: Checkpoint, images: ImageSet) -> None:
    limited = find_schedule(tiny, images.subset(range(32)), 0.8, steps=1, device="cpu")
    assert {one.kl_above_searched_ci95 for one in limited.confirmed} == {None}  # 24 images are too few to tell
    assert "_" not in limited.chosen
    assert TokenSearch.model_validate(limited.to_json()) == limited


def test_what_cannot_be_saved_is_refused_before_anything_is_measured(
    tiny: Checkpoint, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fewer_tokens, "load_model", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(RecipeError, match=r"0\.1 of the FLOPs.*least is 0\."):
        find_schedule(tiny, images, 0.1, device="cpu")
    with pytest.raises(RecipeError, match=r"1 of the blocks.*more steps"):
        find_schedule(tiny, images, 0.4, steps=1, device="cpu")
    labels = replace(tiny, config=copy.deepcopy(tiny.config))
    labels.config.problem_type = "multi_label_classification"
    with pytest.raises(UnsupportedError, match="exclude each other"):
        find_schedule(labels, images, 0.8, device="cpu")
    with pytest.raises(UnsupportedError, match="Swin"):
        find_schedule(open_checkpoint("random:swin-tiny-patch4-window7-224"), images, 0.8, device="cpu")


def test_an_image_that_cannot_be_decoded_is_told_before_the_search(
    tiny: Checkpoint, shapes: Path, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(shapes)
    last = divide(open_images(DataSpec(source=str(folder)), "train"))[1].ids[-1]
    next(path for path in folder.rglob("*.png") if str(path).endswith(last)).write_bytes(b"no image")
    monkeypatch.setattr(fewer_tokens, "_search", lambda *_: pytest.fail("the search began"))
    with pytest.raises(BadImageError, match=last):
        find_schedule(tiny, open_images(DataSpec(source=str(folder)), "train"), 0.8, device="cpu")
