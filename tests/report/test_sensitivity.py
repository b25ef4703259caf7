import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from report.test_page import EVIL, Reader, widths_in_a_browser
from scipy.stats import spearmanr
from typer.testing import CliRunner

from vitopt import storage
from vitopt.cli import app
from vitopt.errors import RecordError
from vitopt.records import Requirement
from vitopt.report import sensitivity
from vitopt.report.page import write_report
from vitopt.report.sensitivity import part_of, write_sensitivity_page
from vitopt.search.goal import Goal
from vitopt.search.results import save_sensitivity


def page_of(result, folder: Path) -> str:
    save_sensitivity(result, folder / "sensitivity.json")
    return write_sensitivity_page(folder / "sensitivity.json").read_text()


def facts(result) -> dict[str, str]:
    return dict(part_of("nf4", result).facts)


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


def test_the_answer_says_what_to_keep_what_it_brings_and_what_it_costs(make: SimpleNamespace):
    result = make.sensitivity(12)
    part = part_of("nf4", result)
    chosen = next(point for point in result.search.points if point.skip == result.search.chosen)

    assert part.answer.startswith("Keep blocks ")
    assert f"On 400 calibration images KL falls from 0.1200 to {chosen.loss.kl:.4f} nats" in part.answer
    assert f"{chosen.extra_bytes / 1e6:.2f} MB more weights and {chosen.extra_ms:.2f} ms more per image" in part.answer
    assert part.answer.endswith("the goal is shown to be met on 1,200 other images.")
    assert part.skip == f"skip: [{', '.join(result.search.chosen)}]"
    assert part.advice is None
    assert facts(result)["goal"] == "KL is at most 0.5 of the quantized model's, for the fewest extra bytes"
    assert facts(result)["goal met"].startswith("yes, by the 95 % interval on 1,200 images that did not choose")
    assert facts(result)["calibration"] == "400 images of /data/shapes"


def test_many_layers_are_counted_in_the_answer_and_named_in_the_recipe(make: SimpleNamespace):
    part = part_of("nf4", make.sensitivity(24, "linear"))

    assert re.match(r"Keep \d+ of 144 layers in bf16 and the rest in nf4", part.answer)
    assert (len(part.telling), len(part.table)) == (24, 144)


def test_keeping_units_can_save_time(make: SimpleNamespace):
    answer = part_of("nf4", make.sensitivity(12, extra_ms=-0.1)).answer

    assert "ms less per image" in answer


@pytest.mark.parametrize(
    ("goal", "images", "met"),
    [
        (Goal(max_top1_drop=20), 400, "yes, by the 95 % interval on 1,200 images"),
        (Goal(max_top1_drop=0.5), 40, "not shown, by the 95 % interval on 120 images"),
        (Goal(max_kl_share=0.5), 400, "yes, by the 95 % interval on 1,200 images"),
        (Goal(max_top1_drop=0.5, max_kl_share=0.5), 40, "not shown, by the 95 % interval on 120 images"),
    ],
)
def test_it_says_whether_the_floor_was_shown(make: SimpleNamespace, goal, images, met):
    result = make.sensitivity(12, goal=goal, images=images)
    found = facts(result)

    assert found["goal met"].startswith(met)
    assert ("advice" in found) is (result.search.decision != "shown")
    assert found["goal"].startswith(goal.words())


def test_a_goal_out_of_reach_is_not_offered_as_a_recipe(make: SimpleNamespace):
    part = part_of("nf4", make.sensitivity(12, "linear", goal=Goal(max_kl_share=0.1), sample=8))

    assert "No list met the goal" in part.answer and "8 of 72 layers in bf16" in part.answer
    assert dict(part.facts)["goal met"].startswith("no, ")
    assert dict(part.facts)["advice"] == part.advice is not None
    assert part.skip is None


def test_a_quantized_model_that_is_good_enough_needs_nothing(make: SimpleNamespace):
    part = part_of("nf4", make.sensitivity(12, goal=Goal(max_top1_drop=50)))

    assert part.answer.startswith("Nothing was chosen to stay in 16 bit")
    assert part.skip is None
    assert part.strip.words == "all 12 blocks nf4; head bf16"


