"""Images that look the same are found, images of other things are not."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, draw
from PIL import Image, ImageEnhance

from vitopt.data.duplicates import LARGEST_DISTANCE, look_alikes, perceptual_hashes
from vitopt.data.images import ImageSet, image_files, open_images
from vitopt.environment import support
from vitopt.recipe import DataSpec

imagehash = pytest.importorskip("imagehash")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., ImageSet]:
    """Image files of these pictures, in this order."""

    def save(*pictures: Image.Image, ending: str = "png", **options: object) -> ImageSet:
        paths = [tmp_path / f"{index:03d}.{ending}" for index in range(len(pictures))]
        for path, picture in zip(paths, pictures, strict=True):
            picture.save(path, **options)
        return image_files(paths)

    return save


def photo(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """Something with the smooth shapes of a photo: noise of 8 x 6 pixels, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def test_the_hash_is_the_library_s_own_of_the_whole_picture(saved) -> None:
    picture = photo(0)
    assert perceptual_hashes(saved(picture)) == (str(imagehash.phash(picture)),)


def test_a_jpeg_decoded_small_has_nearly_the_hash_of_the_whole(saved) -> None:
    pictures = [photo(seed, (1600, 1200)) for seed in range(5)]
    for small, whole in zip(perceptual_hashes(saved(*pictures, ending="jpg")), pictures, strict=True):
        assert imagehash.hex_to_hash(small) - imagehash.phash(whole) <= 2


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: picture.resize((60, 45)),
        lambda picture: picture.resize((240, 180), Image.Resampling.NEAREST),
        lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
        lambda picture: picture.convert("L"),
        lambda picture: picture.quantize(64).convert("RGB"),
    ],
    ids=["half", "double", "brighter", "grey", "64 colours"],
)
def test_a_changed_copy_looks_the_same(change, saved) -> None:
    pictures = [photo(seed) for seed in range(20)]
    hashes = perceptual_hashes(saved(*pictures, change(pictures[7])))
    assert look_alikes(hashes[20:], hashes[:20]) == {0: 7}
    assert look_alikes(hashes, hashes, same_set=True) == {7: 20, 20: 7}


def test_images_saved_anew_with_less_quality_look_the_same(saved) -> None:
    pictures = [photo(seed) for seed in range(10)]
    sharp = perceptual_hashes(saved(*pictures, ending="jpg", quality=95))
    assert look_alikes(perceptual_hashes(saved(*pictures, ending="jpg", quality=40)), sharp) == {
        i: i for i in range(10)
    }


def test_images_of_other_things_do_not(saved) -> None:
    hashes = perceptual_hashes(saved(*(photo(seed) for seed in range(200))))
    assert look_alikes(hashes, hashes, same_set=True) == {}


def test_images_too_small_to_tell_apart_have_no_hash() -> None:
    digits = open_images(DataSpec(source="digits"), "test")
    hashes = perceptual_hashes(digits)
    assert set(hashes) == {None}
    assert look_alikes(hashes, hashes, same_set=True) == {}


def test_an_image_that_cannot_be_decoded_has_no_hash(saved) -> None:
    images = saved(photo(0), photo(1))
    images.reader.paths[0].write_bytes(b"no image")
    assert perceptual_hashes(images)[0] is None
    assert perceptual_hashes(images)[1] is not None


def test_without_the_library_nothing_is_hashed(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "installed", lambda package: False)
    assert perceptual_hashes(saved(draw(CLASSES[0], np.random.default_rng(0)))) == ()


def test_look_alikes_are_those_of_a_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitopt.data.duplicates._PAIRS_AT_ONCE", 1000)  # several steps
    rng = np.random.default_rng(0)
    theirs = [int(word) for word in rng.integers(0, 2**63, 150)]
    ours = [word ^ sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 13), replace=False)) for word in theirs]
    as_text = lambda words: [None if index % 10 == 9 else f"{word:016x}" for index, word in enumerate(words)]  # noqa: E731
    expected = {}
    for i, ours_text in enumerate(as_text(ours)):
        distances = [
            bin(int(ours_text, 16) ^ int(text, 16)).count("1") if ours_text and text else 65 for text in as_text(theirs)
        ]
        if min(distances) <= LARGEST_DISTANCE:
            expected[i] = distances.index(min(distances))
    assert 40 < len(expected) < 100
    assert look_alikes(as_text(ours), as_text(theirs)) == expected


def test_real_photos_show_copies_and_nothing_else(shared: Path) -> None:
    test, train = (
        open_images(DataSpec(source=str(shared / "data/cifar10-3000")), split) for split in ("test", "train")
    )
    found = look_alikes(perceptual_hashes(test), perceptual_hashes(train))
    # Two pairs of 2,000,000 or more, which are the same photos in CIFAR-10 itself.
    pairs = {(test.ids[i], train.ids[j]) for i, j in found.items()}
    assert pairs == {("cat/0011.jpg", "cat/2685.jpg"), ("deer/0011.jpg", "deer/3167.jpg")}
