"""What all figures share: their width, their style, and how they become files."""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from vitopt import ownership, storage
from vitopt.report.svg import INK, png_of, svg_of

WIDTH = 400  # points; CSS pixels at natural size
STYLE: dict[Any, Any] = {
    "font.size": 11.5,
    "text.color": INK,
    "text.parse_math": False,  # a name may contain dollar signs
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Plot:
    """A figure as the page shows it."""

    name: str  # of its files
    kind: str
    batch_size: int | None
    title: str
    alt: str  # what it shows, in words, for those who cannot see it
    svg: str


Drawable = tuple[str, str, int | None, str, str, Figure | None]
"""File name, kind, batch size, title, text alternative and figure of what might be drawn; None has no data."""


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """The style of all figures, for drawing them and for saving them."""
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        # Names may have letters that matplotlib's own font lacks; in the SVG the browser's fonts have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def canvas(height: float, between: float = 0.02) -> Figure:
    """An empty figure `height` points high; the page gives the space around it.

    `between` is the space between its axes, as a share of their mean size.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.03, wspace=between, hspace=between)
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def blank(height: float) -> tuple[Figure, Axes]:
    """An empty figure `height` points high, and its only axes."""
    figure = canvas(height)
    return figure, figure.add_subplot()


def rendered(drawables: Iterable[Drawable], folder: Path | None) -> list[Plot]:
    """The figures that have data as the page shows them; each also as SVG and PNG in `folder`, unless that is None.

    Raises:
        StorageError: the folder cannot be written.
    """
    plots = []
    with styled():
        for name, kind, batch_size, title, alt, figure in drawables:
            if figure is None:
                continue
            svg = svg_of(figure, name, f"{title}. {alt}")
            if folder is not None:
                storage.write_text(folder / f"{name}.svg", svg)
                storage.write_bytes(folder / f"{name}.png", png_of(figure))
            plots.append(Plot(name, kind, batch_size, title, alt, svg))
    return plots


def remove_others(folder: Path, own: re.Pattern[str], plots: Iterable[Plot]) -> None:
    """Delete figures that an earlier report left in `folder`: files named like `own` that are not of `plots`.

    Only what vitopt lists as its own is deleted.
    """
    drawn = {plot.name for plot in plots}
    for path in folder.glob("*") if folder.is_dir() else ():
        if own.fullmatch(path.name) and path.stem not in drawn and ownership.is_listed(path):
            storage.remove(path)
