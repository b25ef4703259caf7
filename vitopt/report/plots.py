"""Plots: records in, matplotlib figures out.

Figures are 400 points wide, so that their text is still legible when a phone scales them down. Names stand above
their bars instead of beside them: there they may be long.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from vitopt.formats import colour_of
from vitopt.measure.latency_statistics import Speedup
from vitopt.measure.statistics import pareto_front
from vitopt.records import Record
from vitopt.report.figures import Drawable, Plot, blank, remove_others, rendered, styled
from vitopt.report.labels import label_points
from vitopt.report.svg import INK
from vitopt.report.table import batch_sizes, human_bytes, milliseconds
from vitopt.report.waterfall import Step, steps

MOST_DOTS = 80  # per variant; evenly thinned by rank, which leaves the distribution as it is
_OWN_FILE = re.compile(r"((accuracy-latency|latency|waterfall)-\d+|weights|memory)\.(svg|png)")
_LONGEST_LINE = 56  # characters that fit beside each other
_LONGEST_LABEL = 24
_ROW = 40.0  # points per variant
_BAR = 0.34  # of a row


def save_plots(
    records: Sequence[Record], baseline: str | None, folder: Path, chain: Sequence[Record] = ()
) -> list[Plot]:
    """Draw every figure the records have data for, write each as SVG and PNG into `folder`, and return them.

    `chain`: the variants of the waterfall. Figures that an earlier report left in `folder` are removed.
    Raises StorageError where it cannot be written.
    """
    with styled():
        plots = rendered(_figures(records, baseline, chain), folder)
    remove_others(folder, _OWN_FILE, plots)
    return plots


def accuracy_latency(records: Sequence[Record], batch_size: int, baseline: str | None = None) -> Figure | None:
    """Top-1 accuracy (Wilson interval) against median latency (whisker to p95), the Pareto front as a line.

    None with fewer than two variants that have both.
    """
    shown = [record for record in records if record.accuracy and record.latency_at(batch_size)]
    if len(shown) < 2:
        return None
    with styled():
        figure, axes = blank(300)
        x, y = _coordinates(shown, batch_size)
        front = pareto_front(x, y)
        # Along a step: what the next faster choice reaches holds until the next one is affordable.
        steps_x, steps_y = np.repeat(x[front], 2)[1:], np.repeat(y[front], 2)[:-1]
        axes.plot(steps_x, steps_y, color=INK, alpha=0.45, linewidth=1.2, zorder=1)
        for record, at_x, at_y in zip(shown, x, y, strict=True):
            _draw_point(axes, record, batch_size, at_x, at_y, is_baseline=record.variant.name == baseline)
        if x.max() > 8 * x.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(True)
        axes.tick_params(length=0)
        axes.margins(x=0.2, y=0.08)
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]) if axes.get_xscale() == "linear" else None)
        axes.set_xlabel(f"median latency at batch {batch_size}, ms")
        axes.set_ylabel("top-1 accuracy, %")
        label_points(figure, axes, [_point_label(record, baseline) for record in shown], x, y)
        return figure


def latency_samples(records: Sequence[Record], batch_size: int) -> Figure | None:
    """Every variant's samples as dots, with ticks at p50 (thick) and p95 (thin); None where nothing was timed."""
    shown = [(record, latency) for record in records if (latency := record.latency_at(batch_size))]
    if not shown:
        return None
    with styled():
        figure, axes = _rows(len(shown))
        edge = 1.15 * max(latency.p95_ms or max(latency.samples_ms, default=latency.p50_ms) for _, latency in shown)
        for place, (record, latency) in enumerate(shown):
            colour = colour_of(record.variant.format)
            samples = np.minimum(_thinned(latency.samples_ms), edge)
            # The golden ratio spreads neighbours apart without chance.
            heights = place + 0.14 * (2 * (np.arange(len(samples)) * 0.618034 % 1) - 1)
            axes.plot(samples, heights, "o", color=colour, alpha=0.45, markersize=3.2, markeredgewidth=0)
            axes.plot([latency.p50_ms] * 2, [place - 0.2, place + 0.2], color=colour, linewidth=2.6)
            text = f"p50 {milliseconds(latency.p50_ms)}"
            if latency.p95_ms is not None:
                axes.plot([latency.p95_ms] * 2, [place - 0.15, place + 0.15], color=colour, linewidth=1.1)
                text += f" · p95 {milliseconds(latency.p95_ms)}"
            if max(latency.samples_ms, default=0) > edge:
                text += f" · max {milliseconds(max(latency.samples_ms))}"
            _row_text(axes, place, record.variant.name, text)
        axes.set_xlim(0, edge)
        axes.set_xlabel(f"latency at batch {batch_size}, ms")
        return figure


