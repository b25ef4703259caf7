"""Plots: records in, matplotlib figures out.

Figures are 400 points wide, so that their text is still legible when a phone scales them down. Names stand above
their bars instead of beside them: there they may be long.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from vitopt.formats import colour_of
from vitopt.measure.pareto import pareto_front
from vitopt.records import Record
from vitopt.report.figures import Plot, blank, remove_others, rendered, step_line, styled
from vitopt.report.labels import label_points
from vitopt.report.svg import INK
from vitopt.report.table import batch_sizes, human_bytes, milliseconds, with_interval
from vitopt.report.waterfall import Step, steps

MOST_DOTS = 80  # per variant; evenly thinned by rank, which leaves the distribution as it is
_OWN_FILE = re.compile(r"((accuracy-latency|latency|waterfall)-\d+|load|kl-weights|weights|memory)\.(svg|png)")
_LONGEST_LINE = 56  # characters that fit beside each other
_LONGEST_LABEL = 24
_ROW = 40.0  # points per variant
_BAR = 0.34  # of a row
_LEAST_KL = 1e-5  # nats; what is less stands at the edge of a logarithmic axis


def save_plots(
    records: Sequence[Record], baseline: str | None, folder: Path, chain: Sequence[Record] = ()
) -> list[Plot]:
    """Draw every figure the records have data for, write each as SVG and PNG into `folder`, and return them.

    `chain`: the variants of the waterfall. Figures that an earlier report left in `folder` are removed.
    Raises StorageError where it cannot be written.
    """
    drawn: list[Plot] = []
    for size in batch_sizes(records):
        for name, kind, what, figure in (
            ("accuracy-latency", "accuracy", "Accuracy against latency", accuracy_latency(records, size, baseline)),
            ("latency", "latency", "Latency of every call", latency_samples(records, size)),
            ("waterfall", "waterfall", "Latency, one technique at a time", waterfall(steps(chain, size), size)),
        ):
            title = f"Batch size {size}"
            drawn.append(Plot(f"{name}-{size}", kind, title, f"{what}. {title}", figure, size))
    drawn.append(Plot("load", "serving", "Latency against load", "p50 and p99 at each rate", latency_load(records)))
    drawn.append(Plot("kl-weights", "size", "What bytes keep", "KL against bytes of weights", kl_weights(records)))
    drawn.append(Plot("weights", "size", "Weights", "Weights in memory and on disk", sizes(records)))
    drawn.append(Plot("memory", "size", "Peak memory", "Peak memory", memory(records)))
    plots = rendered(drawn, folder)
    remove_others(folder, _OWN_FILE, plots)
    return plots


@styled()
def accuracy_latency(records: Sequence[Record], batch_size: int, baseline: str | None = None) -> Figure | None:
    """Top-1 accuracy (Wilson interval) against median latency (whisker to p95), the Pareto front as a line.

    Of an adaptive model it is the mean, as its median does not know the images that take longer. None with
    fewer than two variants that have both.
    """
    shown = [
        (record, record.accuracy, latency)
        for record in records
        if record.accuracy and (latency := record.latency_at(batch_size))
    ]
    if len(shown) < 2:
        return None
    figure, axes = blank(300)
    x = np.array([latency.typical_ms for *_, latency in shown])
    y = np.array([accuracy.top1_percent for _, accuracy, _ in shown])
    step_line(axes, x, y, pareto_front(x, y))
    labels = []
    for record, accuracy, latency in shown:
        name, colour = short(record.variant.name, _LONGEST_LABEL), colour_of(record.variant.format)
        is_baseline = record.variant.name == baseline
        labels.append(f"{name} (baseline)" if is_baseline else name)
        at_x, at_y = latency.typical_ms, accuracy.top1_percent
        whisker: dict[str, Any] = {"color": colour, "alpha": 0.4, "linewidth": 1.2, "zorder": 2}
        axes.plot([at_x, at_x], accuracy.top1_ci95_percent, **whisker)
        if latency.p95_ms is not None:
            axes.plot([at_x, latency.p95_ms], [at_y, at_y], **whisker)
        face = "none" if is_baseline else colour
        axes.plot(at_x, at_y, "o", color=colour, markersize=7, markerfacecolor=face, markeredgewidth=2, zorder=3)
    axes.margins(x=0.2, y=0.08)
    if x.max() > 8 * x.min():
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    else:
        axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    axes.grid(True)
    typical = "median (adaptive: mean)" if any(latency.by_mean for *_, latency in shown) else "median"
    axes.set(xlabel=f"{typical} latency at batch {batch_size}, ms", ylabel="top-1 accuracy, %")
    label_points(figure, axes, labels, x, y)
    return figure


@styled()
def latency_samples(records: Sequence[Record], batch_size: int) -> Figure | None:
    """Every variant's samples as dots, with ticks at p50 (thick) and p95 (thin); None where nothing was timed."""
    shown = [(record, latency) for record in records if (latency := record.latency_at(batch_size))]
    if not shown:
        return None
    edge = 1.15 * max(latency.p95_ms or max(latency.samples_ms, default=latency.p50_ms) for _, latency in shown)
    texts = []
    for record, latency in shown:
        longest = max(latency.samples_ms, default=0)
        known = {"p50": latency.p50_ms, "p95": latency.p95_ms, "max": longest if longest > edge else None}
        texts.append((record, " · ".join(f"{name} {milliseconds(ms)}" for name, ms in known.items() if ms is not None)))
    figure, axes = _rows(texts, f"latency at batch {batch_size}, ms")
    for place, (record, latency) in enumerate(shown):
        colour = colour_of(record.variant.format)
        samples = np.sort(np.minimum(latency.samples_ms, edge))
        if len(samples) > MOST_DOTS:
            samples = samples[np.linspace(0, len(samples) - 1, MOST_DOTS).round().astype(int)]
        # The golden ratio spreads neighbours apart without chance.
        heights = place + 0.14 * (2 * (np.arange(len(samples)) * 0.618034 % 1) - 1)
        axes.plot(samples, heights, "o", color=colour, alpha=0.45, markersize=3.2, markeredgewidth=0)
        _tick(axes, place, latency.p50_ms, 0.2, colour, 2.6)
        if latency.p95_ms is not None:
            _tick(axes, place, latency.p95_ms, 0.15, colour, 1.1)
    axes.set_xlim(0, edge)
    return figure


