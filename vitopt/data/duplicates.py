"""Images that look the same: saved anew, scaled or recoloured a little, so that no byte of their files agrees."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitopt import progress
from vitopt.data.images import ImageSet
from vitopt.environment import support
from vitopt.errors import BadImageError

# Of 64 bits. Of 5,000,000 pairs of photos 62 were that close; those looked at were copies. Different things begin at 8.
LARGEST_DISTANCE = 6
_SMALLEST_SIDE = 32  # the hash is made of 32 x 32 pixels: smaller images look alike without being the same
_PAIRS_AT_ONCE = 2**24


def perceptual_hashes(images: ImageSet) -> tuple[str | None, ...]:
    """Perceptual hash of each image as 16 hexadecimal digits; None where it is too small or cannot be decoded.

    Empty where the package ImageHash is not installed. JPEG files are decoded at a fraction of their size.
    Source: Zauner 2010, "Implementation and benchmarking of perceptual image hash functions" (DCT of 32 x 32 pixels).
    """
    if not support.installed("imagehash"):
        return ()
    return tuple(_hash(images, index) for index in progress.track(range(len(images)), "look-alikes", len(images)))


def _hash(images: ImageSet, index: int) -> str | None:
    from imagehash import phash

    try:
        image = images.image(index, smallest_side=2 * _SMALLEST_SIDE)
    except BadImageError:
        return None
    return str(phash(image)) if min(image.size) >= _SMALLEST_SIDE else None


def look_alikes(ours: Sequence[str | None], theirs: Sequence[str | None], same_set: bool = False) -> dict[int, int]:
    """For each of our images that has a look-alike among theirs, the position of the nearest.

    Both are perceptual hashes. With `same_set` the two are one set, in which no image is its own look-alike.
    """
    mine, other = _known(ours), _known(theirs)
    if not len(mine) or not len(other):
        return {}
    words, their_words = _words(ours, mine), _words(theirs, other)
    copies: dict[int, int] = {}
    rows = max(1, _PAIRS_AT_ONCE // len(other))
    for start in range(0, len(mine), rows):
        apart = np.bitwise_count(words[start : start + rows, np.newaxis] ^ their_words)
        if same_set:
            here = np.arange(len(apart))
            apart[here, start + here] = 64
        nearest = apart.argmin(axis=1)
        for row in np.flatnonzero(apart.min(axis=1) <= LARGEST_DISTANCE):
            copies[int(mine[start + row])] = int(other[nearest[row]])
    return copies


def _known(hashes: Sequence[str | None]) -> NDArray[np.intp]:
    return np.flatnonzero([value is not None for value in hashes])


def _words(hashes: Sequence[str | None], known: NDArray[np.intp]) -> NDArray[np.uint64]:
    return np.array([int(hashes[index] or "", 16) for index in known], dtype=np.uint64)
