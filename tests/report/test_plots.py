import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from vitopt import storage
from vitopt.records import Memory
from vitopt.report import plots
from vitopt.report.waterfall import steps


def words(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_every_figure_is_saved_as_svg_and_png(comparison, tmp_path):
    records = comparison[0]

    found = plots.save_plots(records, "fp32", tmp_path / "plots", records[:3])

    assert [plot.name for plot in found] == [
        "accuracy-latency-1",
        "latency-1",
        "waterfall-1",
        "accuracy-latency-8",
        "latency-8",
        "waterfall-8",
        "weights",
    ]
    for plot in found:
        assert (tmp_path / "plots" / f"{plot.name}.svg").read_text() == plot.svg
        assert Image.open(tmp_path / "plots" / f"{plot.name}.png").width == 800


def test_figures_are_the_same_every_time(comparison, tmp_path):
    once, again = (plots.save_plots(comparison[0], "fp32", tmp_path / name) for name in "ab")

    assert once == again
    for plot in once:
        file = f"{plot.name}.png"
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_figures_of_an_earlier_report_go_and_other_files_stay(comparison, tmp_path):
    folder = tmp_path / "plots"
    with storage.claimed(folder):
        for name in ("latency-64.svg", "waterfall-1.png", "memory.png"):
            storage.write_text(folder / name, "old")
    for name in ("mine.svg", "latency-128.svg"):  # the last has the name of a figure, and is on no list
        (folder / name).write_text("old")

    plots.save_plots(comparison[0][:2], "fp32", folder)

    left = {path.name for path in folder.iterdir() if path.read_bytes() == b"old"}
    assert left == {"mine.svg", "latency-128.svg"}


def test_svg_is_ready_to_stand_inside_a_page(comparison, tmp_path):
    found = plots.save_plots(comparison[0], "fp32", tmp_path / "plots")

    ids = [name for plot in found for name in re.findall(r' id="([^"]+)"', plot.svg)]
    assert len(ids) == len(set(ids))
    for plot in found:
        root = ElementTree.fromstring(plot.svg)
        assert root.get("role") == "img"
        assert root.get("aria-label") == plot.alt
        assert root.get("width") is None
        assert "currentColor" in plot.svg
        assert not re.search(r"<style|<metadata|DejaVu|<script", plot.svg)
        used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', plot.svg)
        assert {name for pair in used for name in pair if name} == set(re.findall(r' id="([^"]+)"', plot.svg))


def test_names_are_escaped_and_not_read_as_mathematics(make: SimpleNamespace, tmp_path):
    name = '<b>$a_1$ & "x"'

    found = plots.save_plots([make.record(name, p50_ms={1: 3.0})], None, tmp_path / "plots")

    svg = next(plot.svg for plot in found if plot.name == "latency-1")
    root = ElementTree.fromstring(svg)
    assert name in [element.text for element in root.iter()]


def test_pareto_front_leads_along_steps(make: SimpleNamespace):
    good, bad = make.predictions(), make.predictions(wrong=range(8))
    records = [
        make.record("fast", "nf4", p50_ms={1: 2.0}, predictions=bad),
        make.record("slow", p50_ms={1: 5.0}, predictions=good),
        make.record("beaten", "int8", p50_ms={1: 7.0}, predictions=bad),
    ]

    front = plots.accuracy_latency(records, 1, "slow").axes[0].get_lines()[0]

    assert front.get_xdata() == pytest.approx([2.0, 5.0, 5.0])
    assert front.get_ydata() == pytest.approx([80.0, 80.0, 100.0])


def test_bytes_against_kl_leads_along_what_no_smaller_one_beats(make: SimpleNamespace):
    against, baseline = make.predictions(), {"baseline": ("fp32", make.predictions())}
    records = [
        make.record("fp32", predictions=against),
        make.record("small", "nf4", predictions=make.predictions(wrong=range(8)), weight_bytes=3_000_000, **baseline),
        make.record("beaten", "int4", predictions=make.predictions(wrong=range(9)), weight_bytes=4_000_000, **baseline),
        make.record("good", "w8a8", predictions=make.predictions(wrong=range(2)), weight_bytes=6_000_000, **baseline),
    ]

    figure = plots.kl_weights(records)

    (axes,) = figure.axes
    kl = {record.variant.name: record.versus_baseline.mean_kl_divergence for record in records[1:]}
    assert axes.get_lines()[0].get_xdata() == pytest.approx([3.0, 6.0, 6.0])
    assert axes.get_lines()[0].get_ydata() == pytest.approx([kl["small"], kl["small"], kl["good"]])
    assert {"small", "beaten", "good"} <= set(words(figure))
    figure.draw_without_rendering()
    assert all(float(label.get_text()) > 0 for label in axes.get_yticklabels())  # numbers, no mathematics
    assert plots.kl_weights(records[:3]) is None
    assert plots.kl_weights([record.model_copy(update={"size": records[1].size}) for record in records]) is None


def test_points_show_their_intervals(make: SimpleNamespace):
    records = [
        make.record(name, p50_ms={1: ms}, predictions=make.predictions(wrong=(0,))) for name, ms in [("a", 2), ("b", 4)]
    ]
    low, high = records[0].accuracy.top1_ci95_percent

    lines = [tuple(map(tuple, line.get_xydata())) for line in plots.accuracy_latency(records, 1).axes[0].get_lines()]

    assert ((2.0, low), (2.0, high)) in lines
    assert ((2.0, 97.5), (records[0].latency[0].p95_ms, 97.5)) in lines


def test_labels_do_not_cover_each_other(make: SimpleNamespace):
    same = make.predictions(wrong=(0,))
    records = [make.record(f"variant-{i}", p50_ms={1: 10 + 0.1 * i}, predictions=same) for i in range(6)]

    figure = plots.accuracy_latency(records, 1, "variant-0")
    figure.draw_without_rendering()

    # Without the lines that lead to them.
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert words(figure)[0] == "variant-0 (baseline)"
    overlapping = [(i, j) for i in range(6) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert overlapping == []


def test_widely_spread_latencies_get_a_logarithmic_axis(make: SimpleNamespace):
    same = make.predictions()
    records = [make.record(name, p50_ms={1: ms}, predictions=same) for name, ms in [("a", 2.0), ("b", 40.0)]]

    assert plots.accuracy_latency(records, 1).axes[0].get_xscale() == "log"
    assert plots.accuracy_latency(records[:1], 1) is None


def test_latency_shows_every_variant_that_was_timed(comparison):
    figure = plots.latency_samples(comparison[0], 8)

    assert words(figure)[::2] == ["fp32", "bf16", "nf4"]
    assert words(figure)[1].startswith("p50 180.0 · p95 ")


def test_many_samples_are_thinned_and_far_ones_named(make: SimpleNamespace):
    latency = make.latency(1, 10.0, count=1000)
    latency = latency.model_copy(update={"samples_ms": (*latency.samples_ms[:-1], 99.0)})

    figure = plots.latency_samples([make.record("a", latency=(latency,))], 1)

    dots = figure.axes[0].get_lines()[0]
    assert len(dots.get_xdata()) == plots.MOST_DOTS
    assert np.max(dots.get_xdata()) == pytest.approx(1.15 * latency.p95_ms)
    assert words(figure)[1].endswith("max 99.00")


def test_waterfall_names_each_step_with_its_ratio(comparison):
    records = comparison[0]

    figure = plots.waterfall(steps(records[:3], 1), 1)

    assert words(figure) == [
        "fp32",
        "30.00 ms",
        "bf16",
        "20.00 ms · 1.50x (1.50x to 1.50x)",
        "nf4",
        "24.00 ms · 0.83x (0.83x to 0.83x)",
    ]


def test_waterfall_marks_the_floor_of_each_step(make: SimpleNamespace):
    records = [
        make.record("fp32", "fp32", p50_ms={1: 8.0}, floor_ms={1: 2.0}),
        make.record("bf16", "bf16", p50_ms={1: 4.0}, floor_ms={1: 0.5}),
        make.record("fused-qkv", "bf16", p50_ms={1: 3.0}, floor_ms={1: 0.5}),
    ]

    axes = plots.waterfall(steps(records, 1), 1).axes[0]

    ticks = [line.get_xdata()[0] for line in axes.get_lines() if line.get_xdata()[0] == line.get_xdata()[1]]
    assert ticks == pytest.approx([2.0, 0.5, 0.5])
    assert axes.get_xlabel() == "median latency at batch 1, ms; tick: floor"


def test_sizes_and_memory_are_bars_with_their_figures(make: SimpleNamespace):
    used = Memory(peak_bytes=1_500_000_000, kind="cuda_allocated", batch_size=4)
    records = [make.record("a", memory=used), make.record("b", weight_bytes=None)]

    assert words(plots.sizes(records)) == ["a", "20 MB · on disk 20 MB"]
    assert words(plots.memory(records)) == ["a", "1.50 GB"]
    assert "batch 4" in plots.memory(records).axes[0].get_xlabel()


def test_nothing_to_draw_gives_no_figure(make: SimpleNamespace, tmp_path):
    records = [make.record("a", failure="no", weight_bytes=None)]

    assert plots.latency_samples(records, 1) is None
    assert plots.sizes(records) is None
    assert plots.memory(records) is None
    assert plots.save_plots(records, None, tmp_path / "plots") == []


def test_long_names_keep_both_ends():
    assert plots.short("nf4", 10) == "nf4"
    assert plots.short("vit-base-nf4-skip-21", 11) == "vit-b…ip-21"
