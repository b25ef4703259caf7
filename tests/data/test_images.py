import hashlib
import io
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitopt.data.decoding import IMAGE_ENDINGS, MAX_PIXELS, ArrayReader, decoded
from vitopt.data.images import ImageSet, image_files, open_images
from vitopt.errors import BadImageError, DataError
from vitopt.recipe import DataSpec


def opened(source: object, split: str | None = None, **spec: object) -> ImageSet:
    return open_images(DataSpec(source=str(source), **spec), split)


def refusal(source: object, split: str | None = None, **spec: object) -> str:
    """The one line that opening `source` is refused with."""
    with pytest.raises(DataError) as caught:
        opened(source, split, **spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path: Path, grey: int = 0, size: tuple[int, int] = (4, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)
    return path


@pytest.fixture
def classes(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of class folders with so many images each, all different."""

    def make(folder: str = "photos", **counts: int) -> Path:
        for position, (name, count) in enumerate(counts.items()):
            for index in range(count):
                save(tmp_path / folder / name / f"{index:03d}.png", 10 * position, size=(index + 1, 2))
        return tmp_path / folder

    return make


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of four images a.png to d.png with a metadata.csv."""

    def make(text: str | bytes, encoding: str = "utf-8") -> Path:
        for index, name in enumerate("abcd"):
            save(tmp_path / "table" / f"{name}.png", index)
        content = text if isinstance(text, bytes) else text.encode(encoding)
        (tmp_path / "table" / "metadata.csv").write_bytes(content)
        return tmp_path / "table"

    return make


def numbered(labels: list[int], class_names: tuple[str, ...] | None = None, name: str = "set") -> ImageSet:
    """Images in memory with these labels."""
    return ImageSet(
        name=name,
        split=None,
        ids=tuple(f"i{index}" for index in range(len(labels))),
        labels=tuple(labels),
        class_names=class_names,
        reader=ArrayReader(np.arange(4 * len(labels), dtype=np.uint8).reshape(-1, 2, 2)),
        rows=tuple(range(len(labels))),
    )


# groups


FRAMES = "file_name,label,video\na.png,cat,v1\nb.png,dog,v2\nc.png,cat,v1\nd.png,dog,v3\n"


def test_groups_are_a_column_of_the_table_and_stay_with_their_images(table):
    images = opened(table(FRAMES), group_column="video")
    assert images.groups == ("v1", "v2", "v1", "v3")
    assert images.subset([3, 0]).groups == ("v3", "v1")
    assert images.without(["a.png"]).groups == ("v2", "v1", "v3")
    assert opened(table(FRAMES)).groups is None


def test_a_division_keeps_groups_together(tmp_path):
    rows = ["file_name,label,video"]
    for index in range(60):
        save(tmp_path / f"{index}.png", index)
        rows.append(f"{index}.png,{'cat' if index < 30 else 'dog'},v{index // 3}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    train, test = (opened(tmp_path, split, group_column="video") for split in ("train", "test"))
    assert (len(train), len(test)) == (48, 12)
    assert not set(train.groups) & set(test.groups)
    assert "too few groups" in refusal(tmp_path, "test", group_column="label")


@pytest.mark.parametrize(
    ("text", "words"),
    [(FRAMES, "no column 'clip'"), (FRAMES.replace("video", "clip").replace("v2", ""), "line 3: the group")],
)
def test_groups_that_are_not_there(text, words, table):
    assert words in refusal(table(text), group_column="clip")


def test_groups_need_a_table(classes):
    assert "'video'" in refusal(classes(cat=5, dog=5), group_column="video")
    assert "'video'" in refusal("digits", group_column="video")


# class folders


def test_class_folders_are_classes_in_order_of_name(classes):
    images = opened(classes(dog=2, cat=3, Ape=1))
    assert images.class_names == ("Ape", "cat", "dog")
    assert images.ids[:3] == ("Ape/000.png", "cat/000.png", "cat/001.png")
    assert images.labels == (0, 1, 1, 1, 2, 2)
    assert images.split == "all"
    assert images.image(5).size == (2, 2)


def test_nested_hidden_and_empty_folders(classes):
    folder = classes(cat=1, dog=1)
    save(folder / "cat" / "deep" / "er" / "x.JPG")
    save(folder / ".thumbnails" / "x.png")
    (folder / "cat" / "._x.jpg").write_bytes(b"Mac OS X resource fork")
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / "nothing").mkdir()
    images = opened(folder)
    assert images.class_names == ("cat", "dog")
    assert images.ids == ("cat/000.png", "cat/deep/er/x.JPG", "dog/000.png")


@pytest.mark.parametrize("ending", IMAGE_ENDINGS)
def test_every_listed_ending_can_be_read(tmp_path, ending):
    for name in ("a", "b"):
        save(tmp_path / name / f"x{ending}", size=(5, 4))
    images = opened(tmp_path)
    assert [images.image(index).size for index in range(2)] == [(5, 4), (5, 4)]


def test_columns_are_those_of_hub_data(classes):
    assert "'pixels'" in refusal(classes(cat=1, dog=1), image_column="pixels")
    assert "'class'" in refusal("digits", label_column="class")


def test_a_home_folder_is_expanded(classes, monkeypatch):
    folder = classes(cat=1, dog=1)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(opened("~/photos")) == 2


def test_a_folder_without_images(tmp_path):
    (tmp_path / "cat").mkdir()
    assert refusal(tmp_path) == f"{tmp_path} has no images; known endings: {' '.join(IMAGE_ENDINGS)}"


def test_one_class_is_too_few(classes):
    folder = classes(cat=3)
    assert refusal(folder) == (
        f"all 3 images of {folder} are of one class; accuracy needs at least two: "
        "give the folder that holds the class folders"
    )


def test_images_without_labels(tmp_path):
    save(tmp_path / "x.PNG")
    assert refusal(tmp_path) == (
        f"{tmp_path} has images but no labels: put them into one folder per class, "
        "or add a metadata.csv with the columns file_name,label"
    )


def test_a_file_or_nothing_instead_of_a_folder(tmp_path):
    file = save(tmp_path / "x.png")
    assert refusal(file) == f"{file} is a file; data is a folder of images, a hub data set id, or digits"
    assert refusal(tmp_path / "absent") == f"no data at {tmp_path}/absent: the folder does not exist"
    assert refusal("./absent") == "no data at ./absent: the folder does not exist"
    assert refusal("a/b/c") == "no data at a/b/c: the folder does not exist"


# metadata.csv


def test_numbers_of_a_table_are_names_of_classes_in_order_of_value(table):
    images = opened(table("file_name,label\nc.png,10\na.png,2\nb.png,10\nd.png,007\n"))
    assert images.class_names == ("2", "007", "10")
    assert images.ids == ("c.png", "a.png", "b.png", "d.png")
    assert images.labels == (2, 0, 2, 1)
    assert images.image(0).getpixel((0, 0)) == (2, 2, 2)


def test_numbers_count_outputs_where_the_user_says_so(table):
    images = opened(table("file_name,label\nc.png,7\na.png,2\n"), labels="index")
    assert images.class_names is None
    assert images.labels == (7, 2)


def test_numbered_class_folders_count_outputs_too(classes):
    folder = classes(**{"7": 1, "10": 2, "003": 1})
    assert opened(folder).class_names == ("003", "10", "7")
    assert opened(folder, labels="index").labels == (3, 10, 10, 7)


def test_words_cannot_count_outputs(classes):
    line = refusal(classes(cat=1, **{"3": 1}), labels="index")
    assert "'cat'" in line
    assert "--labels index" in line


def test_counted_labels_divide_and_limit_as_named_ones_do(classes):
    folder = classes(**{"7": 10, "10": 10})
    for split, limit in (("train", None), ("test", 3)):
        named, counted = (opened(folder, split, labels=labels, limit=limit) for labels in ("name", "index"))
        assert counted.ids == named.ids
        assert [str(label) for label in counted.labels] == [named.class_names[label] for label in named.labels]


def test_names_of_a_table_are_classes_in_order_of_name(table):
    images = opened(table("note,label,file_name\nx,dog,a.png\ny,cat,b.png\nz, dog ,d.png\n"))
    assert images.class_names == ("cat", "dog")
    assert images.labels == (1, 0, 1)


def test_numbers_among_names_are_names(table):
    assert opened(table("file_name,label\na.png,1\nb.png,x\n")).class_names == ("1", "x")
    assert opened(table("file_name,label\na.png,1\nb.png,²\n")).class_names == ("1", "²")


def test_a_table_as_spreadsheets_write_it(table):
    images = opened(table('\ufefffile_name,label\r\n"a.png","cat, big"\r\nb.png,dog\r\n\r\n'))
    assert images.class_names == ("cat, big", "dog")


def test_a_table_may_name_files_of_the_root_that_is_given(table, tmp_path):
    outside = save(tmp_path / "outside" / "x.png", 9)
    images = opened(table(f"file_name,label\n{outside},0\n../outside/x.png,1\n"), root=str(tmp_path))
    assert images.ids == ("../outside/x.png", "../outside/x.png")
    assert images.image(0).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column file_name and label; it needs file_name,label"),
        ("file_name,class\na.png,1\n", "has no column label; it needs file_name,label"),
        ("file_name;label\na.png;1\n", "has no column file_name and label; it needs file_name,label"),
        ("file_name,label\na.png,1\nabsent.png,2\n", "line 3: absent.png does not exist"),
        ("file_name,label\na.png,\n", "line 2: the file name or the label is empty"),
        ("file_name,label\na.png,1\nb.png\n", "line 3: the file name or the label is empty"),
        ("file_name,label\n,1\n", "line 2: the file name or the label is empty"),
        ("file_name,label\n.,1\n", "line 2: . lies outside"),
        ("file_name,label,label\na.png,1,2\n", "two columns 'label'"),
        ("file_name,label\na.png,small, brown\n", "line 2: it has more cells than columns"),
        (f"file_name,label\n{'x' * 5000},1\n", "does not exist"),
        ("file_name,label\na.png,größe\n".encode("latin-1"), "is not comma-separated text in UTF-8"),
        (b'file_name,label\na.png,"' + b"x" * 200_000, "is not comma-separated text in UTF-8"),
    ],
)
def test_broken_tables(table, text, words):
    folder = table(text)
    line = refusal(folder)
    assert line.startswith(f"{folder}/metadata.csv ")
    assert words in line


