"""Which part of `NAME:SPLIT` is the data set and which the split."""

from pathlib import Path

import pytest
from conftest import CLASSES, make_images

from vitopt.data.images import ImageSet, open_images
from vitopt.data.sources import may_be_on_hub, parse_source
from vitopt.errors import DataError
from vitopt.recipe import DataSpec


def opened(source: str, split: str | None = None) -> ImageSet:
    return open_images(DataSpec(source=source), split)


@pytest.mark.parametrize(
    ("text", "source", "split"),
    [
        ("photos", "photos", None),
        ("photos:test", "photos", "test"),
        ("owner/photos:train.extra", "owner/photos", "train.extra"),
        ("a:b:test", "a:b", "test"),
        (r"C:\photos", r"C:\photos", None),
        (r"C:\photos:test", r"C:\photos", "test"),
        ("photos:/test", "photos:/test", None),
        ("photos:", "photos:", None),
        (":test", ":test", None),
    ],
)
def test_the_last_colon_names_a_split_where_a_split_may_follow(text: str, source: str, split: str | None) -> None:
    assert parse_source(text) == (source, split)


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A folder `frames:2024` of class folders without splits."""
    return make_images(tmp_path, {"frames:2024": 10}) / "frames:2024"


def test_a_folder_that_exists_keeps_its_colon(frames: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_source(str(frames)) == (str(frames), None)
    monkeypatch.setenv("HOME", str(frames.parent))
    assert parse_source("~/frames:2024") == ("~/frames:2024", None)
    assert len(opened(str(frames), "test")) == 2 * len(CLASSES)
    assert len(opened("~/frames:2024:train")) == 8 * len(CLASSES)


def test_a_folder_with_a_colon_takes_a_split_behind_another(frames: Path) -> None:
    images = opened(f"{frames}:test")
    assert (images.name, images.split, len(images)) == (str(frames), "test", 2 * len(CLASSES))
    with pytest.raises(DataError, match="no split 'dev'"):
        opened(f"{frames}:dev")


@pytest.mark.parametrize("text", [r"C:\photos", r"C:\photos:test", "./frames:2024", "a b:c", "photos:", "a:b:test"])
def test_what_is_no_folder_and_no_hub_id_is_one_line_that_names_it(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="folder") as caught:
        opened(text)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["mnist", "uoft-cs/cifar10", "a.b/c_d"])
def test_names_and_owned_names_may_be_on_the_hub(source: str) -> None:
    assert may_be_on_hub(source)


@pytest.mark.parametrize("source", ["./a", "/a", "~/a", "a/b/c", r"C:\a", "a b", "a:", ""])
def test_paths_are_not_on_the_hub(source: str) -> None:
    assert not may_be_on_hub(source)
