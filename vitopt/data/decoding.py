"""Image content: where it is read from, and which formats are decoded at all.

Pillow knows formats whose decoder is another program (PostScript starts Ghostscript) and tells them by their first
bytes, whatever the file is called. Only the formats below are ever tried.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitopt.errors import BadImageError, DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb

# ImageSet.image refuses such images with a clear line of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Reader(Protocol):
    """Gives the encoded or decoded content of image `index`."""

    def content(self, index: int) -> bytes: ...

    def image(self, index: int) -> Image.Image: ...


@dataclass(frozen=True)
class FileReader:
    """Images in files."""

    paths: tuple[Path, ...]

    def content(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def image(self, index: int) -> Image.Image:
        return Image.open(self.paths[index], formats=FORMATS)


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory: (count, height, width) bytes."""

    pixels: np.ndarray

    def content(self, index: int) -> bytes:
        return self.pixels[index].tobytes()

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


@dataclass(frozen=True)
class HubReader:
    """Rows of a Hugging Face data set whose image column is not decoded yet."""

    rows: Any
    column: str

    def content(self, index: int) -> bytes:
        value = self.rows[index][self.column]
        if value is None:
            return b""  # an empty cell, which cannot be decoded
        return value["bytes"] if value["bytes"] is not None else _cached_file(Path(value["path"])).read_bytes()

    def image(self, index: int) -> Image.Image:
        return open_bytes(self.content(index))


def _cached_file(path: Path) -> Path:
    """The file, refused unless it is in a cache of the hub: a data set from outside may name any path."""
    from datasets import config
    from huggingface_hub import constants

    place = path.resolve()
    caches = (constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
    if not (place.is_file() and any(place.is_relative_to(Path(cache).resolve()) for cache in caches)):
        raise DataError(
            f"the data set names the image {path}, which is not a file in the hub's cache: do not use this data set"
        )
    return place


def decoded(
    open_image: Callable[[], Image.Image], max_pixels: int | None = None, *, smallest_side: int | None = None
) -> Image.Image:
    """What `open_image` opens, decoded, as RGB and turned upright.

    `smallest_side`: a JPEG is decoded at a half, a quarter or an eighth of its size, which takes a fraction of the
    time, as long as no side gets smaller than that. Its decoder averages in the frequency domain, so pixels differ.

    Raises:
        BadImageError: truncated, not an image, or more than `max_pixels` (MAX_PIXELS); gives the reason alone.
    """
    try:
        image = open_image()
        most = max_pixels or MAX_PIXELS
        if image.width * image.height > most:
            megapixels = image.width * image.height / 1e6
            raise BadImageError(f"{megapixels:.0f} megapixels, more than the {most / 1e6:.0f} that are safe to decode")
        if smallest_side is not None:
            image.draft(image.mode, (smallest_side, smallest_side))  # does nothing to other formats, and once decoded
        return as_rgb(ImageOps.exif_transpose(image))
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError("too many pixels to decode safely") from error
    except Exception as error:  # decoders raise errors of any type on broken bytes
        text = "not an image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
        raise BadImageError(text) from error


def open_bytes(content: bytes) -> Image.Image:
    """An image whose pixels are decoded when they are asked for."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


def as_rgb(image: Image.Image) -> Image.Image:
    """The image with three channels of 8 bits.

    Raises:
        ValueError: its pixels are 32-bit numbers.
    """
    if image.mode.startswith("I;16"):
        # Pillow would cut 16 bits off at 255, which leaves a white image.
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are 32-bit numbers of unknown range; save it with 8 or 16 bits")
    return image.convert("RGB")