def test_a_table_without_rows_has_no_images(table):
    assert "has no images" in refusal(table("file_name,label\n"))


# splits


def test_the_split_meant_for_testing_is_taken_first(shapes):
    images = opened(shapes)
    assert (images.split, len(images)) == ("test", 24)
    assert images.class_names == ("circle", "cross", "square", "stripe")
    assert Counter(images.labels) == {0: 6, 1: 6, 2: 6, 3: 6}
    assert images.ids[0] == "circle/00.png"


def test_a_split_is_named_behind_a_colon_or_by_the_caller(shapes):
    assert len(opened(f"{shapes}:train")) == 32
    assert len(opened(shapes, "train")) == 32
    # What the user wrote wins.
    assert opened(f"{shapes}:train", "test").split == "train"


def test_an_unknown_split_lists_those_there_are(shapes):
    assert refusal(f"{shapes}:dev") == f"{shapes} has no split 'dev'; it has test, train"
    assert refusal(shapes, "all") == f"{shapes} has no split 'all'; it has test, train"


def test_validation_stands_in_for_test(classes):
    folder = classes("set/val", cat=1, dog=1).parent
    classes("set/train", cat=2, dog=2)
    assert opened(folder).split == "val"


def test_training_images_are_not_tested_on_unasked(classes):
    folder = classes("set/train", cat=1, dog=1).parent
    assert refusal(folder) == f"{folder} has no test split, only train; name one as {folder}:train"


