import io
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vitopt.data import shards
from vitopt.data.shards import parts_of
from vitopt.errors import BadImageError, DataError


def png(shade):
    content = io.BytesIO()
    Image.new("L", (3, 2), shade).save(content, "PNG")
    return content.getvalue()


def shades(part):
    images = part.images()
    return [int(np.asarray(images.image(index)).mean()) for index in range(len(images))]


def make_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_files_come_in_parts_of_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FILES_PER_PART", 3)
    paths = []
    for shade in range(7):
        paths.append(tmp_path / f"{shade}.png")
        paths[-1].write_bytes(png(shade))
    parts = list(parts_of(paths))
    assert [shades(part) for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert parts[0].images().ids == tuple(map(str, paths[:3]))


def test_an_archive_gives_its_images_and_nothing_else(tmp_path):
    members = {"a/1.png": png(10), "a/1.json": b"{}", "a/2.PNG": png(20), "b.txt": b"x"}
    path = make_tar(tmp_path / "x.tar", members)
    (part,) = parts_of([path])
    assert shades(part) == [10, 20]
    assert part.images().ids == (f"{path}:a/1.png", f"{path}:a/2.PNG")
    assert part.images().reader.content(0) == members["a/1.png"]


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(99))
    path = make_tar(tmp_path / "x.tar", {"a.png": png(10)})
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        archive.addfile(info)
    (part,) = parts_of([path])
    assert shades(part) == [10]


@pytest.mark.parametrize("hugging_face", [False, True])
def test_each_row_group_is_a_part(tmp_path, hugging_face):
    contents = [png(shade) for shade in range(5)]
    cells = [{"bytes": content, "path": "x"} for content in contents] if hugging_face else contents
    table = pyarrow.table({"label": list(range(5)), "image": cells})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    parts = list(parts_of([tmp_path / "x.parquet"]))
    assert [shades(part) for part in parts] == [[0, 1], [2, 3], [4]]
    assert parts[1].images().ids == tuple(f"{tmp_path / 'x.parquet'}:{row}" for row in (2, 3))
    assert len({part.stamp for part in parts}) == 3


def test_an_empty_cell_is_an_image_that_cannot_be_decoded(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"image": [png(1), None]}), tmp_path / "x.parquet")
    (part,) = parts_of([tmp_path / "x.parquet"])
    with pytest.raises(BadImageError):
        part.images().image(1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_bytes(b"junk"), "cannot be read"),
        (lambda path: make_tar(path, {"a.png": png(1)}, "w:gz"), "uncompressed"),
        (lambda path: make_tar(path, {"a.txt": b"x"}), "no image"),
    ],
)
def test_an_archive_that_gives_no_images_is_named(tmp_path, make, said):
    make(tmp_path / "x.tar")
    (part,) = parts_of([tmp_path / "x.tar"])
    with pytest.raises(DataError, match=said) as error:
        part.images()
    assert "x.tar" in str(error.value)


def test_a_table_without_image_bytes_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"label": [1], "photo": [png(1)]}), tmp_path / "x.parquet")
    assert len(list(parts_of([tmp_path / "x.parquet"], column="photo"))) == 1
    for column, said in (("label", "its column 'label'"), ("other", "no column 'other'")):
        with pytest.raises(DataError, match=said):
            list(parts_of([tmp_path / "x.parquet"], column=column))
    (tmp_path / "y.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"y\.parquet"):
        list(parts_of([tmp_path / "y.parquet"]))


def test_an_archive_that_changed_is_another_part(tmp_path):
    path = make_tar(tmp_path / "x.tar", {"a.png": png(1)})
    (before,) = parts_of([path])
    make_tar(path, {"a.png": png(1), "b.png": png(2)})
    (after,) = parts_of([path])
    assert before.stamp != after.stamp