@styled()
def latency_load(records: Sequence[Record]) -> Figure | None:
    """p99 (its interval as a whisker) and below it p50 against requests per second; None where nothing was served.

    p99 is hollow where requests were refused or failed, and takes 100 answers; the targets are dotted.
    """
    shown = [
        (record, rates)
        for record in records
        if record.serving and (rates := [(one, one.latency) for one in record.serving.rates if one.latency])
    ]
    if not shown:
        return None
    figure, axes = blank(300)
    ends = []
    for record, rates in shown:
        colour = colour_of(record.variant.format)
        axes.plot(
            *zip(*((one.rate, of.p50_ms) for one, of in rates), strict=True), color=colour, alpha=0.45, linewidth=1.2
        )
        known = [(one, of, of.p99_ms) for one, of in rates if of.p99_ms is not None]
        for one, of, p99 in known:
            low, high = of.p99_ci95_ms
            axes.plot([one.rate] * 2, [low or p99, high or p99], color=colour, alpha=0.4, linewidth=1.2)
            face = colour if one.answered == one.sent else "none"
            axes.plot(one.rate, p99, "o", color=colour, markersize=5, markerfacecolor=face)
        axes.plot([one.rate for one, *_ in known], [p99 for *_, p99 in known], color=colour, linewidth=1.6)
        last = (known[-1][0].rate, known[-1][2]) if known else (rates[-1][0].rate, rates[-1][1].p50_ms)
        ends.append((short(record.variant.name, _LONGEST_LABEL), *last))
    for target in {record.serving.target_p99_ms for record, _ in shown if record.serving}:
        if target is not None:
            axes.axhline(target, color=INK, alpha=0.8, linewidth=1.4, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.1, y=0.08)
    axes.set_xlim(left=0)
    axes.grid(True)
    axes.set(xlabel="requests/s", ylabel="latency, ms")
    names, x_ends, y_ends = zip(*ends, strict=True)
    label_points(figure, axes, names, np.array(x_ends), np.array(y_ends))
    return figure


@styled()
def kl_weights(records: Sequence[Record]) -> Figure | None:
    """KL divergence from the baseline (its interval as a whisker) against bytes of weights, the Pareto front as a line.

    None where fewer than three variants, or variants of one size alone, have both.
    """
    shown = [
        (record, versus, record.size.weight_bytes / 1e6)
        for record in records
        if (versus := record.versus_baseline) and versus.mean_kl_divergence is not None and record.size
    ]
    if len(shown) < 3 or len({megabytes for *_, megabytes in shown}) < 2:
        return None
    figure, axes = blank(300)
    x = np.array([megabytes for *_, megabytes in shown])
    y = np.array([max(versus.mean_kl_divergence, _LEAST_KL) for _, versus, _ in shown])
    step_line(axes, x, y, pareto_front(x, -y))
    for (record, versus, megabytes), kl in zip(shown, y, strict=True):
        colour = colour_of(record.variant.format)
        if versus.kl_ci95:
            within = [max(end, _LEAST_KL) for end in versus.kl_ci95]
            axes.plot([megabytes, megabytes], within, color=colour, alpha=0.4, linewidth=1.2, zorder=2)
        axes.plot(megabytes, kl, "o", color=colour, markersize=7, zorder=3)
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.margins(x=0.2, y=0.08)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
    axes.grid(True)
    axes.set(xlabel="weights in memory, MB", ylabel="KL divergence, nats")
    label_points(figure, axes, [short(record.variant.name, _LONGEST_LABEL) for record, *_ in shown], x, y)
    return figure


