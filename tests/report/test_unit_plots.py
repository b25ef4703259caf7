import re
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_hex, to_rgba

from vitopt.formats import colour_of
from vitopt.report import unit_plots
from vitopt.report.figures import rendered
from vitopt.search.goal import Goal


def marks(axes):
    """Single dots as (x, y, filled), without the rings."""
    return [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() != "none")
        for line in axes.get_lines()
        if line.get_marker() == "o" and line.get_markersize() < 10
    ]


def test_bars_are_damage_and_what_is_brought_back_in_order_of_blocks(make: SimpleNamespace):
    result = make.sensitivity(12)

    damage, recovery = unit_plots.unit_bars(result).axes

    assert [bar.get_width() for bar in damage.patches] == pytest.approx([unit.damage.kl for unit in result.units])
    back = [result.quantized.kl - unit.recovery.kl for unit in result.units]
    assert [bar.get_width() for bar in recovery.patches] == pytest.approx(back)
    assert min(back) < 0  # one that makes things worse
    assert [label.get_text() for label in damage.get_yticklabels()] == [str(block) for block in range(12)]
    assert damage.yaxis_inverted()


def test_bars_have_the_colour_of_the_format_that_the_plan_gives(make: SimpleNamespace):
    result = make.sensitivity(12)

    for axes in unit_plots.unit_bars(result).axes:
        kept = [to_hex(bar.get_facecolor()) == colour_of("bf16") for bar in axes.patches]
        assert kept == [unit.unit in result.search.chosen for unit in result.units]


def test_the_map_has_a_cell_per_layer_and_outlines_the_kept(make: SimpleNamespace):
    result = make.sensitivity(24, "linear")
    names = [unit.unit for unit in result.units]
    best, *_, worst = sorted(result.units, key=lambda unit: unit.recovery.kl)

    damage, recovery = (axes.patches for axes in unit_plots.layer_map(result).axes)

    assert len(damage) == len(recovery) == 144
    assert recovery[names.index(best.unit)].get_facecolor() == to_rgba(colour_of("bf16"), 1.0)
    assert to_hex(recovery[names.index(worst.unit)].get_facecolor()) == colour_of("nf4")
    outlined = {name for name, bar in zip(names, recovery, strict=True) if bar.get_edgecolor()[3]}
    assert outlined == set(result.search.chosen)


def test_whole_blocks_and_few_scores_have_no_map(make: SimpleNamespace):
    assert unit_plots.layer_map(make.sensitivity(12)) is None
    assert unit_plots.layer_map(make.sensitivity(12, "linear", sample=8)) is None


def test_all_skip_lists_are_dots_and_the_front_is_a_line(make: SimpleNamespace):
    result = make.sensitivity(12)
    points = result.search.points

    (axes,) = unit_plots.cost_front(result, "size").axes

    assert marks(axes) == [(point.extra_bytes / 1e6, point.loss.kl, point.within_target) for point in points]
    front = axes.get_lines()[0].get_ydata()
    assert front[0] == result.quantized.kl
    assert list(front) == sorted(front, reverse=True)
    chosen = next(point for point in points if point.skip == result.search.chosen)
    (ring,) = (line for line in axes.get_lines() if line.get_markersize() > 10)
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (chosen.extra_bytes / 1e6, chosen.loss.kl)
    assert [text.get_text() for text in axes.texts] == ["all nf4", f"chosen: {len(chosen.skip)} blocks"]


def test_nothing_kept_is_labelled_as_the_choice(make: SimpleNamespace):
    result = make.sensitivity(6)
    search = result.search.model_copy(update={"chosen": ()})

    axes = unit_plots.cost_front(result.model_copy(update={"search": search}), "size").axes[0]

    assert [text.get_text() for text in axes.texts] == ["chosen: all nf4"]


def test_figures_without_data_are_left_out(make: SimpleNamespace):
    untimed, unsearched = make.sensitivity(4, extra_ms=None), make.sensitivity(4, goal=None)
    met_at_once = make.sensitivity(4, goal=Goal(max_top1_drop=50))
    bare = tuple(unit.model_copy(update={"damage": None, "recovery": None}) for unit in untimed.units)

    def names(result):
        return [plot.name for plot in unit_plots.drawables(result, "x") if plot.figure]

    assert names(make.sensitivity(4)) == ["x-units", "x-size", "x-time"]
    assert names(make.sensitivity(4, "linear")) == ["x-map", "x-size", "x-time"]
    assert names(make.sensitivity(4, "linear", sample=4))[0] == "x-units"
    assert names(untimed) == ["x-units", "x-size"]
    assert names(unsearched) == names(met_at_once) == ["x-units"]
    assert names(unsearched.model_copy(update={"units": bare})) == []


def test_losses_of_nothing_are_drawn(make: SimpleNamespace):
    nothing = make.loss(0.0)
    result = make.sensitivity(3, goal=None, quantized=nothing)
    units = tuple(unit.model_copy(update={"damage": nothing, "recovery": nothing}) for unit in result.units)

    plots = rendered(unit_plots.drawables(result.model_copy(update={"units": units}), "x"), None)

    assert [plot.name for plot in plots] == ["x-units"]


def test_small_divergences_keep_two_digits():
    said = [unit_plots.kl_words(kl) for kl in (0.0, 0.11114, 0.0008, 0.0000021)]

    assert said == ["0.0000", "0.1111", "0.00080", "2.1e-06"]


def test_nothing_in_a_figure_is_black_or_white_on_its_own(make: SimpleNamespace):
    """What is to be read on a light and on a dark page has the colour of the text around it."""
    results = [make.sensitivity(12), make.sensitivity(6, "linear")]

    drawn = [plot for result in results for plot in rendered(unit_plots.drawables(result, "x"), None)]

    assert len(drawn) == 6
    for plot in drawn:
        assert not re.search(r"(stroke|fill): ?#(000000|ffffff)", plot.svg), plot.name
