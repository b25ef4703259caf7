"""Image sets made of (image, label) pairs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitopt.data.duplicates import look_alikes, perceptual_hashes
from vitopt.data.images import open_images
from vitopt.data.labels import fit_labels
from vitopt.data.pairs import images_of
from vitopt.data.pixels import PixelDataset
from vitopt.errors import DataError
from vitopt.recipe import DataSpec

GREY = np.full((8, 6), 100, np.uint8)
RGB = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)


def test_paths_pillow_images_and_arrays_are_decoded_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(RGB).save(file)
    pairs = [(file, "b"), (str(file), "a"), (Image.fromarray(RGB), "b"), (RGB, "a"), (GREY, "a")]
    images = images_of(pairs)
    assert images.class_names == ("a", "b") and images.labels == (1, 0, 1, 0, 0)
    for index in range(4):
        assert np.array_equal(np.asarray(images.image(index)), RGB)
    assert images.image(4).mode == "RGB" and images.image(4).size == (6, 8)


def test_files_have_the_hashes_that_they_have_in_a_folder(shapes: Path) -> None:
    folder = open_images(DataSpec(source=str(shapes)), "test")
    files = [shapes / "test" / name for name in folder.ids]
    names = folder.class_names or ()
    images = images_of([(file, names[label]) for file, label in zip(files, folder.labels, strict=True)])
    assert (images.image_hashes, images.sha256, images.labels) == (folder.image_hashes, folder.sha256, folder.labels)


def test_the_same_pixels_have_one_hash_and_look_alikes_are_found() -> None:
    gradient = np.add.outer(np.arange(64) * 2, np.arange(64)).astype(np.uint8)
    smaller = Image.fromarray(gradient).resize((48, 48))
    images = images_of([(gradient, 0), (Image.fromarray(gradient), 0), (smaller, 1), (RGB, 1)])
    assert images.image_hashes[0] == images.image_hashes[1] != images.image_hashes[2]
    hashes = perceptual_hashes(images)
    assert set(look_alikes(hashes[2:3], hashes[:1])) == {0} and not look_alikes(hashes[3:], hashes[:1])


def test_numbers_count_the_outputs_of_a_head() -> None:
    images = images_of([(GREY, np.int64(3)), (RGB, torch.tensor(0))])
    assert images.labels == (3, 0) and images.class_names is None
    with pytest.raises(DataError, match="label 3"):
        fit_labels(images, ["a", "b", "c"])


@pytest.mark.parametrize("kind", [set, frozenset, list, tuple])
def test_sets_of_labels_become_rows_of_zeros_and_ones(kind: Callable[[list[str]], object]) -> None:
    pairs = [(GREY, kind(["dog", "cat"])), (RGB, kind([])), (GREY + 1, kind(["cat"])), (RGB, kind(["cat", "dog"]))]
    images = images_of(pairs, groups=[1, 1, 2, 2])
    assert images.class_names == ("cat", "dog") and images.groups == ("1", "1", "2", "2")
    assert images.targets().tolist() == [[1, 1], [0, 0], [1, 0], [1, 1]]
    assert images.labels[0] == images.labels[3] and len(set(images.labels)) == 3
    fitted = fit_labels(images, ["Dog", "bird", "cat"])
    assert fitted.targets().tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1], [1, 0, 1]]
    assert fitted.subset([2]).targets().tolist() == [[0, 0, 1]]
    item = PixelDataset(fitted, lambda image: torch.zeros(3, 2, 2))[2]["labels"]
    assert item.dtype == torch.float32 and item.tolist() == [0, 0, 1]


def test_other_labels_make_another_set() -> None:
    first, second = (images_of([(GREY, {0, 1}), (RGB, labels)]) for labels in ({0}, {1}))
    assert first.sha256 != second.sha256 and first.labels == second.labels


def test_a_lazy_sequence_is_read_when_an_image_is_needed() -> None:
    asked = []

    class Lazy:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
            asked.append(index)
            return GREY + index, "ab"[index % 2]

    images = images_of(Lazy())
    asked.clear()
    assert np.asarray(images.image(2)).max() == 102 and asked == [2]


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        ([], "empty"),
        (3, "int"),
        ([(GREY, "a"), GREY], "item 1"),
        ([(GREY, "a"), (GREY, "a", "b")], "item 1"),
        ([(GREY, "a"), (GREY, 2)], "pair 1"),
        ([(GREY, {"a"}), (GREY, set()), (GREY, "a")], "pair 2"),
        ([(GREY, {"a"}), (GREY, {"a", 2})], "pair 1"),
        ([(GREY, 0), (GREY, -1)], "pair 1"),
        ([(GREY, 0), (GREY, 0.5)], "pair 1.*float"),
        ([(GREY, [1]), (GREY, [0, 0, 1, 0])], "pair 1.*twice"),
        ([(GREY.astype(float), 0)], "pair 0.*float64"),
        ([(GREY, 0), (RGB.transpose(2, 0, 1), 0)], "pair 1.*(3, 40, 48)"),
        ([(GREY, 0), ("nowhere.png", 0)], "pair 1.*nowhere.png"),
        ([(object(), 0)], "pair 0"),
    ],
)
def test_what_is_no_pair_is_refused_by_its_index(pairs: object, named: str) -> None:
    with pytest.raises(DataError, match=named):
        images_of(pairs)


def test_every_image_needs_a_group() -> None:
    with pytest.raises(DataError, match="2 images and 1 groups"):
        images_of([(GREY, 0), (RGB, 1)], groups=["a"])


def test_an_image_that_the_user_opened_keeps_its_size(tmp_path: Path) -> None:
    Image.fromarray(RGB).resize((480, 400)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as opened:
        images = images_of([(opened, 0), (RGB, 1)])
        images.image(0, smallest_side=32)
        assert images.image(0).size == opened.size == (480, 400)
