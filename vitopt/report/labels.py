"""Labels beside the points of a plot, placed so that they cover little."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from vitopt.report.svg import INK

_SIZE = 10.5
_NEAREST = 9  # points; from further away a line leads to the label
_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
_PLACES = list(itertools.product((_NEAREST, 18, 30, 44, 60), _DIRECTIONS))
_POINT = 5.0  # points from its centre
_LINE = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "alpha": 0.6}


def label_points(figure: Figure, axes: Axes, labels: Sequence[str], x: np.ndarray, y: np.ndarray) -> None:
    """Write each label where it covers least of the points, of the lines and of the labels before it.

    A point whose label is empty gets none. `x` and `y` are (points,), in data coordinates. The axes must have their
    final limits.
    """
    figure.draw_without_rendering()
    frame, scale = axes.get_window_extent(), figure.dpi / 72
    points = axes.transData.transform(np.column_stack([x, y]))
    taken = [Bbox([point, point]).padded(_POINT * scale) for point in points]
    lines = [
        Bbox(ends).padded(scale)
        for line in axes.get_lines()
        for ends in itertools.pairwise(axes.transData.transform(line.get_xydata()))
    ]
    for label, point, data in zip(labels, points, zip(x, y, strict=True), strict=True):
        if not label:
            continue
        text = axes.annotate(label, data, (0, 0), textcoords="offset points", fontsize=_SIZE, va="center")
        extent = text.get_window_extent()
        text.remove()

        def box(distance: float, direction: tuple[int, int], point: np.ndarray = point, extent: Bbox = extent) -> Bbox:
            across, up = direction
            # To the left of a point a label ends beside it, to the right it begins there.
            left = point[0] + across * distance * scale - (1 - across) / 2 * extent.width
            return Bbox.from_bounds(left, point[1] + up * distance * scale - extent.height / 2, *extent.size)

        def cost(place: tuple[float, tuple[int, int]]) -> float:
            # In square pixels: leaving the axes costs most, crossing a thin line little.
            own = box(*place)
            outside = own.width * own.height - _shared(own, [frame])
            return _shared(own, taken) + 0.3 * _shared(own, lines) + 10 * outside + 0.8 * place[0]

        place = min(_PLACES, key=cost)
        best = box(*place)
        taken.append(best.padded(2 * scale))
        offset = ((best.x0 - point[0]) / scale, ((best.y0 + best.y1) / 2 - point[1]) / scale)
        line = _LINE if place[0] > _NEAREST else None
        axes.annotate(label, data, offset, textcoords="offset points", fontsize=_SIZE, va="center", arrowprops=line)


def _shared(box: Bbox, others: Sequence[Bbox]) -> float:
    """Area that the box shares with others."""
    shared = (Bbox.intersection(box, other) for other in others)
    return sum(overlap.width * overlap.height for overlap in shared if overlap is not None)