def test_splits_may_be_capitalised_and_have_tables(classes, table):
    folder = classes("set/Train", cat=2, dog=2).parent
    shutil.copytree(table("file_name,label\na.png,0\nb.png,1\n"), folder / "Test")
    (folder / "docs").mkdir()
    save(folder / "docs" / "figure.png")
    assert opened(folder).ids == ("a.png", "b.png")
    assert len(opened(folder, "train")) == 4
    assert len(opened(f"{folder}:Train")) == 4


def test_a_class_may_be_called_train(classes):
    images = opened(classes(car=1, train=2, plane=1))
    assert images.class_names == ("car", "plane", "train")
    assert images.labels == (0, 1, 2, 2)


def test_splits_without_labels_are_not_taken_for_classes(tmp_path):
    save(tmp_path / "train" / "x.png")
    save(tmp_path / "test" / "x.png")
    assert "has images but no labels" in refusal(tmp_path)


def test_a_folder_without_splits_divides_by_class(classes):
    folder = classes(cat=10, dog=25, emu=7)
    train, test, whole = (opened(folder, split) for split in ("train", "test", "all"))
    assert (train.split, test.split, whole.split) == ("train", "test", "all")
    assert not set(train.ids) & set(test.ids)
    assert set(train.ids) | set(test.ids) == set(whole.ids)
    assert Counter(test.labels) == {0: 2, 1: 5, 2: 1}
    assert Counter(train.labels) == {0: 8, 1: 20, 2: 6}
    assert opened(f"{folder}:test").ids == test.ids
    assert test.sha256 == opened(folder, "test").sha256