def sizes(records: Sequence[Record]) -> Figure | None:
    """Bytes of the weights as bars, of the files on disk as a tick; None where no size is known."""
    bars: list[_Bar] = []
    for record, size in ((record, record.size) for record in records if record.size):
        disk = "" if size.disk_bytes is None else f" · on disk {human_bytes(size.disk_bytes)}"
        tick = None if size.disk_bytes is None else size.disk_bytes / 1e6
        bars.append((record, human_bytes(size.weight_bytes) + disk, size.weight_bytes / 1e6, tick))
    return _bars(bars, "weights in memory, MB; tick: files on disk")


def memory(records: Sequence[Record]) -> Figure | None:
    """Peak memory as bars; None where it was not measured."""
    shown = [(record, record.memory) for record in records if record.memory]
    bars = [(record, human_bytes(used.peak_bytes), used.peak_bytes / 1e6, None) for record, used in shown]
    return _bars(bars, f"peak memory at batch {shown[0][1].batch_size}, MB" if shown else "")


@styled()
def waterfall(chain: Sequence[Step], batch_size: int) -> Figure | None:
    """Median latency per step, with the ratio to the step before; what the step saved (or cost) is shaded.

    A tick marks the floor of a step where it is known. None without steps.
    """
    bars: list[_Bar] = []
    for step in chain:
        words = f"{milliseconds(step.latency.typical_ms)} ms"
        if speedup := step.speedup:
            within = (speedup.interval.low, speedup.interval.high) if speedup.interval else None
            words += f" · {with_interval('{:.2f}x'.format, speedup.ratio, within)}"
        bars.append((step.record, words, step.latency.typical_ms, step.latency.floor_ms))
    known = [bar for *_, bar in bars if bar is not None]
    figure = _bars(bars, f"median latency at batch {batch_size}, ms" + ("; tick: floor" if known else ""))
    if figure is not None:
        (axes,) = figure.axes
        for place, (before, after) in enumerate(itertools.pairwise(length for *_, length, _ in bars), 1):
            axes.barh(place, before - after, _BAR, left=after, color=INK, alpha=0.1)
        axes.set_xlim(0, 1.02 * max([*(length for *_, length, _ in bars), *known]))
    return figure


_Bar = tuple[Record, str, float, float | None]  # with a text, a length, and where a tick stands


@styled()
def _bars(bars: Sequence[_Bar], label: str) -> Figure | None:
    if not bars:
        return None
    figure, axes = _rows([(record, words) for record, words, *_ in bars], label)
    for place, (record, _, length, tick) in enumerate(bars):
        axes.barh(place, length, _BAR, color=colour_of(record.variant.format))
        if tick is not None:
            _tick(axes, place, tick)
    return figure


def _rows(texts: Sequence[tuple[Record, str]], label: str) -> tuple[Figure, Axes]:
    """Axes with a row per variant from top to bottom, its name and a text above each."""
    figure, axes = blank(_ROW * len(texts) + 40)
    axes.set_ylim(len(texts) - 0.65, -0.68)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.set_xlabel(label)
    across = axes.get_yaxis_transform()
    for place, (record, text) in enumerate(texts):
        if place:
            axes.axhline(place - 0.68, color=INK, alpha=0.12, linewidth=0.6)
        name = short(record.variant.name, max(12, _LONGEST_LINE - len(text)))
        axes.text(0, place - 0.27, name, transform=across, va="bottom", ha="left")
        axes.text(1, place - 0.27, text, transform=across, va="bottom", ha="right", alpha=0.8)
    return figure, axes


def _plain_ticks(axis: Axis) -> None:
    """Numbers, not powers, along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _tick(axes: Axes, place: int, at: float, half: float = 0.22, colour: str = INK, width: float = 1.4) -> None:
    axes.plot([at, at], [place - half, place + half], color=colour, linewidth=width)


def short(name: str, longest: int) -> str:
    """The name, or both of its ends where it is longer: names often differ at the end."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"
