import base64
import hashlib
import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vitopt.data.images import open_images
from vitopt.measure.predictions import Predictions
from vitopt.recipe import DataSpec
from vitopt.records import Dataset
from vitopt.report.flips import THUMBNAIL_PIXELS, Thumbnails, choose, flips, softmax

NAMES = dict(enumerate(("circle", "cross", "square", "stripe")))
NO_IMAGES = Thumbnails(None)


def flips_of(before, after, thumbnails=NO_IMAGES):
    return flips("nf4", before, after, NAMES, thumbnails)


def dataset(name, split=None):
    return Dataset(name=str(name), split=split, images=1, sha256="0", preprocessor="none")


def picture(uri):
    kind, _, content = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def test_only_flips_are_chosen_with_those_lost_first(make: SimpleNamespace):
    before, after = make.predictions(wrong=(1, 2)), make.predictions(wrong=(2, 5, 9))

    found = flips_of(before, after)

    assert (found.right_to_wrong, found.wrong_to_right, found.flipped) == (2, 1, 3)
    assert [(flip.image, flip.became_right) for flip in found.shown] == [
        ("cross/09.png", False),
        ("cross/05.png", False),
        ("cross/01.png", True),
    ]


def test_a_flip_says_what_each_answered_and_how_sure_it_was(make: SimpleNamespace):
    before, after = make.predictions(), make.predictions(wrong=(4,))

    (flip,) = flips_of(before, after).shown

    sure = 100 * np.exp(3.2) / (np.exp(3.2) + 3)
    assert (flip.label, flip.baseline.name, flip.variant.name) == ("circle", "circle", "cross")
    assert flip.baseline.percent == pytest.approx(sure)
    assert flip.variant.percent == pytest.approx(sure)
    assert flip.thumbnail is None


def test_images_wrong_in_two_ways_are_no_flips(make: SimpleNamespace):
    before = make.predictions(wrong=(3,))
    logits = before.logits.copy()
    logits[3] = [0, 0, 9, 0]  # wrong before as circle, wrong now as square

    assert choose(before, replace(before, logits=logits), most=5) == []


def test_of_many_flips_the_clearest_are_shown_and_the_rest_is_counted(make: SimpleNamespace):
    before = make.predictions(wrong=range(20), images=60)
    after = make.predictions(wrong=range(30, 50), images=60)

    found = flips_of(before, after)

    # The higher the number of an image, the surer the model.
    assert [flip.image[-6:-4] for flip in found.shown] == [f"{index}" for index in range(49, 37, -1)]
    assert (found.right_to_wrong, found.wrong_to_right, found.flipped) == (20, 20, 40)


def test_unknown_classes_are_numbered(make: SimpleNamespace):
    before, after = make.predictions(), make.predictions(wrong=(0,))

    (flip,) = flips("nf4", before, after, {}, NO_IMAGES).shown

    assert (flip.label, flip.variant.name) == ("class 0", "class 1")


def test_equal_predictions_and_those_over_other_images_give_none(make: SimpleNamespace):
    before, after = make.predictions(), make.predictions(images=39)

    assert flips_of(before, after) is None
    assert flips_of(before, before) is None


def test_probabilities_do_not_overflow():
    found = softmax(np.array([[1000.0, 1000.0], [-1000.0, 0.0]], np.float32))

    assert found == pytest.approx(np.array([[0.5, 0.5], [0.0, 1.0]]))


def test_pictures_come_from_the_folder_and_its_split(shapes):
    images = open_images(DataSpec(source=str(shapes)), "test")
    thumbnails = Thumbnails(dataset(shapes, "test"))

    uri = thumbnails.of(images.ids[0], images.image_hashes[0])

    assert thumbnails.available
    assert max(picture(uri).size) <= THUMBNAIL_PIXELS
    assert thumbnails.of(images.ids[0], images.image_hashes[0]) is uri


def test_large_pictures_are_made_small(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (900, 300), "red").save(tmp_path / name / "x.png")
    content = (tmp_path / "a" / "x.png").read_bytes()

    uri = Thumbnails(dataset(tmp_path, "all")).of("a/x.png", hashlib.sha256(content).hexdigest())

    assert picture(uri).size == (96, 32)


def test_a_changed_or_unknown_image_has_no_picture(shapes):
    images = open_images(DataSpec(source=str(shapes)), "test")
    thumbnails = Thumbnails(dataset(shapes, "test"))

    assert thumbnails.of(images.ids[0], "another hash") is None
    assert thumbnails.of("../../etc/passwd", images.image_hashes[0]) is None


def test_built_in_digits_have_pictures():
    images = open_images(DataSpec(source="digits"), "test")

    uri = Thumbnails(dataset("digits", "test")).of(images.ids[3], images.image_hashes[3])

    assert picture(uri).size == (96, 96)


@pytest.mark.parametrize("name", ["/no/such/folder", "someone/flowers", "/no/such/folder:test"])
def test_data_that_is_not_here_is_not_fetched(name, monkeypatch):
    monkeypatch.setattr("vitopt.data.images._hub", lambda *_: pytest.fail("asked the hub"))

    assert not Thumbnails(dataset(name, "test")).available


def test_a_folder_that_no_longer_fits_gives_no_pictures(tmp_path):
    assert not Thumbnails(dataset(tmp_path, "test")).available


def test_flips_carry_their_pictures(shapes):
    images = open_images(DataSpec(source=str(shapes)), "test")
    labels = np.array(images.labels)
    right = np.eye(4, dtype=np.float32)[labels]
    before = Predictions(images.ids, images.image_hashes, labels, right)
    wrong = right.copy()
    wrong[5] = np.roll(right[5], 1)

    (flip,) = flips_of(before, replace(before, logits=wrong), Thumbnails(dataset(shapes, "test"))).shown

    assert flip.image == images.ids[5]
    assert picture(flip.thumbnail).format == "JPEG"