def test_too_few_images_to_divide(classes):
    folder = classes(cat=9, dog=4)
    assert refusal(f"{folder}:test") == (
        f"{folder} has too few images to divide: at least two classes must have 5 each; "
        f"add images, or take them all as {folder}:all"
    )
    assert len(opened(folder, "train")) == 12
    assert len(opened(f"{folder}:all")) == 13


def test_small_classes_are_divided_as_one_where_labels_count_outputs(classes):
    folder = classes(**{"0": 2, "1": 1, "2": 5, "3": 20})
    train, test = (opened(folder, split, labels="index", test_share=0.25) for split in ("train", "test"))
    assert (len(train), len(test)) == (22, 6)
    assert Counter(test.labels)[3] == 5 and Counter(test.labels)[2] == 1  # large enough to give their own share
    assert not set(train.ids) & set(test.ids)
    alone = classes("alone", **{f"{number}": 1 for number in range(40)})
    assert len(opened(alone, "test", labels="index")) == 8
    assert "too few" in refusal(alone, "test")


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_that_is_tested_can_be_set(classes, share):
    folder = classes(cat=20, dog=40)
    assert Counter(opened(folder, "test", test_share=share).labels) == {0: 20 * share, 1: 40 * share}


def test_a_divided_folder_has_two_splits(classes):
    folder = classes(cat=5, dog=5)
    assert refusal(folder, "val") == (f"{folder} has no split 'val'; it divides into train and test, or take all")


# digits


