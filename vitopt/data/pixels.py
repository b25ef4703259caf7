"""Images to pixel tensors: the checkpoint's own processor, augmentation, and batches read ahead."""

import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from vitopt import threads
from vitopt.data.images import ImageSet
from vitopt.errors import BadImageError


class Preprocessor:
    """Turns one RGB image into the tensor its model was trained on.

    `scaled`: images may be decoded at a fraction of their size before, see `smallest_side`.

    The processor resizes, crops and pads. Rescaling and normalising then gives each byte of a channel one value, which
    is looked up in a table that the processor made: the same bits without its passes over floats of 64 bits.
    """

    def __init__(self, processor: Any, *, scaled: bool = False):
        self.processor, self.scaled = processor, scaled
        self._table = _table_of(processor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Preprocessor) and self._settings == other._settings

    __hash__ = None  # type: ignore[assignment]

    @property
    def _settings(self) -> tuple[Any, ...]:
        return self.name, self.scaled, self.processor.to_dict()

    @property
    def name(self) -> str:
        """Class that does the work; the Pillow and torchvision backends differ slightly in pixels."""
        return type(self.processor).__name__

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its output in pixels."""
        if timm := getattr(self.processor, "data_config", None):
            return timm["input_size"][1], timm["input_size"][2]
        size = getattr(self.processor, "crop_size", None) if getattr(self.processor, "do_center_crop", False) else None
        size = size or self.processor.size
        if getattr(size, "height", None) or "height" in dict(size):
            return int(size["height"]), int(size["width"])
        return int(size["shortest_edge"]), int(size["shortest_edge"])

    @property
    def smallest_side(self) -> int | None:
        """Pixels below which no side of an image should be decoded; None where all of it should.

        Twice what it is resized to, before a crop: that resizing then still averages pixels.
        """
        if not self.scaled:
            return None
        if timm := getattr(self.processor, "data_config", None):
            return 2 * math.ceil(max(timm["input_size"][1:]) / timm["crop_pct"])
        resized = [side for side in dict(self.processor.size).values() if side]
        return 2 * max(resized) if getattr(self.processor, "do_resize", True) else None

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return (3, height, width), float32, normalised."""
        if self._table is None:
            return _whole(self.processor, image)
        return _looked_up(_whole(self.processor, image, **_UNSCALED), self._table)


_UNSCALED = {"do_rescale": False, "do_normalize": False}


def _whole(processor: Any, image: Image.Image, **switches: bool) -> torch.Tensor:
    return processor(image, return_tensors="pt", **switches)["pixel_values"][0]


def _looked_up(unscaled: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    pixels = np.empty(unscaled.shape, table.dtype)
    for values, channel, out in zip(table, unscaled.numpy(), pixels, strict=True):
        np.take(values, channel, out=out, mode="clip")  # `raise`, the default, would write to a copy first
    return torch.from_numpy(pixels)


def _table_of(processor: Any) -> np.ndarray | None:
    """(3, 256): what `processor` makes of each byte of each channel. None where it has no switches for that, as timm's,
    or where a pixel's value depends on more than its own byte, which two images of noise tell."""
    generator = np.random.default_rng(0)
    every = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), (16, 16, 3))
    noise = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((30, 40), (40, 30))]
    try:
        table = _whole(processor, Image.fromarray(every), do_resize=False, do_center_crop=False).numpy().reshape(3, 256)
        for image in map(Image.fromarray, noise):
            unscaled = _whole(processor, image, **_UNSCALED)
            if unscaled.dtype != torch.uint8 or not torch.equal(_looked_up(unscaled, table), _whole(processor, image)):
                return None
    except Exception:  # of any type, by its class: such a processor makes whole pixels, or says then why it cannot
        return None
    return table


def smallest_side(preprocess: Callable[[Image.Image], torch.Tensor]) -> int | None:
    """`Preprocessor.smallest_side`; None for a function of the user's, which gets whole images."""
    return preprocess.smallest_side if isinstance(preprocess, Preprocessor) else None


class Augmentation:
    """Random crop of 70 % to 100 % of the area, sides in ratio 3:4 to 4:3, and a mirror image half the time.

    The crop is the usual one of ImageNet training (Szegedy et al., arXiv 1409.4842), milder because
    fine-tuning sees few images. Random numbers come from torch, so that the trainer's seed fixes them.
    """

    def __init__(self, flip: bool = True, smallest_area: float = 0.7):
        self.flip = flip
        self.smallest_area = smallest_area

    def __call__(self, image: Image.Image) -> Image.Image:
        area, ratio, x, y, mirror = torch.rand(5).tolist()
        share = self.smallest_area + (1 - self.smallest_area) * area
        aspect = (3 / 4) ** (1 - 2 * ratio)
        width = min(image.width, max(1, round((image.width * image.height * share * aspect) ** 0.5)))
        height = min(image.height, max(1, round((image.width * image.height * share / aspect) ** 0.5)))
        left, top = int(x * (image.width - width + 1)), int(y * (image.height - height + 1))
        cropped = image.crop((left, top, left + width, top + height)).resize(image.size, Image.Resampling.BICUBIC)
        if self.flip and mirror < 0.5:
            return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return cropped


