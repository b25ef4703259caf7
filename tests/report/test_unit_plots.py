import itertools
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


@pytest.mark.parametrize(("blocks", "granularity", "rows"), [(12, "block", 12), (24, "block", 24), (24, "linear", 24)])
def test_every_unit_is_a_row_in_order_of_blocks(make: SimpleNamespace, blocks, granularity, rows):
    figure = unit_plots.unit_bars(make.sensitivity(blocks, granularity), "damage")

    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == rows
    assert [int(label.split()[0]) for label in labels] == sorted(int(label.split()[0]) for label in labels)
    assert figure.axes[0].yaxis_inverted()


def test_damage_bars_begin_at_zero_and_recovery_bars_at_the_quantized_model(make: SimpleNamespace):
    result = make.sensitivity(12)

    damage, recovery = (unit_plots.unit_bars(result, table).axes[0] for table in ("damage", "recovery"))

    assert [bar.get_x() for bar in damage.patches] == [0] * 12
    assert [bar.get_width() for bar in damage.patches] == pytest.approx([unit.damage.kl for unit in result.units])
    ends = [bar.get_x() + bar.get_width() for bar in recovery.patches]
    assert ends == pytest.approx([unit.recovery.kl for unit in result.units])
    assert {bar.get_x() for bar in recovery.patches} == {result.quantized.kl}
    assert any(end > result.quantized.kl for end in ends)  # one that makes things worse
    assert recovery.get_lines()[0].get_xdata() == [result.quantized.kl] * 2
    assert recovery.texts[0].get_text() == "all nf4 0.1200"


def test_bars_have_the_colour_of_the_format_that_the_plan_gives(make: SimpleNamespace):
    result = make.sensitivity(12)

    axes = unit_plots.unit_bars(result, "recovery").axes[0]

    kept = [to_hex(bar.get_facecolor()) == colour_of("bf16") for bar in axes.patches]
    assert kept == [unit.unit in result.search.chosen for unit in result.units]
    assert 0 < sum(kept) < 12


def test_the_change_of_top1_has_its_interval_and_is_filled_where_that_excludes_none(make: SimpleNamespace):
    result = make.sensitivity(8, goal=None)
    lost = make.loss(0.1, flips=40)
    units = (result.units[0].model_copy(update={"damage": lost}), *result.units[1:])

    axes = unit_plots.unit_bars(result.model_copy(update={"units": units}), "damage").axes[1]

    assert tuple(axes.get_lines()[0].get_xdata()) == lost.top1_delta_ci95_points
    assert [filled for *_, filled in marks(axes)] == [True] + [False] * 7
    assert [x for x, *_ in marks(axes)] == [unit.damage.top1_delta_points for unit in units]


def test_ticks_of_small_figures_do_not_run_into_each_other(make: SimpleNamespace):
    for result in (make.sensitivity(24, "linear"), make.sensitivity(12), make.sensitivity(12, images=100_000)):
        for table in ("damage", "recovery"):
            figure = unit_plots.unit_bars(result, table)
            figure.draw_without_rendering()
            for axes in figure.axes:
                low, high = axes.get_xlim()
                boxes = [
                    label.get_window_extent()
                    for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
                    if low <= tick <= high
                ]
                assert len(boxes) > 0
                assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_the_map_has_a_cell_per_layer_and_outlines_the_kept(make: SimpleNamespace):
    result = make.sensitivity(24, "linear")
    best = min(result.units, key=lambda unit: unit.recovery.kl)
    worst = max(result.units, key=lambda unit: unit.recovery.kl)

    figure = unit_plots.layer_map(result)

    damage, recovery = ([bar for bar in axes.patches if bar.get_fill()] for axes in figure.axes)
    assert len(damage) == len(recovery) == 144
    names = [unit.unit for unit in result.units]
    assert recovery[names.index(best.unit)].get_facecolor() == to_rgba(colour_of("bf16"), 1.0)
    assert to_hex(recovery[names.index(worst.unit)].get_facecolor()) == colour_of("nf4")
    outlined = [bar for bar in figure.axes[1].patches if not bar.get_fill()]
    assert len(outlined) == len(result.search.chosen)


def test_whole_blocks_and_few_scores_have_no_map(make: SimpleNamespace):
    assert unit_plots.layer_map(make.sensitivity(12)) is None
    assert unit_plots.layer_map(make.sensitivity(12, "linear", sample=8)) is None


def test_all_skip_lists_are_dots_and_the_front_is_a_line(make: SimpleNamespace):
    result = make.sensitivity(12)
    points = result.search.points

    upper, lower = unit_plots.cost_front(result, "size").axes

    expected = [(point.extra_bytes / 1e6, point.loss.kl, point.within_target) for point in points]
    assert marks(upper) == expected
    assert [y for _, y, _ in marks(lower)] == [-point.loss.top1_delta_points for point in points]
    front = upper.get_lines()[0].get_ydata()
    assert front[0] == result.quantized.kl
    assert list(front) == sorted(front, reverse=True)
    chosen = next(point for point in points if point.skip == result.search.chosen)
    rings = [line for line in upper.get_lines() if line.get_markersize() > 10]
    assert [(ring.get_xdata()[0], ring.get_ydata()[0]) for ring in rings] == [
        (chosen.extra_bytes / 1e6, chosen.loss.kl)
    ]
    for axes in (upper, lower):
        assert [text.get_text() for text in axes.texts] == ["all nf4", f"chosen: {len(chosen.skip)} blocks"]
    low, high = chosen.loss.top1_delta_ci95_points
    assert [-low, -high] in [list(line.get_ydata()) for line in lower.get_lines()]


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
        return [plot.name for plot in rendered(unit_plots.drawables(result, "x"), None)]

    assert names(make.sensitivity(4)) == ["x-damage", "x-recovery", "x-size", "x-time"]
    assert names(make.sensitivity(4, "linear"))[2] == "x-map"
    assert names(untimed) == ["x-damage", "x-recovery", "x-size"]
    assert names(unsearched) == names(met_at_once) == ["x-damage", "x-recovery"]
    assert names(unsearched.model_copy(update={"units": bare})) == []


def test_losses_of_nothing_are_drawn(make: SimpleNamespace):
    nothing = make.loss(0.0)
    result = make.sensitivity(3, goal=None, quantized=nothing)
    units = tuple(unit.model_copy(update={"damage": nothing, "recovery": nothing}) for unit in result.units)

    plots = rendered(unit_plots.drawables(result.model_copy(update={"units": units}), "x"), None)

    assert [plot.name for plot in plots] == ["x-damage", "x-recovery"]


def test_small_divergences_keep_two_digits():
    assert [unit_plots.kl_words(kl) for kl in (0.0, 0.11114, 0.0008, 0.0000021)] == [
        "0.0000",
        "0.1111",
        "0.00080",
        "2.1e-06",
    ]


def test_nothing_in_a_figure_is_black_or_white_on_its_own(make: SimpleNamespace):
    """What is to be read on a light and on a dark page has the colour of the text around it."""
    results = [make.sensitivity(24), make.sensitivity(12, "linear", images=60)]

    drawn = [plot for result in results for plot in rendered(unit_plots.drawables(result, "x"), None)]

    assert len(drawn) == 9
    for plot in drawn:
        assert not re.search(r"(stroke|fill): ?#(000000|ffffff)", plot.svg), plot.name