def test_digits():
    from sklearn.datasets import load_digits

    source = load_digits()
    whole, train, test = opened("digits"), opened("digits:train"), opened("digits", "test")
    assert (len(whole), whole.split) == (1797, "all")
    assert len(train) + len(test) == 1797
    assert not set(train.ids) & set(test.ids)
    per_class = Counter(source.target.tolist())
    assert Counter(test.labels) == {digit: count * 45 // 100 for digit, count in per_class.items()}
    assert whole.class_names == tuple("0123456789")
    assert whole.labels == tuple(source.target)
    expected = np.repeat(np.round(source.images[7] * 255 / 16)[..., None], 3, axis=2)
    assert np.array_equal(np.asarray(whole.image(7)), expected)
    assert refusal("digits:dev") == "digits has no split 'dev'; it divides into train and test, or take all"


# limit


def test_a_limit_spreads_over_the_classes(classes):
    folder = classes(cat=9, dog=2, emu=4)
    images = opened(folder, limit=7)
    assert Counter(images.labels) == {0: 3, 1: 2, 2: 2}
    assert list(images.ids) == sorted(images.ids)
    assert images.ids[0] == "cat/000.png"
    assert images.image(2).size == (3, 2)
    assert len(opened(folder, limit=15)) == len(opened(folder, limit=99)) == 15
    assert opened(folder, limit=1).ids == ("cat/000.png",)


def test_leaving_images_out_by_name():
    images = numbered([0, 1, 2])
    assert images.without(["i1", "absent"]).labels == (0, 2)
    assert images.without([]) is images


# hub data sets


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset`: gives a value or raises it."""
    import datasets

    def answer(value: object) -> None:
        def load(source: str) -> object:
            assert source == "owner/set"
            if isinstance(value, Exception):
                raise value
            return value

        monkeypatch.setattr(datasets, "load_dataset", load)

    return answer


def hub_splits(labels: dict[str, list[object]], feature: object = None, **columns: object) -> object:
    """An in-memory DatasetDict of PNG images, one grey level per row."""
    import datasets

    def encode(grey: int) -> dict[str, object]:
        stream = io.BytesIO()
        Image.new("L", (3, 2), grey).save(stream, "PNG")
        return {"bytes": stream.getvalue(), "path": None}

    feature = feature or datasets.ClassLabel(names=["cat", "dog"])
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"picture": [encode(10 * row) for row in range(len(values))], "kind": values},
                features=datasets.Features({"picture": datasets.Image(), "kind": feature}),
            )
            for split, values in labels.items()
        }
    )


def test_a_hub_that_cannot_be_reached_is_one_clear_line(hub):
    hub(ConnectionError("Couldn't reach\n  'owner/set'\non the Hub (offline)"))
    assert refusal("owner/set:test") == (
        "no folder named 'owner/set', and the Hugging Face hub gave no data set of that name "
        "(Couldn't reach 'owner/set' on the Hub (offline)); check the spelling and the network, "
        "or download it and give its folder"
    )


def test_a_hub_data_set(hub):
    hub(hub_splits({"train": [0, 1, 1], "test": [1, 0]}))
    images = opened("owner/set")
    assert (images.name, images.split, images.class_names) == ("owner/set", "test", ("cat", "dog"))
    assert images.labels == (1, 0)
    assert images.ids == ("test-000000", "test-000001")
    assert images.image(1).mode == "RGB"
    assert images.image(1).getpixel((0, 0)) == (10, 10, 10)
    assert len(opened("owner/set", "train")) == 3
    assert refusal("owner/set:dev") == "owner/set has no split 'dev'; it has train, test"


def test_hub_images_are_hashed_as_files_are(hub, tmp_path):
    hub(hub_splits({"test": [0, 1]}))
    images = opened("owner/set")
    for index, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(images.reader.content(index))
    assert opened(tmp_path).sha256 == images.sha256


def test_hub_columns_are_found_or_named(hub):
    import datasets

    hub(hub_splits({"test": [3, 5]}, datasets.Value("int64")))
    assert refusal("owner/set") == (
        "owner/set: cannot tell which column is meant (picture, kind); set data.label_column in the recipe"
    )
    images = opened("owner/set", label_column="kind")
    assert (images.labels, images.class_names) == ((0, 1), ("3", "5"))
    images = opened("owner/set", label_column="kind", labels="index")
    assert (images.labels, images.class_names) == ((3, 5), None)
    assert refusal("owner/set", label_column="x") == "owner/set has no column 'x'; it has picture, kind"
    assert refusal("owner/set", label_column="kind", image_column="kind") == (
        "column 'kind' of owner/set holds no images; set data.image_column in the recipe"
    )


def test_the_numbers_behind_a_hubs_names_may_count_outputs(hub):
    hub(hub_splits({"test": [1, 0]}))
    images = opened("owner/set", labels="index")
    assert (images.labels, images.class_names) == ((1, 0), None)


def test_hub_labels_may_be_words(hub):
    import datasets

    hub(hub_splits({"test": ["dog", "cat", "dog"]}, datasets.Value("string")))
    images = opened("owner/set", label_column="kind")
    assert (images.labels, images.class_names) == ((1, 0, 1), ("cat", "dog"))


@pytest.mark.parametrize("labels", [[0, -1], [0, None]])
def test_hub_splits_without_labels_are_refused(hub, labels):
    hub(hub_splits({"test": labels}))
    assert refusal("owner/set") == (
        "owner/set:test has images without a label in column 'kind'; take a split whose labels are known"
    )


def test_hub_labels_that_are_no_classes_are_refused(hub):
    import datasets

    hub(hub_splits({"test": [0.5, 1.5]}, datasets.Value("float32")))
    assert refusal("owner/set", label_column="kind") == (
        "column 'kind' of owner/set:test holds no classes; set data.label_column in the recipe"
    )


def test_an_empty_image_cell_of_the_hub_is_a_bad_image(hub):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": [None, None], "label": [0, 1]}, features=features)
    hub(datasets.DatasetDict({"test": rows}))
    with pytest.raises(BadImageError, match=r"image test-000001 cannot be decoded \(not an image\)"):
        opened("owner/set").image(1)


# decoding


def decode(path: Path) -> np.ndarray:
    return np.asarray(image_files([path]).image(0))


def bad(path: Path) -> str:
    with pytest.raises(BadImageError) as caught:
        decode(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert "leave it out with --skip-bad-images" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("L", (2, 2), 200), (200, 200, 200)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 128)), (10, 20, 30)),
        (Image.new("LA", (2, 2), (70, 0)), (70, 70, 70)),
        (Image.new("RGB", (2, 2), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE), (10, 200, 30)),
        # 16 bits are scaled, not cut off.
        (Image.fromarray(np.full((2, 2), 100 * 257, np.uint16)), (100, 100, 100)),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), (255, 255, 255)),
    ],
    ids=["grey", "1 bit", "RGBA", "LA", "palette", "16 bit", "16 bit white"],
)
def test_all_modes_become_rgb(tmp_path, image, pixel):
    image.save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png").tolist() == [[list(pixel)] * 2] * 2


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "x.tif")
    assert decode(tmp_path / "x.tif").tolist() == [[[255, 0, 0]] * 2] * 2


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_32_bit_pixels_have_no_known_range(tmp_path, kind):
    Image.fromarray(np.ones((2, 2), kind)).save(tmp_path / "x.tif")
    assert "its pixels are 32-bit numbers of unknown range; save it with 8 or 16 bits" in bad(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_images_are_turned_upright(tmp_path, mode):
    wide = np.zeros((2, 3), np.uint16)
    wide[0, 0] = 255 * 257
    image = Image.fromarray(wide) if mode == "I;16" else Image.fromarray((wide // 257).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: rotate by a quarter clockwise
    image.save(tmp_path / "x.png", exif=exif)
    upright = decode(tmp_path / "x.png")
    assert upright.shape == (3, 2, 3)
    assert np.argwhere(upright[..., 0]).tolist() == [[0, 1]]


def test_a_truncated_image(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    assert "cannot be decoded (image file is truncated" in bad(path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\xff\xd8\xff"])
def test_what_is_no_image(tmp_path, content):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    assert bad(path) == (
        f"image {path} cannot be decoded (not an image): replace it, or leave it out with --skip-bad-images"
    )


@pytest.mark.parametrize("error", [struct.error("unpack requires 4 bytes"), EOFError("end"), TypeError("a\nb")])
def test_whatever_a_decoder_stumbles_over_is_a_bad_image(error):
    class Stumbling:
        def content(self, index: int) -> bytes:
            return b""

        def image(self, index: int) -> Image.Image:
            raise error

    images = replace(numbered([0]), reader=Stumbling())
    with pytest.raises(BadImageError) as caught:
        images.image(0)
    reason = str(error).replace("\n", " ")
    assert str(caught.value) == (
        f"image i0 cannot be decoded ({reason}): replace it, or leave it out with --skip-bad-images"
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 15_000])
def test_images_with_too_many_pixels(tmp_path, side):
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    assert path.stat().st_size < 100_000
    line = bad(path)
    assert str(path) in line and "safe" in line
    if side == 10_000:
        assert "cannot be decoded (100 megapixels, more than the 89 that are safe to decode)" in line


def test_as_many_pixels_as_are_safe_are_not_too_many(monkeypatch, tmp_path):
    import vitopt.data.decoding as module

    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(module, "MAX_PIXELS", 12)
    assert decode(save(tmp_path / "x.png", size=(4, 3))).shape == (3, 4, 3)
    assert "(0 megapixels, more than" in bad(save(tmp_path / "y.png", size=(13, 1)))


def test_an_image_that_vanishes_is_named(tmp_path):
    path = save(tmp_path / "x.png")
    images = image_files([path])
    path.unlink()
    with pytest.raises(BadImageError, match=r"x\.png cannot be decoded .*No such file"):
        images.image(0)


def test_image_files(tmp_path):
    path = save(tmp_path / "x.png", 5)
    images = image_files([path, path])
    assert (images.ids, len(images)) == ((str(path), str(path)), 2)
    with pytest.raises(BadImageError) as caught:
        image_files([path, tmp_path / "absent.png"])
    assert str(caught.value) == f"no image at {tmp_path}/absent.png"
    with pytest.raises(BadImageError, match=f"no image at {tmp_path}: it is a folder"):
        image_files([tmp_path])


# formats


@pytest.fixture
def fake_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `gs` that comes first on the path and leaves a trace, whose place is given."""
    from PIL import EpsImagePlugin

    trace = tmp_path / "it-ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return trace


def postscript(path: Path) -> Path:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "EPS")
    path.write_bytes(stream.getvalue())
    return path


def test_postscript_never_starts_ghostscript(tmp_path, fake_ghostscript, hub):
    import datasets

    path = postscript(tmp_path / "x.jpg")
    with pytest.raises(OSError):
        Image.open(path).load()
    assert fake_ghostscript.exists()  # Pillow by itself does start it
    fake_ghostscript.unlink()
    assert "not an image" in bad(path)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    cell = {"bytes": path.read_bytes(), "path": None}
    rows = datasets.Dataset.from_dict({"image": [cell, cell], "label": [0, 1]}, features=features)
    hub(datasets.DatasetDict({"test": rows}))
    with pytest.raises(BadImageError, match="not an image"):
        opened("owner/set").image(0)
    assert not fake_ghostscript.exists()


@pytest.mark.parametrize("format", ["ICNS", "TGA", "PCX", "SGI", "IM"])
def test_formats_that_no_listed_ending_stands_for_are_not_decoded(tmp_path, format):
    path = tmp_path / "x.png"
    with path.open("wb") as stream:
        Image.new("RGB", (16, 16)).save(stream, format)
    Image.open(path).load()  # Pillow by itself does decode it
    assert "not an image" in bad(path)


def test_a_listed_format_under_another_listed_ending_is_fine(tmp_path):
    with (tmp_path / "x.png").open("wb") as stream:
        Image.new("RGB", (5, 4)).save(stream, "JPEG")
    assert decode(tmp_path / "x.png").shape == (4, 5, 3)


# hashes


def test_the_hash_is_that_of_contents_and_labels(classes):
    images = opened(classes(cat=1, dog=1))
    contents = [images.reader.content(index) for index in range(2)]
    hashes = [hashlib.sha256(content).hexdigest() for content in contents]
    assert images.image_hashes == tuple(hashes)
    assert images.sha256 == hashlib.sha256(f"{hashes[0]} 0\n{hashes[1]} 1\n".encode()).hexdigest()


def test_the_hash_follows_contents_and_labels_not_places(classes, tmp_path):
    folder = classes(cat=2, dog=2)
    before = opened(folder).sha256
    moved = folder.rename(tmp_path / "moved")
    assert opened(moved).sha256 == before
    content = bytearray((moved / "cat" / "001.png").read_bytes())
    content[-1] ^= 1
    (moved / "cat" / "001.png").write_bytes(content)
    changed = opened(moved).sha256
    assert changed != before
    (moved / "cat" / "001.png").rename(moved / "dog" / "0.png")
    assert opened(moved).sha256 not in (before, changed)


def test_equal_images_with_other_labels_have_another_hash():
    assert numbered([0, 1]).sha256 != numbered([1, 0]).sha256
    assert numbered([0, 1]).sha256 == numbered([0, 1], ("a", "b"), name="other").sha256


def test_a_subset_has_the_hash_of_its_own_images():
    images = numbered([0, 1, 2])
    assert images.subset([2, 0]).image_hashes == (images.image_hashes[2], images.image_hashes[0])


def test_a_part_of_the_training_images_can_be_held_out(classes):
    folder = classes(cat=50, dog=25)
    train, held = (opened(folder, split, held_out=0.2) for split in ("train", "held-out"))
    whole, test = opened(folder, "train"), opened(folder, "test", held_out=0.2)
    assert Counter(held.labels) == {0: 8, 1: 4} and len(train) == len(whole) - 12
    assert not set(train.ids) & set(held.ids) and set(train.ids) | set(held.ids) == set(whole.ids)
    assert test.ids == opened(folder, "test").ids
    assert "held_out" in refusal(folder, "held-out")


def smooth(width: int, height: int) -> Image.Image:
    ramps = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 120, width)).astype(np.uint8)
    return Image.fromarray(np.stack([ramps, ramps[::-1], ramps[:, ::-1]], axis=-1))


@pytest.mark.parametrize(
    ("ending", "smallest_side", "size"),
    [
        ("jpg", None, (640, 480)),
        ("jpg", 241, (640, 480)),
        ("jpg", 240, (320, 240)),
        ("jpg", 100, (160, 120)),
        ("jpg", 60, (80, 60)),
        ("jpg", 1, (80, 60)),
        ("png", 60, (640, 480)),
    ],
)
def test_a_jpeg_is_decoded_at_a_fraction_that_keeps_the_smallest_side(tmp_path, ending, smallest_side, size):
    path = tmp_path / f"x.{ending}"
    smooth(640, 480).save(path, quality=95)
    image = image_files([path]).image(0, smallest_side=smallest_side)
    assert image.size == size
    expected = np.asarray(smooth(640, 480).resize(size, Image.Resampling.BOX), dtype=int)
    assert np.abs(np.asarray(image, dtype=int) - expected).max() < 12


def test_the_limit_of_pixels_is_that_of_the_file_at_any_fraction(tmp_path):
    path = tmp_path / "x.jpg"
    smooth(100, 80).save(path)
    with pytest.raises(BadImageError, match="megapixels"):
        decoded(lambda: Image.open(path), 5000, smallest_side=10)