def sizes(records: Sequence[Record]) -> Figure | None:
    """Bytes of the weights as bars, of the files on disk as a tick; None where no size is known."""
    shown = [(record, record.size) for record in records if record.size]
    if not shown:
        return None
    with styled():
        figure, axes = _rows(len(shown))
        for place, (record, size) in enumerate(shown):
            _bar(axes, place, size.weight_bytes / 1e6, record)
            text = human_bytes(size.weight_bytes)
            if size.disk_bytes is not None:
                axes.plot([size.disk_bytes / 1e6] * 2, [place - 0.22, place + 0.22], color=INK, linewidth=1.4)
                text += f" · on disk {human_bytes(size.disk_bytes)}"
            _row_text(axes, place, record.variant.name, text)
        axes.set_xlabel("weights in memory, MB; tick: files on disk")
        return figure


def memory(records: Sequence[Record]) -> Figure | None:
    """Peak memory as bars; None where it was not measured."""
    shown = [(record, record.memory) for record in records if record.memory]
    if not shown:
        return None
    with styled():
        figure, axes = _rows(len(shown))
        for place, (record, used) in enumerate(shown):
            _bar(axes, place, used.peak_bytes / 1e6, record)
            _row_text(axes, place, record.variant.name, human_bytes(used.peak_bytes))
        batch_size = shown[0][1].batch_size
        axes.set_xlabel(f"peak memory at batch {batch_size}, MB")
        return figure


def waterfall(bars: Sequence[Step], batch_size: int) -> Figure:
    """Median latency per step, with the ratio to the step before; what the step saved (or cost) is shaded.

    A tick marks the floor of a step where it is known.
    """
    with styled():
        figure, axes = _rows(len(bars))
        for place, step in enumerate(bars):
            p50 = step.latency.p50_ms
            _bar(axes, place, p50, step.record)
            text = f"{milliseconds(p50)} ms"
            if step.speedup is not None:
                before = bars[place - 1].latency.p50_ms
                axes.barh(place, before - p50, _BAR, left=p50, color=INK, alpha=0.1)
                text += f" · {_ratio_words(step.speedup)}"
            if step.latency.floor_ms is not None:
                axes.plot([step.latency.floor_ms] * 2, [place - 0.22, place + 0.22], color=INK, linewidth=1.4)
            _row_text(axes, place, step.record.variant.name, text)
        floors = [step.latency.floor_ms for step in bars if step.latency.floor_ms is not None]
        axes.set_xlim(0, 1.02 * max([*(step.latency.p50_ms for step in bars), *floors]))
        axes.set_xlabel(f"median latency at batch {batch_size}, ms" + ("; tick: floor" if floors else ""))
        return figure


def _figures(records: Sequence[Record], baseline: str | None, chain: Sequence[Record]) -> list[Drawable]:
    """Everything that might be drawn."""
    found: list[Drawable] = []
    for size in batch_sizes(records):
        words = _say(records, functools.partial(_accuracy_words, batch_size=size))
        figure = accuracy_latency(records, size, baseline)
        found.append((f"accuracy-latency-{size}", "accuracy", size, f"Batch size {size}", words, figure))
        words = _say(records, functools.partial(_latency_words, batch_size=size))
        found.append((f"latency-{size}", "latency", size, f"Batch size {size}", words, latency_samples(records, size)))
        if bars := steps(chain, size):
            words = _say([step.record for step in bars], functools.partial(_step_words, batch_size=size))
            figure = waterfall(bars, size)
            found.append((f"waterfall-{size}", "waterfall", size, f"Batch size {size}", words, figure))
    words = _say(records, lambda record: human_bytes(record.size.weight_bytes) if record.size else None)
    found.append(("weights", "size", None, "Weights", words, sizes(records)))
    words = _say(records, lambda record: human_bytes(record.memory.peak_bytes) if record.memory else None)
    found.append(("memory", "size", None, "Peak memory", words, memory(records)))
    return found


