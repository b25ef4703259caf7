import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BeitImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    DeiTImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from vitopt.data.images import ImageSet, image_files, open_images
from vitopt.data.pixels import Augmentation, Batch, PixelDataset, Preprocessor, batches, on_device, random_pixels
from vitopt.errors import BadImageError
from vitopt.models.checkpoint import load_processor, open_checkpoint
from vitopt.recipe import DataSpec

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


@pytest.fixture(scope="module")
def preprocess(tiny_checkpoint) -> Preprocessor:
    return Preprocessor(load_processor(open_checkpoint(str(tiny_checkpoint))))


@pytest.fixture
def images(shapes) -> ImageSet:
    return open_images(DataSpec(source=str(shapes)), "test")


@pytest.fixture
def with_bad(shapes, copy_of) -> ImageSet:
    """The test images of `shapes`, of which numbers 2 and 23 are broken."""
    folder = copy_of(shapes)
    for name in ("circle/02.png", "stripe/05.png"):
        (folder / "test" / name).write_bytes(b"broken")
    return open_images(DataSpec(source=str(folder)), "test")


def noise(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng(width * height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize, rescale to 0..1 and normalise, in float64: (3, height, width)."""
    resized = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float64)
    return ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)


# the checkpoint's own processor


@pytest.mark.parametrize("sides", [(32, 32), (100, 40), (40, 100), (5, 7), (1, 1), (1, 50), (50, 3)])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_pixels_are_those_of_an_independent_computation(sides, size):
    processor = ViTImageProcessor(
        size={"height": size[0], "width": size[1]}, image_mean=list(MEAN), image_std=list(STD), resample=2
    )
    image = noise(*sides)
    pixels = Preprocessor(processor)(image)
    assert (tuple(pixels.shape), pixels.dtype) == ((3, *size), torch.float32)
    np.testing.assert_allclose(pixels.numpy(), reference(image, size), atol=1e-6)


def test_a_centre_crop_is_that_of_an_independent_computation():
    processor = CLIPImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=list(MEAN),
        image_std=list(STD),
        resample=2,
    )
    image = noise(100, 50)
    resized = image.resize((80, 40), Image.Resampling.BILINEAR).crop((24, 4, 56, 36))
    pixels = Preprocessor(processor)(image)
    np.testing.assert_allclose(pixels.numpy(), reference(resized, (32, 32)), atol=1e-6)


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (lambda: ViTImageProcessor(size={"height": 16, "width": 24}), (16, 24)),
        (lambda: ViTImageProcessor(size=64), (64, 64)),
        (lambda: DeiTImageProcessor(), (224, 224)),
        (lambda: CLIPImageProcessor(), (224, 224)),
        (lambda: BeitImageProcessor(), (224, 224)),
    ],
    ids=["height and width", "one number", "resize 256, crop 224", "shortest edge", "crop switched off"],
)
def test_the_size_is_that_of_the_output(processor, size):
    preprocess = Preprocessor(processor())
    assert preprocess.size == size
    assert tuple(preprocess(noise(300, 260)).shape) == (3, *size)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (BeitImageProcessor, {}),
        (BitImageProcessor, {}),
        (CLIPImageProcessor, {}),
        (DeiTImageProcessor, {}),
        (SiglipImageProcessor, {}),
        (ViTImageProcessor, {"image_mean": list(MEAN), "image_std": list(STD)}),
        (ViTImageProcessor, {"do_normalize": False}),
        (ViTImageProcessor, {"do_rescale": False}),
        (ViTImageProcessor, {"rescale_factor": 1 / 127.5}),
        (CLIPImageProcessor, {"do_resize": False, "crop_size": {"height": 60, "width": 70}}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value) or "default",
)
def test_pixels_are_the_processors_own_to_the_bit_without_its_passes_over_floats(kind, settings, monkeypatch):
    processor = kind(**settings)
    images = [noise(*sides) for sides in ((64, 48), (50, 70), (300, 200))]
    expected = [processor(image, return_tensors="pt")["pixel_values"][0] for image in images]
    preprocess = Preprocessor(processor)
    for slow in ("rescale", "normalize"):
        monkeypatch.setattr(processor, slow, lambda *_, **__: pytest.fail("done for each image"))
    for image, pixels in zip(images, expected, strict=True):
        assert torch.equal(preprocess(image), pixels) and preprocess(image).dtype == pixels.dtype


class ByImage(ViTImageProcessor):
    """Brings each image to a mean of 0: no table of bytes holds that."""

    def normalize(self, image, mean, std, **_):
        return image - image.mean()


class WithoutSwitches:
    """As timm's: it takes an image and nothing else."""

    def __call__(self, image, return_tensors):
        return {"pixel_values": torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None]}


@pytest.mark.parametrize("kind", [ByImage, WithoutSwitches])
def test_pixels_that_are_no_function_of_single_bytes_are_the_processors_too(kind):
    processor = kind()
    for image in (noise(64, 48), noise(300, 200)):
        assert torch.equal(Preprocessor(processor)(image), processor(image, return_tensors="pt")["pixel_values"][0])


def test_the_name_tells_the_backend(preprocess):
    assert preprocess.name == type(preprocess.processor).__name__
    assert preprocess.name.startswith("ViTImageProcessor")


@pytest.mark.parametrize(
    ("processor", "side"),
    [
        (lambda: ViTImageProcessor(size={"height": 16, "width": 24}), 48),
        (lambda: DeiTImageProcessor(), 512),
        (lambda: CLIPImageProcessor(), 448),
        (lambda: ViTImageProcessor(do_resize=False), None),
    ],
    ids=["height and width", "resize 256, crop 224", "shortest edge", "no resizing"],
)
def test_scaled_decoding_keeps_twice_what_is_resized_to(processor, side):
    scaled, whole = Preprocessor(processor(), scaled=True), Preprocessor(processor())
    assert (scaled.smallest_side, whole.smallest_side) == (side, None)
    assert scaled != whole and scaled == Preprocessor(processor(), scaled=True)


def test_batches_decode_at_a_fraction_where_the_preprocessor_says_so(preprocess, tmp_path):
    noise(600, 400).resize((1200, 800)).save(tmp_path / "a.jpg")
    images = image_files([tmp_path / "a.jpg"])
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft("RGB", (150, 100))
        assert image.size == (150, 100)
        fraction = preprocess(image.convert("RGB"))
    for scaled in (False, True):
        (batch,) = batches(images, Preprocessor(preprocess.processor, scaled=scaled), 1)
        assert torch.equal(batch.pixel_values[0], fraction) == scaled


# augmentation


def leaning(width: int = 24, height: int = 16) -> Image.Image:
    """Bright on the left, dark on the right: a mirror image is told apart by its halves."""
    row = np.linspace(255, 0, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row[None, :, None], (height, width, 3)).copy())


