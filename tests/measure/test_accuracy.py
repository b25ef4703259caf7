"""Accuracy of subjects that do what the test says, over real image files."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from vitopt.data.images import ImageSet, open_images
from vitopt.errors import BadImageError, DataError, RecordError
from vitopt.measure.accuracy import adjusted, compare, predict, summarise
from vitopt.measure.predictions import Predictions
from vitopt.recipe import DataSpec

CLASSES = 4


def pixels_of(image: Image.Image) -> torch.Tensor:
    """(3, 32, 32), as a checkpoint's own processor would give."""
    resized = np.asarray(image.resize((32, 32)), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(resized).permute(2, 0, 1)


class Fake:
    """A subject whose logits are the mean colours of each image, and whatever `spoil` makes of them."""

    device = torch.device("cpu")

    def __init__(
        self,
        name: str = "fake",
        compiled: bool = False,
        spoil: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        fits: int = 10**9,
    ):
        self.name, self.fixed_shapes, self.spoil, self.fits = name, compiled, spoil, fits
        self.preprocess = pixels_of
        self.full: Exception = torch.OutOfMemoryError("CUDA out of memory")
        self.batches: list[int] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > self.fits:
            raise self.full
        self.batches.append(len(pixels))
        logits = torch.cat([pixels.mean((2, 3)), pixels.std((1, 2, 3)).unsqueeze(1)], dim=1)
        return self.spoil(len(self.batches), logits) if self.spoil else logits


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    """24 images, 6 of each class."""
    return open_images(DataSpec(source=str(shapes)), "test")


def expected_logits(images: ImageSet) -> np.ndarray:
    """The fake's logits from the pixels themselves: 32 x 32 needs no resizing."""
    pixels = np.stack([np.asarray(images.image(i), np.float64) / 127.5 - 1 for i in range(len(images))])
    return np.concatenate([pixels.mean((1, 2)), pixels.std((1, 2, 3), ddof=1, keepdims=True)[:, 0, 0]], axis=1)


@pytest.mark.parametrize("batch_size", [1, 7, 24, 100])
def test_every_image_is_seen_once_in_order(batch_size: int, images: ImageSet, shapes: Path) -> None:
    subject = Fake()
    outcome = predict([subject], images, batch_size=batch_size)
    got = outcome.predictions["fake"]
    np.testing.assert_allclose(got.logits, expected_logits(images), rtol=1e-4, atol=1e-5)
    assert got.ids == tuple(f"{kind}/{n:02d}.png" for kind in ("circle", "cross", "square", "stripe") for n in range(6))
    assert got.labels.tolist() == [label for label in range(4) for _ in range(6)]
    assert got.image_sha256[5] == hashlib.sha256((shapes / "test" / got.ids[5]).read_bytes()).hexdigest()
    assert sum(subject.batches) == 24 and max(subject.batches) <= batch_size
    assert (outcome.failures, outcome.skipped) == ({}, ())


def test_a_compiled_subject_sees_one_shape_only_and_answers_the_same(images: ImageSet) -> None:
    plain, compiled = Fake("plain"), Fake("compiled", compiled=True)
    outcome = predict([plain, compiled], images, batch_size=10)
    assert plain.batches == [10, 10, 4]
    assert compiled.batches == [10, 10, 10]
    np.testing.assert_array_equal(outcome.predictions["compiled"].logits, outcome.predictions["plain"].logits)


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    full: Exception, images: ImageSet, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = Fake("small", fits=4), Fake("large")
    small.full = full
    outcome = predict([small, large], images, batch_size=16)
    assert small.batches == [4] * 6 and large.batches == [16, 8]
    np.testing.assert_array_equal(outcome.predictions["small"].logits, outcome.predictions["large"].logits)
    assert outcome.failures == {}
    assert outcome.notes == {"small": ["accuracy ran in batches of 4: 16 images did not fit the memory"]}
    assert caplog.messages == [
        "small: batch 16 does not fit the memory; going on with 8",
        "small: batch 8 does not fit the memory; going on with 4",
    ]


def test_a_compiled_subject_keeps_to_the_halved_shape(images: ImageSet) -> None:
    plain, compiled = Fake("plain"), Fake("compiled", compiled=True, fits=5)
    outcome = predict([plain, compiled], images, batch_size=10)
    # 10, 10 and 4 images in fives, the last four filled up
    assert compiled.batches == [5] * 5
    np.testing.assert_array_equal(outcome.predictions["compiled"].logits, outcome.predictions["plain"].logits)


def test_a_model_of_which_not_one_image_fits_fails_alone(images: ImageSet) -> None:
    outcome = predict([Fake("none", fits=0), Fake("good")], images, batch_size=6)
    assert outcome.failures == {"none": "out of memory: not even one image fits"}
    assert set(outcome.predictions) == {"good"}


def test_other_errors_are_not_answered_with_smaller_batches(images: ImageSet) -> None:
    picky = Fake("picky", fits=4)
    picky.full = RuntimeError("no kernel for this shape")
    outcome = predict([picky], images, batch_size=8)
    assert outcome.failures == {"picky": "RuntimeError: no kernel for this shape"} and outcome.notes == {}


def raises_in_second_batch(batch: int, logits: torch.Tensor) -> torch.Tensor:
    if batch == 2:
        raise RuntimeError("this kernel\ncannot do that")
    return logits


def test_one_failing_subject_leaves_the_others(images: ImageSet) -> None:
    good, bad, also_good = Fake("good"), Fake("bad", spoil=raises_in_second_batch), Fake("also good")
    outcome = predict([good, bad, also_good], images, batch_size=8)
    assert outcome.failures == {"bad": "RuntimeError: this kernel cannot do that"}
    assert bad.batches == [8, 8]  # not asked again
    assert set(outcome.predictions) == {"good", "also good"}
    np.testing.assert_array_equal(outcome.predictions["good"].logits, outcome.predictions["also good"].logits)
    assert len(outcome.predictions["good"].labels) == 24


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_the_image_and_a_remedy(value: float, images: ImageSet) -> None:
    def spoil(batch: int, logits: torch.Tensor) -> torch.Tensor:
        if batch == 2:
            logits[1, 2] = logits[3, 0] = value
        return logits

    outcome = predict([Fake("broken", spoil=spoil), Fake("good")], images, batch_size=8)
    assert outcome.failures == {
        "broken": "logits are not finite, first for image cross/03.png: the 16-bit type overflows; "
        "try half: bf16 or skip layers"
    }
    assert set(outcome.predictions) == {"good"}


@pytest.fixture
def with_bad(shapes: Path, copy_of: Callable[[Path], Path]) -> Path:
    """Two of the 24 test images are broken, one of them the first of its batch of 6."""
    folder = copy_of(shapes) / "test"
    content = (folder / "circle" / "02.png").read_bytes()
    (folder / "circle" / "02.png").write_bytes(content[: len(content) // 2])
    (folder / "square" / "00.png").write_text("not an image")
    return folder


def test_a_broken_image_stops_the_run_by_name(with_bad: Path) -> None:
    broken = open_images(DataSpec(source=str(with_bad)), "all")
    with pytest.raises(
        BadImageError, match=r"image circle/02.png cannot be decoded .* or leave it out with --skip-bad"
    ):
        predict([Fake()], broken, batch_size=8)


@pytest.mark.parametrize("compiled", [False, True])
def test_broken_images_are_left_out_for_all_and_counted(compiled: bool, with_bad: Path, images: ImageSet) -> None:
    broken = open_images(DataSpec(source=str(with_bad)), "all")
    subjects = [Fake("a", compiled=compiled), Fake("b")]
    outcome = predict(subjects, broken, batch_size=6, skip_bad=True)
    assert outcome.skipped == ("circle/02.png", "square/00.png")
    kept = [index for index, name in enumerate(images.ids) if name not in outcome.skipped]
    for subject in subjects:
        got = outcome.predictions[subject.name]
        np.testing.assert_allclose(got.logits, expected_logits(images)[kept], rtol=1e-4, atol=1e-5)
        assert got.ids == tuple(images.ids[index] for index in kept)
        assert got.labels.tolist() == [images.labels[index] for index in kept]
        assert got.image_sha256 == tuple(images.image_hashes[index] for index in kept)
    assert subjects[0].batches == ([6] * 4 if compiled else [5, 6, 5, 6])


def test_a_batch_of_broken_images_only_is_passed_over(with_bad: Path) -> None:
    broken = open_images(DataSpec(source=str(with_bad)), "all")
    subject = Fake(compiled=True)
    outcome = predict([subject], broken, batch_size=1, skip_bad=True)
    assert subject.batches == [1] * 22 and len(outcome.skipped) == 2


def test_nothing_but_broken_images_is_refused(with_bad: Path) -> None:
    broken = open_images(DataSpec(source=str(with_bad)), "all").subset([2, 12])
    with pytest.raises(DataError, match=r"none of the 2 images of .*test can be decoded"):
        predict([Fake()], broken, batch_size=8, skip_bad=True)


def predictions(logits: list[list[float]], labels: list[int], sha: str = "") -> Predictions:
    names = tuple(f"{index}.png" for index in range(len(labels)))
    return Predictions(names, tuple(sha + name for name in names), np.array(labels), np.array(logits, np.float32))


def test_summary_equals_a_hand_count() -> None:
    rows = [
        ([9, 1, 1, 1, 1, 0, 0], 0),  # right
        ([9, 8, 7, 6, 5, 4, 3], 4),  # wrong, fifth
        ([9, 8, 7, 6, 5, 4, 3], 5),  # wrong, sixth
        ([0, 9, 0, 0, 0, 0, 0], 1),  # right
        ([0, 0, 0, 0, 9, 0, 0], 4),  # right
    ]
    names = ("a", "b", "c", "d", "e", "f", "g")
    got = summarise(predictions([logits for logits, _ in rows], [label for _, label in rows]), names)
    assert (got.images, got.top1_percent, got.top5_percent) == (5, 60.0, 80.0)
    assert [(row.label, row.name, row.images, row.top1_percent) for row in got.classes] == [
        (0, "a", 1, 100.0),
        (1, "b", 1, 100.0),
        (4, "e", 2, 50.0),
        (5, "f", 1, 0.0),
    ]
    low, high = proportion_confint(3, 5, method="wilson")
    assert got.top1_ci95_percent == pytest.approx((100 * low, 100 * high))
    confidence = [np.exp(max(logits)) / np.exp(logits).sum() for logits, _ in rows]
    # All confidences of wrong answers share one of 15 bins, those of right answers another.
    assert {int(15 * c) for c in confidence[:1] + confidence[3:]} == {14} and len(
        {int(15 * c) for c in confidence[1:3]}
    ) == 1
    expected = (3 * abs(1 - np.mean([confidence[i] for i in (0, 3, 4)])) + 2 * abs(0 - confidence[1])) / 5
    assert got.expected_calibration_error == pytest.approx(expected, rel=1e-6)


def test_top_5_of_five_classes_is_unknown() -> None:
    assert summarise(predictions([[1, 0, 0, 0, 0]], [0]), "abcde").top5_percent is None
    assert summarise(predictions([[1, 0, 0, 0, 0, 0]], [5]), "abcdef").top5_percent == 0.0


def test_comparison_equals_a_hand_count() -> None:
    # 100 images of class 0 of 2: the variant loses five, wins one, and is wrong on another four as before
    right, wrong = [2.0, 0.0], [0.0, 2.0]
    base = [right] * 95 + [wrong] * 5
    other = [wrong] * 5 + [right] * 90 + [right] * 1 + [wrong] * 4
    got = compare("base", predictions(base, [0] * 100), predictions(other, [0] * 100))
    assert (got.baseline, got.right_to_wrong, got.wrong_to_right) == ("base", 5, 1)
    assert got.top1_delta_points == pytest.approx(-4)
    assert got.agreement_percent == pytest.approx(94)
    assert got.mcnemar_p == pytest.approx(binomtest(1, 6).pvalue)
    low, high = got.top1_delta_ci95_points
    assert low < -4 < high
    p = np.exp(2) / (np.exp(2) + 1)
    assert got.mean_kl_divergence == pytest.approx(0.06 * (p - (1 - p)) * 2, rel=1e-5)
    flat = np.array(base) - np.array(other)
    assert got.normalised_logit_error == pytest.approx(np.linalg.norm(flat) / np.linalg.norm(base))
    low, high = proportion_confint(94, 100, method="wilson")
    assert got.agreement_ci95_percent == pytest.approx((100 * low, 100 * high))
    assert got.kl_ci95[0] < got.mean_kl_divergence < got.kl_ci95[1]
    assert "no loss shown" in got.verdict


def test_equal_predictions_show_no_difference() -> None:
    same = predictions([[2, 0], [0, 2], [1, 0]], [0, 0, 0])
    got = compare("base", same, same)
    assert (got.top1_delta_points, got.agreement_percent, got.mcnemar_p) == (0, 100, 1)
    assert (got.mean_kl_divergence, got.normalised_logit_error) == (0, 0)
    assert got.kl_ci95 is None  # of three images


def test_wrong_answers_that_differ_are_never_called_identical() -> None:
    # Both are wrong on every image, each time in another way: no image turned, and no answer is the same.
    base, other = predictions([[0, 2, 0]] * 3, [0, 0, 0]), predictions([[0, 0, 2]] * 3, [0, 0, 0])
    got = compare("base", base, other)
    assert (got.right_to_wrong, got.wrong_to_right, got.agreement_percent) == (0, 0, 0)
    assert "identical" not in got.verdict


def test_several_variants_share_the_chance_of_an_error() -> None:
    right, wrong = [2.0, 0.0], [0.0, 2.0]
    base = predictions([right] * 100, [0] * 100)
    lost = {6: 0.03125, 9: 0.00390625, 0: 1.0}
    compared = [compare("base", base, predictions([wrong] * n + [right] * (100 - n), [0] * 100)) for n in lost]
    assert [one.mcnemar_p for one in compared] == pytest.approx(list(lost.values()))
    assert compared[0].verdict.startswith("loses 6.0 points")
    one, two, three = adjusted(compared, 100)
    expected = multipletests(list(lost.values()), method="holm")[1]
    assert [x.mcnemar_holm_p for x in (one, two, three)] == pytest.approx(expected)
    assert one.verdict.startswith("no loss shown (p = 0.06") and two.verdict.startswith("loses 9.0 points")
    assert three.verdict.startswith("no loss shown; a loss of up to")


def test_other_images_are_not_compared() -> None:
    logits = [[1.0, 0.0]] * 3
    with pytest.raises(
        RecordError, match=r"not measured on the same images \(3 of 3 differ\): evaluate both with the sa"
    ):
        compare("base", predictions(logits, [0, 1, 0]), predictions(logits, [0, 1, 0], sha="other "))
    with pytest.raises(RecordError, match=r"not measured on the same images \(1 of 3 differ\)"):
        compare("base", predictions(logits, [0, 1, 0]), predictions(logits[:2], [0, 1]))


def test_other_labels_are_not_compared() -> None:
    logits = [[1.0, 0.0]] * 3
    with pytest.raises(RecordError, match="measured on the same images with different labels"):
        compare("base", predictions(logits, [0, 1, 0]), predictions(logits, [0, 1, 1]))


def test_other_classes_are_not_compared() -> None:
    with pytest.raises(RecordError, match=r"heads of 2 and 3 classes; only models with the same classes can be comp"):
        compare("base", predictions([[1.0, 0.0]], [0]), predictions([[1.0, 0.0, 0.0]], [0]))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    for kind, size in (("a", (11000, 10000)), ("b", (8, 8))):
        (tmp_path / kind).mkdir()
        Image.new("1", size).save(tmp_path / kind / "0.png")
    images = open_images(DataSpec(source=str(tmp_path)), "all")
    with pytest.raises(BadImageError, match=r"image a/0.png cannot be decoded .110 megapixels"):
        predict([Fake()], images, batch_size=2)
    assert predict([Fake()], images, batch_size=2, skip_bad=True).skipped == ("a/0.png",)
