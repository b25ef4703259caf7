import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from report.test_page import EVIL, Reader, widths_in_a_browser
from typer.testing import CliRunner

from vitopt import storage
from vitopt.cli import app
from vitopt.errors import RecordError
from vitopt.layers import LINEARS
from vitopt.report import sensitivity
from vitopt.report.page import write_report
from vitopt.report.sensitivity import analysis_of, write_sensitivity_page
from vitopt.search.goal import Goal
from vitopt.search.results import save_sensitivity


def page_of(result, folder: Path) -> str:
    save_sensitivity(result, folder / "sensitivity.json")
    return write_sensitivity_page(folder / "sensitivity.json").read_text()


@pytest.fixture(scope="module")
def run(comparison, make: SimpleNamespace, tmp_path_factory):
    """The report of a run with two analyses, and with what interrupted and broken ones leave."""
    folder = make.run(tmp_path_factory.mktemp("sensitivity") / "run", *comparison)
    (folder / "sensitivity").mkdir()
    save_sensitivity(make.sensitivity(12, goal=Goal(max_top1_drop=0.5)), folder / "sensitivity" / "nf4.json")
    save_sensitivity(make.sensitivity(8, "linear"), folder / "sensitivity" / "bf16.json")
    for name in ("nf4", "v1.5"):
        (folder / "sensitivity" / f"{name}.partial.json").write_text("{}")
    (folder / "sensitivity" / "old.json").write_text("{}")
    write_report(folder)
    return folder


# Words


def test_the_answer_says_what_to_keep_and_whether_the_goal_is_shown(make: SimpleNamespace):
    result = make.sensitivity(12)
    analysis = analysis_of("nf4", result)

    assert analysis.answer.startswith(f"Keep {len(result.search.chosen)} of 12 blocks in bf16, the rest in nf4.")
    assert result.search.goal in analysis.answer and "is shown to be met on 1,200 images" in analysis.answer
    assert analysis.skip == f"skip: [{', '.join(result.search.chosen)}]"
    assert analysis.advice is None


def test_few_units_are_named_in_the_answer(make: SimpleNamespace):
    search = make.sensitivity(12).search
    few = search.model_copy(update={"points": search.points[:1], "chosen": ("block.10", "block.2")})
    few = few.model_copy(update={"points": (search.points[-1].model_copy(update={"skip": few.chosen}),)})

    assert analysis_of("nf4", make.sensitivity(12, search=few)).answer.startswith("Keep block.2 and block.10 in bf16")


@pytest.mark.parametrize(
    ("goal", "images", "shown"),
    [(Goal(max_top1_drop=20), 400, True), (Goal(max_top1_drop=0.5), 40, False), (Goal(max_kl_share=0.5), 400, True)],
)
def test_it_says_whether_the_floor_was_shown(make: SimpleNamespace, goal, images, shown):
    analysis = analysis_of("nf4", make.sensitivity(12, goal=goal, images=images))

    assert goal.words() in analysis.answer
    assert ("not shown" not in analysis.answer) is shown
    assert (analysis.advice is None) is shown


def test_a_goal_out_of_reach_is_not_offered_as_a_recipe(make: SimpleNamespace):
    analysis = analysis_of("nf4", make.sensitivity(12, "linear", goal=Goal(max_kl_share=0.1), sample=8))

    assert analysis.answer.startswith("No skip list met the goal") and "8 of 72 layers" in analysis.answer
    assert analysis.advice
    assert analysis.skip is None


def test_a_quantized_model_that_is_good_enough_needs_nothing(make: SimpleNamespace):
    analysis = analysis_of("nf4", make.sensitivity(12, goal=Goal(max_top1_drop=50)))

    assert analysis.answer.startswith("Keep nothing in bf16")
    assert analysis.skip is None
    assert analysis.strip.formats == {"nf4": 72, "bf16": 1}


def test_without_a_goal_nothing_is_chosen(make: SimpleNamespace):
    analysis = analysis_of("nf4", make.sensitivity(12, goal=None))

    assert analysis.answer.startswith("No goal")
    assert analysis.strip is None
    assert len(analysis.losses) == 1
    assert "held in" not in analysis.table.headings


def test_the_list_has_its_losses_on_the_images_that_chose_it_and_on_others(make: SimpleNamespace):
    result = make.sensitivity(12, extra_ms=-0.1)
    chosen = next(point for point in result.search.points if point.skip == result.search.chosen)
    table = analysis_of("nf4", result).losses

    quantized, choosing, others = (dict(zip(table.headings, row, strict=True)) for row in table.rows)

    assert [row["images"] for row in (quantized, choosing, others)] == ["400", "400", "1,200"]
    assert (quantized["KL, nats"], quantized["extra weights"]) == ("0.1200", "–")
    assert choosing["KL, nats"] == f"{chosen.loss.kl:.4f}"
    low, high = result.search.confirmed.kl_share_ci95
    assert others["KL share (95 %)"] == f"{result.search.confirmed.kl_share:.0%} ({low:.0%} to {high:.0%})"
    assert others["extra weights"] == f"+{chosen.extra_bytes / 1e6:.2f} MB"
    assert others["extra ms"] == f"{chosen.extra_ms:.2f}"