def mirrored(image: Image.Image) -> bool:
    pixels = np.asarray(image, dtype=float)
    half = pixels.shape[1] // 2
    return bool(pixels[:, :half].mean() < pixels[:, half:].mean())


@pytest.mark.parametrize("sides", [(24, 16), (16, 24), (1, 1), (1, 40), (3, 2)])
def test_augmentation_keeps_the_size(sides):
    torch.manual_seed(0)
    augment = Augmentation()
    assert {augment(noise(*sides)).size for _ in range(20)} == {sides}


def test_augmentation_is_reproducible():
    def run(seed: int) -> list[bytes]:
        torch.manual_seed(seed)
        augment = Augmentation()
        return [augment(noise(20, 20)).tobytes() for _ in range(8)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(set(run(1))) == 8


def test_half_of_the_images_are_mirrored_unless_told_not_to():
    torch.manual_seed(0)
    turned = sum(mirrored(Augmentation()(leaning())) for _ in range(200))
    assert 70 < turned < 130
    assert not any(mirrored(Augmentation(flip=False)(leaning())) for _ in range(200))


def test_crops_keep_at_least_the_smallest_area(monkeypatch):
    torch.manual_seed(0)
    boxes = []
    crop = Image.Image.crop

    def watched(self: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        boxes.append(box)
        return crop(self, box)

    monkeypatch.setattr(Image.Image, "crop", watched)
    for _ in range(200):
        Augmentation(smallest_area=0.7)(noise(100, 100))
    left, top, right, bottom = np.array(boxes).T
    assert (left.min(), top.min(), right.max(), bottom.max()) == (0, 0, 100, 100)
    widths, heights = right - left, bottom - top
    assert (widths / heights).min() >= 3 / 4 - 0.02
    assert (widths / heights).max() <= 4 / 3 + 0.02
    # Cut at the image's edge, a stretched crop loses a little of its area.
    assert (widths * heights).min() >= 0.7 * 100 * 100 * 0.85
    assert len(set(zip(left, top, strict=True))) > 50


# the trainer's data set


def test_the_data_set_gives_pixels_and_labels(images, preprocess):
    dataset = PixelDataset(images, preprocess)
    assert len(dataset) == 24
    assert dataset[7]["labels"] == images.labels[7]
    assert torch.equal(dataset[7]["pixel_values"], preprocess(images.image(7)))


def test_the_data_set_augments_before_it_preprocesses(images, preprocess):
    dataset = PixelDataset(images, preprocess, augment=lambda image: Image.new("RGB", image.size, (255, 255, 255)))
    assert torch.equal(dataset[0]["pixel_values"], torch.ones(3, 32, 32))


# batches


def test_batches_come_in_order_and_the_last_may_be_short(images, preprocess):
    found = list(batches(images, preprocess, 10))
    assert [len(batch.indices) for batch in found] == [10, 10, 4]
    assert [index for batch in found for index in batch.indices] == list(range(24))
    assert found[0].pixel_values.shape == (10, 3, 32, 32)
    assert torch.equal(found[2].pixel_values[3], preprocess(images.image(23)))
    assert not any(batch.bad for batch in found)


@pytest.mark.parametrize("processes", [2, 3, 30])
def test_shares_cover_every_image_once(images, preprocess, processes):
    shares = [list(batches(images, preprocess, 5, share=(rank, processes))) for rank in range(processes)]
    indices = [[index for batch in share for index in batch.indices] for share in shares]
    assert sorted(index for share in indices for index in share) == list(range(24))
    assert indices[1] == list(range(1, 24, processes))


def test_bad_images_are_skipped_and_counted(with_bad, preprocess):
    found = list(batches(with_bad, preprocess, 6, skip_bad=True))
    assert [batch.bad for batch in found] == [(2,), (), (), (23,)]
    assert found[0].indices == (0, 1, 3, 4, 5)
    assert torch.equal(found[0].pixel_values[2], preprocess(with_bad.image(3)))


def test_a_batch_of_bad_images_is_empty(with_bad, preprocess):
    (batch,) = batches(with_bad.subset([2, 23]), preprocess, 2, skip_bad=True)
    assert (batch.indices, batch.bad, len(batch.pixel_values)) == ((), (0, 1), 0)


def bad_image(images: ImageSet, preprocess: Preprocessor, workers: int) -> str:
    with pytest.raises(BadImageError) as caught:
        list(batches(images, preprocess, 6, workers=workers))
    return str(caught.value)


def test_a_bad_image_is_named(with_bad, preprocess):
    assert bad_image(with_bad, preprocess, workers=0) == (
        "image circle/02.png cannot be decoded (not an image): replace it, or leave it out with --skip-bad-images"
    )


def test_a_worker_process_gives_the_same(images, with_bad, preprocess):
    here, there = (list(batches(images, preprocess, 10, workers=workers)) for workers in (0, 1))
    assert [batch.indices for batch in here] == [batch.indices for batch in there]
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.pixel_values, other.pixel_values)
    assert bad_image(with_bad, preprocess, workers=1) == bad_image(with_bad, preprocess, workers=0)
    assert [batch.bad for batch in batches(with_bad, preprocess, 12, workers=1, skip_bad=True)] == [(2,), (23,)]


def no_more_threads_than(count: int) -> bool:
    deadline = time.monotonic() + 10
    while threading.active_count() > count and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    return threading.active_count() <= count


class Counting:
    """A preprocessor that counts its calls."""

    def __init__(self, each: Callable[[int], None] = lambda call: None):
        self.calls = 0
        self.each = each

    def __call__(self, image: Image.Image) -> torch.Tensor:
        self.calls += 1
        self.each(self.calls)
        return torch.zeros(3, 2, 2)


def test_reading_ahead_ends_with_the_images(images, preprocess):
    before = threading.active_count()
    assert len(list(batches(images, preprocess, 4))) == 6
    assert no_more_threads_than(before)


def test_reading_ahead_ends_when_the_consumer_stops_early(images):
    before = threading.active_count()
    counting = Counting()
    stream = batches(images, counting, 1)
    assert next(stream).indices == (0,)
    stream.close()
    assert no_more_threads_than(before)
    assert counting.calls < 24


def test_reading_ahead_ends_when_the_consumer_raises(images, preprocess):
    before = threading.active_count()

    def consume() -> None:
        for _ in batches(images, preprocess, 1):
            raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        consume()
    assert no_more_threads_than(before)


def settled_calls(counting: Counting) -> int:
    """How often it was called once the reading thread has come to rest."""
    last = -1
    while counting.calls != last:
        last = counting.calls
        threading.Event().wait(0.1)
    return last


def test_reading_ahead_does_not_hold_all_images_in_memory(images):
    counting = Counting()
    stream = batches(images, counting, 1)
    next(stream)
    # One was taken, four wait in the queue, one waits for room in it.
    assert settled_calls(counting) <= 6
    stream.close()


def test_an_error_while_reading_ahead_reaches_the_consumer(images):
    before = threading.active_count()

    def fail_at(call: int) -> None:
        if call == 3:
            raise ZeroDivisionError("in the thread")

    with pytest.raises(ZeroDivisionError, match="in the thread"):
        list(batches(images, Counting(fail_at), 1))
    assert no_more_threads_than(before)


def test_nothing_is_read_before_it_is_asked_for(images):
    before = threading.active_count()
    counting = Counting()
    batches(images, counting, 4)
    assert (counting.calls, threading.active_count()) == (0, before)


# on the way to the device


def test_the_cpu_gets_the_batches_as_they_are(images, preprocess):
    found = list(batches(images, preprocess, 10))
    passed = list(on_device(iter(found), torch.device("cpu")))
    assert len(passed) == 3
    assert all(one is other for one, other in zip(passed, found, strict=True))


def test_batches_without_good_images_pass_too():
    batch = Batch((), torch.empty(0), (0, 1))
    assert list(on_device(iter([batch]), torch.device("cpu"))) == [batch]


def test_the_way_to_the_device_reads_nothing_before_it_is_asked_for(images):
    before = threading.active_count()
    counting = Counting()
    stream = on_device(batches(images, counting, 1), torch.device("cpu"))
    assert (counting.calls, threading.active_count()) == (0, before)
    assert next(stream).indices == (0,)
    stream.close()
    assert no_more_threads_than(before)
    assert counting.calls < 24


# noise for timing


def test_random_pixels_are_reproducible_noise():
    pixels = random_pixels(4, (32, 48))
    assert (tuple(pixels.shape), pixels.dtype) == ((4, 3, 32, 48), torch.float32)
    assert torch.equal(pixels, random_pixels(4, (32, 48)))
    assert not torch.equal(pixels, random_pixels(4, (32, 48), seed=1))
    assert abs(float(pixels.mean())) < 0.05
    assert abs(float(pixels.std()) - 1) < 0.05
    expected = np.random.default_rng(0).standard_normal((4, 3, 32, 48), dtype=np.float32)
    assert np.array_equal(pixels.numpy(), expected)