@dataclass(frozen=True)
class Batch:
    """`pixel_values`: (images, 3, height, width), float32; `indices`: where they stand in the image set."""

    indices: tuple[int, ...]
    pixel_values: torch.Tensor
    bad: tuple[int, ...] = ()


TEACHER_PIXELS = "teacher_pixel_values"


class PixelDataset(Dataset):
    """Preprocessed images for the trainer and for the batches of evaluation.

    `for_teacher` prepares the same (augmented) image for a model that takes other pixels.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocess: Callable[[Image.Image], torch.Tensor],
        augment: Augmentation | None = None,
        for_teacher: Callable[[Image.Image], torch.Tensor] | None = None,
    ):
        self.images = images
        self.preprocess = preprocess
        self.augment = augment
        self.for_teacher = for_teacher

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images.image(index, smallest_side=smallest_side(self.preprocess))
        if self.augment is not None:
            image = self.augment(image)
        taught = {} if self.for_teacher is None else {TEACHER_PIXELS: self.for_teacher(image)}
        return {"pixel_values": self.preprocess(image), "labels": self._target(index)} | taught

    def _target(self, index: int) -> Any:
        if self.images.label_sets is None:
            return self.images.labels[index]
        return torch.from_numpy(self.images.subset([index]).targets()[0]).float()


class _Indexed(Dataset):
    """Gives (index, pixels), or (index, error): raised in a worker process, the error would lose its plain text."""

    def __init__(self, pixels: PixelDataset, indices: range):
        self.pixels, self.indices = pixels, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, torch.Tensor | BadImageError]:
        index = self.indices[position]
        try:
            return index, self.pixels[index]["pixel_values"]
        except BadImageError as error:
            return index, error


def _collate(items: list[tuple[int, torch.Tensor | BadImageError]]) -> tuple[Batch, list[BadImageError]]:
    good = [(index, pixels) for index, pixels in items if isinstance(pixels, torch.Tensor)]
    stacked = torch.stack([pixels for _, pixels in good]) if good else torch.empty(0)
    bad = tuple(index for index, pixels in items if isinstance(pixels, BadImageError))
    errors = [error for _, error in items if isinstance(error, BadImageError)]
    return Batch(tuple(index for index, _ in good), stacked, bad), errors


def _accept(collated: Iterable[tuple[Batch, list[BadImageError]]], skip_bad: bool) -> Iterator[Batch]:
    for batch, errors in collated:
        if errors and not skip_bad:
            raise errors[0]
        yield batch


def batches(
    images: ImageSet,
    preprocess: Callable[[Image.Image], torch.Tensor],
    batch_size: int,
    *,
    workers: int = 0,
    skip_bad: bool = False,
    share: tuple[int, int] = (0, 1),
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield all images in order, decoded ahead of use so that loading overlaps with compute.

    `share` (rank, processes) takes every `processes`-th image from `rank` on. With `workers` 0 one background
    thread decodes: Pillow and numpy release the interpreter lock for most of it. With `pin` the pixels lie in
    pinned memory, from which a GPU copies while it computes.

    Raises:
        BadImageError: an image cannot be decoded and `skip_bad` is false.
    """
    rank, processes = share
    dataset = _Indexed(PixelDataset(images, preprocess), range(rank, len(images), processes))
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=_collate)
    accepted = _accept(loader, skip_bad)
    if pin:
        accepted = (replace(batch, pixel_values=batch.pixel_values.pin_memory()) for batch in accepted)
    return _read_ahead(accepted) if workers == 0 or pin else accepted


def on_device(stream: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches with their pixels on `device`; a GPU copies each while it works on the one before."""
    if device.type != "cuda":
        yield from stream
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    waiting: tuple[Batch, torch.cuda.Event] | None = None
    for batch in itertools.chain(stream, [None]):
        copied = None
        if batch is not None:
            with torch.cuda.stream(copying):
                pixels = batch.pixel_values.to(device, non_blocking=True)
            pixels.record_stream(computing)  # else its memory could be given away while it is still read
            copied = replace(batch, pixel_values=pixels), copying.record_event()
        if waiting is not None:
            computing.wait_event(waiting[1])
            yield waiting[0]
        waiting = copied


_DEPTH = 4


def _read_ahead(source: Iterator[Batch]) -> Iterator[Batch]:
    """Run `source` in a thread, at most `_DEPTH` batches ahead."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=_DEPTH)
    stop = threading.Event()

    def work() -> None:
        try:
            for batch in source:
                ready.put(batch)
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            ready.put(error)

    thread = threading.Thread(target=work, daemon=True)
    with threads.unbound():
        thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            # Room in the queue lets a blocked producer see the stop sign.
            try:
                ready.get(timeout=0.05)
            except queue.Empty:
                continue


def random_pixels(batch_size: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """(batch, 3, height, width) of standard normal noise: timing must not run on zeros, which compute faster."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.standard_normal((batch_size, 3, *size), dtype=np.float32))