def test_the_plan_is_a_strip_of_all_known_layers(make: SimpleNamespace):
    result = make.sensitivity(12, "linear", sample=4, goal=Goal(max_kl_share=0.99))
    _, number, linear = result.search.chosen[0].split(".")
    strip = analysis_of("nf4", result).strip

    assert [len(formats) for formats in strip.blocks.values()] == [6] * 12
    assert strip.blocks[int(number)][LINEARS.index(linear)] == "bf16"
    assert strip.formats["bf16"] == 1 + len(result.search.chosen)


def test_the_table_has_every_unit_and_leaves_out_what_nobody_knows(make: SimpleNamespace):
    result = make.sensitivity(12, sample=3, extra_ms=None)
    table = analysis_of("nf4", result).table

    assert table.headings[:3] == ("block", "held in", "damage: KL")
    assert "extra ms" not in table.headings
    assert [row[0] for row in table.rows] == [f"block.{block}" for block in range(12)]
    unscored = next(row for row in table.rows if row[0] not in {unit.unit for unit in result.units})
    assert set(unscored[2:-1]) == {"–"}
    assert float(unscored[-1]) == pytest.approx(result.sample_kl[unscored[0]], abs=1e-4)


# The page of one analysis


@pytest.mark.parametrize(
    ("blocks", "granularity", "fields"),
    [
        (12, "block", {}),
        (8, "linear", {"goal": Goal(max_top1_drop=0.5)}),
        (12, "linear", {"sample": 8, "extra_ms": None}),
        (12, "block", {"goal": None}),
        (1, "block", {"environment": {}}),
    ],
)
def test_the_page_needs_nothing_but_itself(make: SimpleNamespace, tmp_path, blocks, granularity, fields):
    text = page_of(make.sensitivity(blocks, granularity, **fields), tmp_path)
    page = Reader(text)

    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "Which layers must stay in 16 bit" in page.words
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["sensitivity.html", "sensitivity.json"]
    assert len(text) < 500_000


def test_the_page_has_the_advice_on_top(make: SimpleNamespace, tmp_path):
    result = make.sensitivity(12, goal=Goal(max_top1_drop=0.5))

    words = Reader(page_of(result, tmp_path)).words

    assert words.index(f"Mind this {result.search.advice}") < words.index("Which layers must stay")
    assert "Mind this" not in Reader(page_of(make.sensitivity(12), tmp_path)).words


def test_hostile_names_are_shown_and_not_run(make: SimpleNamespace, tmp_path):
    page = Reader(page_of(make.sensitivity(3, dataset=EVIL, checkpoint=EVIL), tmp_path))

    assert EVIL in page.words
    assert "script" not in page.tags


def test_the_same_result_gives_the_same_page(make: SimpleNamespace, tmp_path):
    result = make.sensitivity(3, "linear")

    assert page_of(result, tmp_path) == page_of(result, tmp_path)


def test_what_is_no_result_is_refused(tmp_path):
    with pytest.raises(RecordError, match="no sensitivity result at"):
        write_sensitivity_page(tmp_path / "sensitivity.json")
    (tmp_path / "sensitivity.json").write_text("{}")
    with pytest.raises(RecordError, match="not a sensitivity result of this version"):
        write_sensitivity_page(tmp_path / "sensitivity.json")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the page with")
def test_a_browser_shows_the_page_without_errors_or_sideways_scrolling(make: SimpleNamespace, tmp_path):
    text = page_of(make.sensitivity(24, "linear", dataset="/data/" + "x" * 200), tmp_path)

    widths, messages = widths_in_a_browser(text, tmp_path)

    assert widths == [[390, 390], [1280, 1280]]
    assert messages == []


# In a run


def test_a_run_has_a_part_for_each_analysis_in_the_order_of_its_variants(run):
    page = Reader((run / "report.html").read_text())

    assert "sensitivity" in page.ids
    assert page.links.count("#sensitivity") == 1
    assert len(page.ids) == len(set(page.ids))
    section = page.words[page.words.rindex("Which layers must stay in 16 bit") :]
    assert section.index("bf16 Keep ") < section.index("nf4 Keep ")
    assert section.count("tried alone") == 1


