"""Labels against a head: the exact name first, and no guess where two things could be meant."""

import json
from pathlib import Path

import pytest

from vitopt.data.images import ImageSet, image_files
from vitopt.data.labels import as_indices, classes_of, fit_labels
from vitopt.errors import DataError


def numbered(labels: list[int], class_names: tuple[str, ...] | None = None) -> ImageSet:
    """Images with these labels, which nothing decodes."""
    return ImageSet(
        name="set",
        split=None,
        ids=tuple(f"i{index}" for index in range(len(labels))),
        labels=tuple(labels),
        class_names=class_names,
        reader=image_files([]).reader,
        rows=tuple(range(len(labels))),
    )


def named(*classes: str) -> ImageSet:
    """One image of each class."""
    return numbered(list(range(len(classes))), classes)


def refusal(images: ImageSet, head: list[str]) -> str:
    with pytest.raises(DataError) as caught:
        fit_labels(images, head)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def imagenet(shared: Path) -> list[str]:
    """The names of a real head of 1,000 outputs."""
    config = json.loads((shared / "models" / "vit-tiny-patch16-224" / "config.json").read_text())
    return [config["id2label"][str(index)] for index in range(1000)]


# classes of labels


def test_words_are_ordered_by_name_and_numbers_by_value():
    assert classes_of(["dog", "cat", "dog"]) == ([1, 0, 1], ("cat", "dog"))
    assert classes_of(["10", "9", "10"]) == ([1, 0, 1], ("9", "10"))
    assert classes_of(["10", "9", "x"]) == ([0, 1, 2], ("10", "9", "x"))
    assert classes_of([]) == ([], ())


def test_indices_that_are_indices_already():
    images = numbered([3, 1])
    assert as_indices(images) is images


# names


def test_named_classes_are_matched_by_name():
    images = numbered([0, 1, 2], ("African_elephant", "Zebra", "sea-lion"))
    fitted = fit_labels(images, ["zebra", "Sea Lion", "unused", "african elephant"])
    assert fitted.labels == (3, 0, 1)
    assert fitted.class_names == ("zebra", "Sea Lion", "unused", "african elephant")


def test_an_unknown_class_is_named():
    with pytest.raises(DataError) as caught:
        fit_labels(numbered([0, 1], ("cat", "yeti")), ["cat", "dog", "emu", "fox"])
    assert str(caught.value) == (
        "set has the class 'yeti', which the model's head does not know (4 classes: cat, dog, emu, ...): "
        "name the class folders as the model does, or fine-tune the model on these classes first"
    )


def test_a_head_with_placeholder_names_takes_classes_by_position():
    fitted = fit_labels(numbered([1, 0], ("cat", "dog")), ["LABEL_0", "LABEL_1"])
    assert fitted.labels == (1, 0)
    with pytest.raises(DataError, match="has the class 'cat', which the model's head does not know"):
        fit_labels(numbered([1, 0], ("cat", "dog")), ["LABEL_0", "LABEL_1", "LABEL_2"])


def test_classes_named_like_placeholders_are_matched_by_name():
    heads = [f"LABEL_{index}" for index in range(11)]
    folders = tuple(sorted(heads))  # LABEL_10 stands before LABEL_2
    fitted = fit_labels(numbered(list(range(11)), folders), heads)
    assert [heads[label] for label in fitted.labels] == list(folders)


def test_counted_labels_are_positions_of_the_head():
    names = [f"class {index}" for index in range(8)]
    fitted = fit_labels(numbered([7, 0, 3]), names)
    assert fitted.labels == (7, 0, 3)
    assert fitted.class_names == tuple(names)


def test_counted_labels_beyond_the_head():
    with pytest.raises(DataError) as caught:
        fit_labels(numbered([0, 4]), ["a", "b", "c", "d"])
    assert str(caught.value) == (
        "set has label 4, but the model's head has 4 classes (0 to 3): "
        "use a model trained for these labels, or fine-tune one"
    )


# ambiguity


def test_the_exact_name_comes_before_a_similar_one():
    head = ["Cardigan", "cardigan", "sea lion"]
    assert fit_labels(named("cardigan", "Cardigan", "Sea_Lion"), head).labels == (1, 0, 2)
    assert fit_labels(named("cardigan", "sea lion"), head).labels == (1, 2)


def test_a_similar_name_that_fits_two_outputs_is_refused():
    line = refusal(named("CARDIGAN", "sea lion"), ["Cardigan", "cardigan", "sea lion"])
    assert "'CARDIGAN'" in line
    assert "0 ('Cardigan') and 1 ('cardigan')" in line
    assert "spell it exactly" in line


def test_a_name_that_two_outputs_have_is_refused():
    line = refusal(named("bird", "crane"), ["crane", "bird", "crane"])
    assert "0 ('crane') and 2 ('crane')" in line
    assert "--labels index" in line
    assert "labels: index" in line


def test_two_classes_on_one_output_are_refused():
    line = refusal(named("sea lion", "sea_lion", "zebra"), ["Sea Lion", "zebra"])
    assert "'sea lion' and 'sea_lion'" in line
    assert "output 0, 'Sea Lion'" in line
    assert "'Sea_Lion' and" in refusal(named("Sea_Lion", "sea lion"), ["sea lion", "zebra"])


def test_only_classes_with_images_matter():
    head = ["crane", "dog", "crane", "zebra"]
    images = numbered([1, 3], ("crane", "dog", "yeti", "zebra"))
    assert fit_labels(images, head).labels == (1, 3)


def test_a_real_head_with_double_names(imagenet):
    assert fit_labels(named("Cardigan", "cardigan", "goldfish"), imagenet).labels == (264, 474, 1)
    assert "134 ('crane') and 517 ('crane')" in refusal(named("crane", "goldfish"), imagenet)
    assert "638 ('maillot') and 639 ('maillot')" in refusal(named("goldfish", "Maillot"), imagenet)
    unique = tuple(name for name in imagenet if imagenet.count(name) == 1)
    assert len(unique) == 996
    assert fit_labels(named(*unique), imagenet).labels == tuple(map(imagenet.index, unique))


# numbers


def test_numbers_are_not_taken_for_positions_unasked():
    line = refusal(named("0", "1", "2"), ["tench", "goldfish", "shark", "ray"])
    assert "--labels index" in line
    assert "labels: index" in line
    assert "fine-tune" in line


def test_numbers_that_the_head_itself_uses_are_names():
    assert fit_labels(named("0", "2", "9"), [str(digit) for digit in reversed(range(10))]).labels == (9, 7, 0)
    assert "--labels index" not in refusal(named("0", "77"), ["0", "1"])
