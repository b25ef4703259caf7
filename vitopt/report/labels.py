"""Labels beside the points of a plot, placed so that they cover little."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from vitopt.report.svg import INK

_SIZE = 10.5
_DISTANCES = (9, 18, 30, 44, 60)  # points; from the second on, a line leads to the label
_DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
_PLACES = [(across, up, distance) for distance in _DISTANCES for across, up in _DIRECTIONS]
_POINT = 10.0  # points across


def label_points(figure: Figure, axes: Axes, labels: Sequence[str], x: np.ndarray, y: np.ndarray) -> None:
    """Write each label where it covers least of the points, of the lines and of the labels before it.

    A point whose label is empty gets none. `x` and `y` are (points,), in data coordinates. The axes must have their
    final limits.
    """
    figure.draw_without_rendering()
    frame, scale = axes.get_window_extent(), figure.dpi / 72
    points = axes.transData.transform(np.column_stack([x, y]))
    half = _POINT * scale / 2
    taken = [Bbox([[px - half, py - half], [px + half, py + half]]) for px, py in points]
    lines = [
        Bbox([start, end]).padded(scale)
        for line in axes.get_lines()
        for start, end in itertools.pairwise(axes.transData.transform(line.get_xydata()))
    ]
    for label, point, data in zip(labels, points, zip(x, y, strict=True), strict=True):
        if not label:
            continue
        probe = axes.annotate(label, data, (0, 0), textcoords="offset points", fontsize=_SIZE)
        extent = probe.get_window_extent()
        probe.remove()
        boxes = [_box(extent, point, place, scale) for place in _PLACES]
        costs = [_cost(box, taken, lines, frame) + 0.8 * place[2] for box, place in zip(boxes, _PLACES, strict=True)]
        best = int(np.argmin(costs))
        box, distance = boxes[best], _PLACES[best][2]
        taken.append(box.padded(2 * scale))
        axes.annotate(
            label,
            data,
            ((box.x0 - point[0]) / scale, ((box.y0 + box.y1) / 2 - point[1]) / scale),
            textcoords="offset points",
            fontsize=_SIZE,
            va="center",
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.6, "alpha": 0.6}
            if distance > _DISTANCES[0]
            else None,
        )


def _box(extent: Bbox, point: np.ndarray, place: tuple[int, int, int], scale: float) -> Bbox:
    """Where a label as large as `extent` lies in pixels, `place` away from the point."""
    across, up, distance = place
    # To the left of a point a label ends beside it, to the right it begins there.
    x0 = point[0] + across * distance * scale - (1 - across) / 2 * extent.width
    y0 = point[1] + up * distance * scale - extent.height / 2
    return Bbox.from_bounds(x0, y0, extent.width, extent.height)


def _cost(box: Bbox, taken: Sequence[Bbox], lines: Sequence[Bbox], frame: Bbox) -> float:
    """Covered area in square pixels; leaving the axes costs most, crossing a thin line little."""
    covered = sum(_area(Bbox.intersection(box, other)) for other in taken)
    crossed = sum(_area(Bbox.intersection(box, line)) for line in lines)
    outside = box.width * box.height - _area(Bbox.intersection(box, frame))
    return covered + 0.3 * crossed + 10 * outside


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else box.width * box.height