def test_without_a_goal_it_names_the_unit_that_brings_back_most(make: SimpleNamespace):
    result = make.sensitivity(12, goal=None)
    best = min(result.units, key=lambda unit: unit.recovery.kl)
    part = part_of("nf4", result)

    assert f"{best.unit.replace('.', ' ')} brings back most" in part.answer
    assert part.strip is None
    assert "goal" not in dict(part.facts)


def test_the_first_pass_is_correlated_with_the_exact_table(make: SimpleNamespace):
    result = make.sensitivity(12, "linear", sample=8)
    shuffled = dict(zip(result.sample_kl, sorted(result.sample_kl.values()), strict=True))
    scored = [unit.unit for unit in result.units]
    expected = spearmanr([shuffled[name] for name in scored], [unit.recovery.kl for unit in result.units]).statistic

    words = facts(result)["first pass"]
    assert words.startswith("72 layers ranked by KL on 64 images") and words.endswith("is 1.00")
    assert f"is {expected:.2f}" in facts(result.model_copy(update={"sample_kl": shuffled}))["first pass"]
    assert "first pass" not in facts(make.sensitivity(12))


def test_a_correlation_that_is_undefined_is_not_given(make: SimpleNamespace):
    for result in (make.sensitivity(12, sample=1), make.sensitivity(12, sample=3, sample_kl={"block.0": 1.0})):
        assert "correlation" not in facts(result)["first pass"]


def test_intervals_that_exclude_no_change_are_set_against_chance(make: SimpleNamespace):
    assert facts(make.sensitivity(24, goal=None))["top-1 by unit"] == (
        "0 of 48 intervals exclude no change; about 2 would by chance alone"
    )


def test_the_plan_is_a_strip_of_all_known_layers(make: SimpleNamespace):
    result = make.sensitivity(12, "linear", sample=4, goal=Goal(max_kl_share=0.99))
    kept = result.search.chosen[0]
    part = part_of("nf4", result)

    assert len(part.strip.blocks) == 12
    assert [len(block.formats) for block in part.strip.blocks] == [6] * 12
    assert f"block {kept.split('.')[1]} {kept.split('.')[2]} bf16, others nf4" in part.strip.words
    assert part.strip.formats == ["nf4", "bf16"]


def test_the_table_has_every_unit_and_leaves_out_what_nobody_knows(make: SimpleNamespace):
    result = make.sensitivity(12, sample=3, extra_ms=None)
    table = part_of("nf4", result).table

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
        (24, "block", {"goal": Goal(max_top1_drop=0.5)}),
        (24, "linear", {}),
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
    assert set(re.findall(r"https?://[^\"' )]+", text)) == {
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
    assert section.count("Each block or linear layer is tried alone.") == 1


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
    assert {f"sensitivity-nf4-{name}.{end}" for name in ("damage", "size") for end in ("svg", "png")} <= drawn
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
    assert "- goal: top-1 drops by at most 0.5 points, for the fewest extra bytes" in section
    assert "```yaml\nskip: [" in section
    assert section.count("| block.") == 12 + 24
    paths = re.findall(r"\]\((plots/[^)]+)\)", section)
    assert len(paths) == 4 + 5
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


@pytest.mark.parametrize(("decision", "words"), [("shown", "met"), ("failed", "missed"), ("undecided", "not shown")])
def test_the_floor_is_judged_on_the_tested_images(make: SimpleNamespace, comparison, decision, words):
    record = comparison[0][2]
    floor = Requirement(name="auto.max_top1_drop", limit=0.5, measured=0.25, ci95=(-0.5, 1), decision=decision)
    judged = record.model_copy(update={"requirements": (floor,)})
    found = dict(part_of("nf4", make.sensitivity(12, goal=Goal(max_top1_drop=0.5)), judged).facts)[
        "on the tested images"
    ]

    assert "loss of top-1 at most 0.5 points: 0.25 (-0.5 to 1)" in found and found.endswith(words)
    assert "on the tested images" not in dict(part_of("nf4", make.sensitivity(12), record).facts)
