"""Tested images that are met again: by content, by look, among themselves and in what a checkpoint has seen."""

from dataclasses import replace
from pathlib import Path

import pytest

from vitopt.data.images import open_images
from vitopt.measure.overlap import HashedImages, warning
from vitopt.models.calibration import Use
from vitopt.recipe import DataSpec
from vitopt.records import Overlap
from vitopt.transformation import seen

A, A_RESAVED, B, C = "0" * 16, "0" * 15 + "3", "f" * 16, "0f" * 8


def hashed(*images: tuple[str, str | None]) -> HashedImages:
    """Images by content and look, named i0, i1 ..."""
    contents, looks = zip(*images, strict=True)
    return HashedImages(tuple(f"i{n}" for n in range(len(images))), contents, looks)


def test_images_that_are_met_nowhere_else_overlap_with_nothing() -> None:
    other = Use("training", "d", "train", ("z",), ("z.jpg",), (C,))
    assert hashed(("a", A), ("b", B)).overlaps([other]) == ()


def test_copies_and_look_alikes_among_the_tested_images_are_counted_apart() -> None:
    (found,) = hashed(("a", A), ("b", B), ("a", A), ("c", C), ("c2", C), ("a", A)).overlaps([])
    assert (found.where, found.same, found.alike) == ("test", 3, 2)
    assert found.examples == ("i0 is i2", "i2 is i5", "i5 is i0", "i3 looks like i4", "i4 looks like i3")


def test_what_the_checkpoint_has_seen_is_counted_by_purpose() -> None:
    trained = Use("training", "d", "train", ("a", "y"), ("x.jpg", "y.jpg"), (A, B))
    chosen = Use("skip list", "d", "train", ("b",))  # nothing is known of how its images look
    training, skip_list = hashed(("a", A), ("b", B), ("a2", A_RESAVED), ("c", C)).overlaps([trained, chosen])[1:]
    assert (training.where, training.same, training.alike) == ("training", 1, 2)
    assert training.examples == ("i0 is x.jpg", "i1 looks like y.jpg", "i2 looks like x.jpg")
    assert (skip_list.where, skip_list.same, skip_list.alike) == ("skip list", 1, None)


def test_real_image_sets(shapes: Path) -> None:
    train, test = (open_images(DataSpec(source=str(shapes)), split) for split in ("train", "test"))
    mixed = HashedImages.of(test)
    by_content = [one for one in mixed.overlaps([seen(train, "training"), seen(test, "format")]) if one.same]
    assert [(one.where, one.same) for one in by_content] == [("format", len(test))]
    assert replace(seen(test, "format"), image_sha256=(), images=(), image_phash=()) == Use(
        "format", test.name, "test", ()
    )


def test_nothing_is_decoded_where_looks_are_not_asked_for(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitopt.measure.overlap.perceptual_hashes", lambda images: pytest.fail("it looked"))
    test = open_images(DataSpec(source=str(shapes)), "test")
    twice = HashedImages.of(test.subset([0, 1, 0]), look=False)
    (found,) = twice.overlaps([Use("training", "d", "train", ("z",), ("z.jpg",), (C,))])
    assert (found.where, found.same, found.alike) == ("test", 2, None)


@pytest.mark.parametrize(
    ("overlap", "words"),
    [
        (Overlap(where="training", same=3, alike=None, examples=("a is b",)), ["3 of 40", "training images", "a is b"]),
        (
            Overlap(where="skip list", same=0, alike=1, examples=("a looks like b",)),
            ["1 look-alike of 40", "skip list"],
        ),
        (Overlap(where="test", same=2, alike=4, examples=("a is b",)), ["2 and 4 look-alikes of 40", "more than once"]),
    ],
)
def test_the_warning_says_how_many_and_what_it_harms(overlap: Overlap, words: list[str]) -> None:
    line = warning(overlap, 40)
    assert all(word in line for word in words)