def _say(records: Sequence[Record], words: Callable[[Record], str | None]) -> str:
    said = [(record.variant.name, words(record)) for record in records]
    return "; ".join(f"{name} {text}" for name, text in said if text)


def _accuracy_words(record: Record, batch_size: int) -> str | None:
    latency = record.latency_at(batch_size)
    if latency is None or record.accuracy is None:
        return None
    return f"{milliseconds(latency.p50_ms)} ms and {record.accuracy.top1_percent:.1f} %"


def _latency_words(record: Record, batch_size: int) -> str | None:
    latency = record.latency_at(batch_size)
    if latency is None:
        return None
    tail = "" if latency.p95_ms is None else f", p95 {milliseconds(latency.p95_ms)} ms"
    return f"p50 {milliseconds(latency.p50_ms)} ms{tail}"


def _step_words(record: Record, batch_size: int) -> str | None:
    latency, words = record.latency_at(batch_size), _latency_words(record, batch_size)
    if latency is None or latency.floor_ms is None:
        return words
    return f"{words}, floor {milliseconds(latency.floor_ms)} ms"


def _ratio_words(speedup: Speedup) -> str:
    interval = speedup.interval
    return f"{speedup.ratio:.2f}x" + (f" ({interval.low:.2f} to {interval.high:.2f})" if interval else "")


def _rows(count: int) -> tuple[Figure, Axes]:
    """Axes with a row per variant from top to bottom and room for a line of text above each."""
    figure, axes = blank(_ROW * count + 40)
    axes.set_ylim(count - 0.65, -0.68)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.tick_params(length=0)
    for place in range(1, count):
        axes.axhline(place - 0.68, color=INK, alpha=0.12, linewidth=0.6)
    return figure, axes


def _row_text(axes: Axes, place: float, left: str, right: str) -> None:
    across = axes.get_yaxis_transform()
    room = max(12, _LONGEST_LINE - len(right))
    axes.text(0, place - 0.27, short(left, room), transform=across, va="bottom", ha="left")
    axes.text(1, place - 0.27, right, transform=across, va="bottom", ha="right", alpha=0.8)


def _bar(axes: Axes, place: int, length: float, record: Record) -> None:
    axes.barh(place, length, _BAR, color=colour_of(record.variant.format))


def short(name: str, longest: int) -> str:
    """The name, or both of its ends where it is longer: names often differ at the end."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


def _thinned(samples: Sequence[float]) -> np.ndarray:
    ordered = np.sort(np.asarray(samples, np.float64))
    if len(ordered) <= MOST_DOTS:
        return ordered
    return ordered[np.linspace(0, len(ordered) - 1, MOST_DOTS).round().astype(int)]


def _coordinates(records: Sequence[Record], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    points = [
        (latency.p50_ms, record.accuracy.top1_percent)
        for record in records
        if record.accuracy and (latency := record.latency_at(batch_size))
    ]
    x, y = np.asarray(points).T
    return x, y


def _draw_point(axes: Axes, record: Record, batch_size: int, x: float, y: float, is_baseline: bool) -> None:
    colour, latency = colour_of(record.variant.format), record.latency_at(batch_size)
    assert record.accuracy is not None and latency is not None
    low, high = record.accuracy.top1_ci95_percent
    axes.plot([x, x], [low, high], color=colour, alpha=0.4, linewidth=1.2, zorder=2)
    if latency.p95_ms is not None:
        axes.plot([x, latency.p95_ms], [y, y], color=colour, alpha=0.4, linewidth=1.2, zorder=2)
    face = "none" if is_baseline else colour
    axes.plot([x], [y], "o", markersize=7, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=2, zorder=3)


def _point_label(record: Record, baseline: str | None) -> str:
    name = short(record.variant.name, _LONGEST_LABEL)
    return f"{name} (baseline)" if record.variant.name == baseline else name
