"""What the first pass sees: made of the pixels of the second, in the call itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn import functional

_FLAT = 64  # side of the images that tell what a preprocessor makes of colours


@dataclass(frozen=True)
class PixelMap:
    """Pixels of the second pass to those of the first: resized (bilinear, antialiased), then another normalisation.

    `matrix`: (3, 3) and `offset`: (3,), of colours; None where both passes normalise alike.
    """

    size: tuple[int, int]
    matrix: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) of any size -> (batch, 3, *size)."""
        if tuple(pixel_values.shape[-2:]) != self.size:
            pixel_values = functional.interpolate(pixel_values, self.size, mode="bilinear", antialias=True)
        if self.matrix is None or self.offset is None:
            return pixel_values
        return torch.einsum("oc,bchw->bohw", self.matrix, pixel_values) + self.offset[:, None, None]


def pixel_map(
    first: Callable[[Image.Image], torch.Tensor],
    second: Callable[[Image.Image], torch.Tensor],
    size: tuple[int, int],
    device: torch.device,
) -> PixelMap:
    """The map for passes with these preprocessors, `size` being what the first takes.

    Both are affine in an image's colours, so what they make of four images of one colour tells how they differ: mean
    and deviation, range, order of the channels.
    """
    matrices = [_affine(preprocess) for preprocess in (first, second)]
    map_ = matrices[0] @ torch.linalg.inv(matrices[1])
    if torch.allclose(map_, torch.eye(4, dtype=map_.dtype), atol=1e-4):
        return PixelMap(size)
    map_ = map_.float().to(device)
    return PixelMap(size, map_[:3, :3].contiguous(), map_[:3, 3].contiguous())


def _affine(preprocess: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """(4, 4): colour (red, green, blue, 1), 0 to 1, to channels (and 1)."""
    colours = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    found = [preprocess(Image.new("RGB", (_FLAT, _FLAT), colour)).double().mean((-2, -1)) for colour in colours]
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, 3] = found[0]
    matrix[:3, :3] = torch.stack([one - found[0] for one in found[1:]], dim=1)
    return matrix
