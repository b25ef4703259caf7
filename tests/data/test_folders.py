"""Only regular files below the data's own folder are read, whatever links and tables say."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitopt.data.decoding import HubReader
from vitopt.data.folders import Boundary, list_folder
from vitopt.data.images import ImageSet, image_files, open_images
from vitopt.errors import BadImageError, DataError
from vitopt.recipe import DataSpec


def opened(source: Path, **spec: object) -> ImageSet:
    return open_images(DataSpec(source=str(source), **spec), None)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of two images, and an image outside."""
    for name in ("data/cat/a.png", "data/cat/b.png", "data/dog/a.png", "data/dog/b.png", "outside/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path / "data"


def link_file(data: Path) -> None:
    (data / "cat" / "x.png").symlink_to(data.parent / "outside" / "x.png")


def link_class(data: Path) -> None:
    (data / "bird").symlink_to(data.parent / "outside")


def name_absolute_path(data: Path) -> None:
    (data / "metadata.csv").write_text(f"file_name,label\ncat/a.png,cat\n{data.parent}/outside/x.png,dog\n")


def name_parent(data: Path) -> None:
    (data / "metadata.csv").write_text("file_name,label\ncat/a.png,cat\n../outside/x.png,dog\n")


def link_table(data: Path) -> None:
    name_parent(data)
    (data / "metadata.csv").rename(data.parent / "outside" / "metadata.csv")
    (data / "metadata.csv").symlink_to(data.parent / "outside" / "metadata.csv")


@pytest.mark.parametrize("leave", [link_file, link_class, name_absolute_path, name_parent, link_table])
def test_what_leaves_the_folder_is_refused_unless_a_root_holds_both(photos, leave):
    leave(photos)
    with pytest.raises(DataError, match=r"lies outside .*--data-root"):
        opened(photos)
    assert "x.png" in " ".join(opened(photos, root=str(photos.parent)).ids)


def test_links_within_the_folder_are_followed(photos):
    (photos / "cat" / "c.png").symlink_to("../dog/a.png")
    (photos / "bird").symlink_to("dog")
    assert opened(photos).ids == (
        "bird/a.png", "bird/b.png", "cat/a.png", "cat/b.png", "cat/c.png", "dog/a.png", "dog/b.png",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["cat/pipe.png", "pipe.png"])
def test_pipes_are_refused_and_never_opened(photos, name):
    os.mkfifo(photos / name)
    if name == "pipe.png":
        (photos / "metadata.csv").write_text("file_name,label\ncat/a.png,cat\npipe.png,dog\n")
    with pytest.raises(DataError, match=r"pipe\.png is a pipe or a device"):
        opened(photos)
    with pytest.raises(BadImageError, match=r"pipe\.png.* is a pipe or a device"):
        image_files([photos / name])


def test_devices_and_broken_links_are_refused(photos):
    (photos / "cat" / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"zero\.png is a pipe or a device"):
        opened(photos, root="/")
    (photos / "cat" / "zero.png").unlink()
    (photos / "cat" / "round.png").symlink_to("round.png")
    with pytest.raises(DataError, match=r"round\.png does not exist"):
        opened(photos)


def test_a_folder_with_the_name_of_an_image_is_looked_into(photos):
    (photos / "cat" / "more.png").mkdir()
    Image.new("RGB", (4, 4)).save(photos / "cat" / "more.png" / "z.png")
    assert "cat/more.png/z.png" in opened(photos).ids


def test_a_file_of_terabytes_is_refused_unread(photos):
    with (photos / "cat" / "huge.png").open("wb") as stream:
        stream.truncate(2**42)
    with pytest.raises(DataError, match=r"huge\.png has 4,398,046,511,104 bytes"):
        opened(photos)


def test_a_table_of_the_hub_names_files_of_its_cache_only(photos, monkeypatch):
    reader = HubReader([{"image": {"bytes": None, "path": str(photos / "cat" / "a.png")}}], "image")
    with pytest.raises(DataError, match=r"a\.png.* not a file in the hub's cache"):
        reader.content(0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(photos))
    assert reader.content(0) == (photos / "cat" / "a.png").read_bytes()


def test_a_root_that_is_nowhere_or_useless(photos):
    with pytest.raises(DataError, match="/nowhere"):
        opened(photos, root="/nowhere")
    with pytest.raises(DataError, match="root"):
        open_images(DataSpec(source="digits", root="/"), None)


_CELLS = st.sampled_from(
    ["cat/a.png", "../outside/x.png", "/etc/hostname", "dog", "cat", "", "\0", "9" * 5000, "~", "é"]
)
_TABLES = st.lists(st.lists(_CELLS | st.text(max_size=10), max_size=4), max_size=6)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(_TABLES, st.sampled_from(["file_name,label", "label,file_name", "file_name,label,label", "", "x", '"']))
def test_any_table_lists_files_of_the_folder_or_is_refused(tmp_path_factory, rows, header):
    folder = tmp_path_factory.getbasetemp() / "any-table"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "a.png").touch()
    text = "\n".join([header, *(",".join(row) for row in rows)])
    (folder / "metadata.csv").write_text(text, encoding="utf-8")
    try:
        found = list_folder(folder, "data", Boundary(folder), None)
    except DataError as error:
        assert str(folder) in str(error)
        return
    assert all(file.resolve().is_relative_to(folder.resolve()) and file.is_file() for file in found.files)
    assert all(label < len(found.class_names) for label in found.labels)
