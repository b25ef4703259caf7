"""What all figures share: their width, their style, and how they become files."""

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
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
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Plot:
    """A figure, to be drawn (None: it has no data) or as the page shows it (its SVG, every name in it escaped)."""

    name: str  # of its files
    kind: str
    title: str
    alt: str  # what it shows, for those who cannot see it; its figures are in a table
    figure: Figure | None
    batch_size: int | None = None
    svg: str = ""


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


def step_line(axes: Axes, x: np.ndarray, y: np.ndarray, front: Sequence[int]) -> None:
    """A line along the points of a front: what one reaches holds until the next one is affordable."""
    steps_x, steps_y = np.repeat(x[front], 2)[1:], np.repeat(y[front], 2)[:-1]
    axes.plot(steps_x, steps_y, color=INK, alpha=0.45, linewidth=1.2, zorder=1)


@styled()
def rendered(plots: Iterable[Plot], folder: Path | None) -> list[Plot]:
    """The figures that have data as the page shows them; each also as SVG and PNG in `folder`, unless that is None.

    Raises:
        StorageError: the folder cannot be written.
    """
    drawn = []
    for plot in plots:
        if plot.figure is None:
            continue
        svg = svg_of(plot.figure, plot.name, plot.alt)
        if folder is not None:
            storage.write_text(folder / f"{plot.name}.svg", svg)
            storage.write_bytes(folder / f"{plot.name}.png", png_of(plot.figure))
        drawn.append(replace(plot, svg=svg, figure=None))
    return drawn


def remove_others(folder: Path, own: re.Pattern[str], plots: Iterable[Plot]) -> None:
    """Delete figures that an earlier report left in `folder`: files named like `own` that are not of `plots`.

    Only what vitopt lists as its own is deleted.
    """
    drawn = {plot.name for plot in plots}
    for path in folder.glob("*") if folder.is_dir() else ():
        if own.fullmatch(path.name) and path.stem not in drawn and ownership.is_listed(path):
            storage.remove(path)