def test_floors_that_were_not_shown_and_unreadable_analyses_are_cautions(run):
    words = Reader((run / "report.html").read_text()).words
    cautions = words[: words.index("Batch size 1")]

    assert "nf4: that top-1 drops by at most 0.5 points is not shown" in cautions
    assert "old.json is not a sensitivity result of this version" in cautions
    assert "partial" not in words


def test_figures_of_a_run_are_files_and_those_of_an_earlier_analysis_go(run, tmp_path):
    storage.copy_folder(run, tmp_path / "run")
    run = tmp_path / "run"
    drawn = {path.name for path in (run / "plots").glob("sensitivity-*")}
    assert {f"sensitivity-nf4-{name}.{end}" for name in ("units", "size") for end in ("svg", "png")} <= drawn
    assert "sensitivity-bf16-map.svg" in drawn
    (run / "plots" / "sensitivity-mine.svg").write_text("mine")
    (run / "sensitivity" / "nf4.json").unlink()

    write_report(run)

    left = {path.name for path in (run / "plots").glob("sensitivity-*")}
    assert left == {name for name in drawn if "bf16" in name} | {"sensitivity-mine.svg"}
    assert (run / "plots" / "latency-1.svg").is_file()


def test_markdown_has_the_words_a_table_and_the_plots(run):
    text = (run / "report.md").read_text()

    section = text[text.index("## Which layers must stay in 16 bit") : text.index("## Repeat it")]
    assert "### nf4\n\nKeep " in section
    assert section.count("| all in nf4 | 400 |") == 2
    assert "```yaml\nskip: [" in section
    paths = re.findall(r"\]\((plots/[^)]+)\)", section)
    assert len(paths) == 3 + 3
    assert all((run / path).is_file() for path in paths)


def test_a_run_without_analyses_has_no_section(comparison, make: SimpleNamespace, tmp_path):
    page = Reader(write_report(make.run(tmp_path, *comparison)).read_text())

    assert "sensitivity" not in page.ids
    assert "## Which layers" not in (tmp_path / "report.md").read_text()


def test_names_that_are_no_ids_get_others():
    assert sensitivity.plot_prefix("nf4-a_b.c+1") == "sensitivity-nf4-a_b.c+1"
    odd, other = map(sensitivity.plot_prefix, ("a b", "a(b"))
    assert odd != other
    assert re.fullmatch(r"sensitivity-[0-9a-f]{12}", odd)


# Commands


def test_report_writes_the_page_of_an_analysis_that_stands_alone(make: SimpleNamespace, tmp_path):
    save_sensitivity(make.sensitivity(3), tmp_path / "sensitivity.json")

    printed = CliRunner().invoke(app, ["report", str(tmp_path), "--json"])
    said = CliRunner().invoke(app, ["report", str(tmp_path)])

    assert json.loads(printed.stdout) == {"report": str(tmp_path / "sensitivity.html"), "variants": []}
    assert str(tmp_path / "sensitivity.html") in said.stdout.replace("\n", "")
    assert (tmp_path / "sensitivity.html").is_file()


@pytest.mark.parametrize("as_json", [False, True])
def test_sensitivity_writes_a_page_and_says_where(
    make: SimpleNamespace, tiny_checkpoint, shapes, tmp_path, monkeypatch, as_json
):
    from vitopt.search import analysis

    def analyse(checkpoint, images, format, output, **_):
        result = make.sensitivity(3)
        save_sensitivity(result, output)
        return result

    monkeypatch.setattr(analysis, "analyse", analyse)
    command = ["sensitivity", str(tiny_checkpoint), "--data", str(shapes), "--format", "nf4", "--output", str(tmp_path)]

    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, [*command, *(["--json"] if as_json else [])])

    assert done.exit_code == 0, done.output
    assert (tmp_path / "sensitivity.html").is_file() is not as_json
    assert (f"page: {tmp_path / 'sensitivity.html'}" in done.stdout) is not as_json


def test_the_front_of_the_tried_lists_is_a_table(make: SimpleNamespace):
    result = make.sensitivity(12)
    table = analysis_of("nf4", result).front
    rows = [dict(zip(table.headings, row, strict=True)) for row in table.rows]

    points = result.search.points
    best = [
        one
        for one in points
        if not any(other.extra_bytes <= one.extra_bytes and other.loss.kl < one.loss.kl for other in points)
    ]
    assert [row["KL, nats"] for row in rows] == [
        f"{one.loss.kl:.4f}" for one in sorted(best, key=lambda one: one.extra_bytes)
    ]
    assert rows[0]["kept in bf16"] == "nothing" and "bytes" in table.caption
    assert sum("(chosen)" in row["kept in bf16"] for row in rows) == 1
    assert analysis_of("nf4", make.sensitivity(12, goal=None)).front is None
