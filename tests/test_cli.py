"""The command line: what it prints where, and how it refuses what cannot work."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from commands import done, printed, refusal, vitopt
from conftest import calibration_hashes, make_images
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vitopt import __version__, storage, threads
from vitopt.cli import app
from vitopt.data.images import open_images
from vitopt.measure import evaluator, forecast, rates, throughput
from vitopt.measure.predictions import load_predictions
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.models.origin import load_origin
from vitopt.recipe import DataSpec
from vitopt.recipe_file import load_recipe
from vitopt.records import load_record

QUICK = ["--iterations", "6", "--rounds", "3"]
ROOT = Path(__file__).parents[1]


def write_recipe(folder: Path, model: Path | str, data: Path | str, **changes: Any) -> Path:
    content = {
        "name": "small",
        "model": str(model),
        "data": str(data),
        "device": "cpu",
        "variants": [{"name": "fp32", "format": "fp32"}, {"name": "nf4", "format": "nf4", "skip": ["block.0"]}],
        "evaluate": {"latency": {"iterations": 6, "rounds": 3, "warmup_seconds": 0}, "end_to_end": False},
        "export": "nf4",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, shapes: Path) -> Path:
    return write_recipe(tmp_path, tiny_checkpoint, shapes)


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a complete run and what the command printed."""
    folder = tmp_path_factory.mktemp("cli")
    return folder / "run", done("run", write_recipe(folder, tiny_checkpoint, shapes), "--output", folder / "run")


# Help


OPTIONS = {
    "run": ["RECIPE", "--output", "--set", "--dry-run", "--strict", "--skip-bad-images", "--log-to", "--json"],
    "finetune": [
        "CHECKPOINT", "--data", "--output", "--method", "--rank", "--alpha", "--dropout", "--target", "--epochs",
        "--batch-size", "--learning-rate", "--precision", "--augment", "--flip", "--workers", "--seed", "--log-to",
        "--device", "--json",
    ],
    "quantize": [
        "CHECKPOINT", "--format", "--output", "--skip", "--half", "--data", "--min-agreement", "--compile", "--device",
        "--json",
    ],
    "sensitivity": [
        "CHECKPOINT", "--data", "--format", "--output", "--granularity", "--half", "--limit", "--device", "--json",
    ],
    "tokens": ["CHECKPOINT", "--data", "--target-flops", "--max-steps", "--limit", "--output", "--device", "--json"],
    "evaluate": [
        "CHECKPOINT", "--data", "--baseline", "--attention", "--sdpa-kernel", "--run-as", "--fuse-qkv",
        "--channels-last", "--compile", "--autotune", "--threads", "--batch-size", "--latency-batch-size",
        "--iterations", "--rounds", "--workers", "--limit", "--group-column", "--skip-bad-images", "--look-alikes",
        "--ray", "--strict", "--device", "--output",
        "--json",
    ],
    "benchmark": [
        "CHECKPOINTS", "--batch-size", "--attention", "--sdpa-kernel", "--run-as", "--fuse-qkv", "--channels-last",
        "--compile", "--autotune", "--threads", "--iterations", "--rounds", "--throughput", "--roofline",
        "--format", "--run", "--csv", "--wide", "--strict", "--device", "--output", "--json",
    ],
    "compare": [
        "BASELINE", "VARIANT", "--max-top1-drop", "--min-agreement", "--max-kl", "--min-speedup", "--max-p99-ms",
        "--max-megabytes", "--batch-size", "--markdown", "--wide", "--json",
    ],
    "plan": [
        "--max-top1-drop", "--min-agreement", "--max-kl", "--min-speedup", "--max-p99-ms", "--pilot", "--batch-size",
        "--json",
    ],
    "predict": [
        "CHECKPOINT", "IMAGES", "--top", "--batch-size", "--workers", "--skip-bad-images", "--output", "--attention",
        "--sdpa-kernel", "--run-as", "--fuse-qkv", "--channels-last", "--compile", "--autotune", "--threads",
        "--device", "--json",
    ],
    "report": ["FOLDER", "--output", "--log-to", "--wide", "--json"],
    "push": ["CHECKPOINT", "REPO", "--private", "--public", "--revision", "--json"],
    "doctor": ["--device", "--json"],
    "init": ["MODEL", "DATA", "--name"],
}  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_argument(command: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", done(command, "--help").stdout)
    words = set(re.findall(r"[a-z0-9-]+", text.lower()))
    assert [option for option in OPTIONS[command] if option.lower() not in words] == []


def test_help_names_every_command() -> None:
    text = done("--help").stdout
    assert [command for command in OPTIONS if f" {command} " not in text] == []


def test_version() -> None:
    assert done("--version").stdout == f"{__version__}\n"


def imports(*arguments: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """Top-level packages that a command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "vitopt", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, COLUMNS="200"), cwd=ROOT)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}, ended


HEAVY = {"torch", "transformers", "peft", "datasets", "evaluate", "sklearn", "matplotlib"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    packages, ended = imports(*arguments)
    assert ended.returncode == 0 and "typer" in packages
    assert packages & HEAVY == set()


def test_a_broken_recipe_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "tiny", "data", bseline="fp32")
    packages, ended = imports("run", str(path), "--dry-run")
    assert ended.returncode == 1 and "did you mean 'baseline'?" in ended.stderr
    assert packages & HEAVY == set()


# Standard output is JSON and nothing else


def test_run_prints_its_records(recipe: Path, tmp_path: Path) -> None:
    records = printed("run", recipe, "--output", tmp_path / "run")
    assert [record["variant"]["name"] for record in records] == ["fp32", "nf4"]
    for record in records:
        assert (
            json.loads((tmp_path / "run" / "variants" / record["variant"]["name"] / "record.json").read_text())
            == record
        )


def test_a_dry_run_prints_recipe_and_plans_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    content = printed("run", recipe, "--dry-run", "--output", tmp_path / "run", "--set", "variants.1.skip=[block.2]")
    assert content["recipe"]["name"] == "small" and content["recipe"]["variants"][1]["skip"] == ["block.2"]
    plan = content["layer_plans"]["nf4"]
    assert list(plan) == [
        *(f"block.{b}.{w}" for b in range(3) for w in ("query", "key", "value", "output", "fc1", "fc2")),
        "classifier",
    ]
    assert plan["block.0.fc1"] == {"format": "nf4", "module": "vit.layers.0.mlp.fc1", "reason": "format nf4"}
    assert plan["block.2.fc1"]["format"] == plan["classifier"]["format"] == "bf16"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_claims_need_and_how_long_it_takes(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_checkpoint, shapes, require={"max_top1_drop": 0.5, "max_p99_ms": 20})
    content = printed("run", recipe, "--dry-run")
    assert [(claim["need"]["requirement"], claim["there"]) for claim in content["claims"]] == [
        ("max_top1_drop", 24),
        ("max_p99_ms", 6),
    ]
    assert {stage["name"] for stage in content["stages"]} == {"evaluate: accuracy", "evaluate: latency"}
    text = done("run", recipe, "--dry-run").stdout
    assert "765 images" in text and "368 calls" in text and "estimate" in text


def test_a_dry_run_for_people_shows_groups_of_layers(recipe: Path) -> None:
    text = done("run", recipe, "--dry-run").stdout
    assert "layer plan of nf4" in text and "skip block.0" in text
    assert "block.1.query … block.2.fc2 (12)" in text
    assert yaml.safe_load(text.split("  ")[0].splitlines()[0]) == {"name": "small"}


def test_evaluate_shows_kl_and_the_layers_that_are_not_quantized(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    done("quantize", tiny_checkpoint, "--format", "nf4", "--skip", "block.1", "--output", tmp_path / "nf4")
    data = ["--data", shapes, "--baseline", tiny_checkpoint, "--device", "cpu", "--output", tmp_path / "out"]
    said = done("evaluate", tmp_path / "nf4", *data, *QUICK).stdout
    kl = load_record(tmp_path / "out").versus_baseline.mean_kl_divergence
    assert " KL " in said and f" {kl:.4f} " in said
    assert "• nf4: in bf16 block.1, classifier" in said


def test_evaluate_prints_and_keeps_its_record(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    record = printed("evaluate", tiny_checkpoint, "--data", shapes, *QUICK, "--output", tmp_path / "out")
    assert record["accuracy"]["images"] == 24 and record["dataset"]["split"] == "test"
    assert record["latency"][0]["iterations"] == 6 and record["versus_baseline"] is None
    assert json.loads((tmp_path / "out" / "record.json").read_text()) == record
    assert (tmp_path / "out" / "predictions.parquet").is_file()


def test_quantized_against_the_original(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    made = printed("quantize", tiny_checkpoint, "--format", "nf4", "--skip", "block.1", "--output", tmp_path / "nf4")
    assert made["checkpoint"] == str(tmp_path / "nf4") and made["layer_plan"] == {"nf4": 12, "bf16": 7}
    needed = set((tmp_path / "nf4").glob("[!.]*")) - {tmp_path / "nf4" / name for name in ("README.md", "origin.json")}
    assert made["disk_bytes"] == sum(path.stat().st_size for path in needed)
    record = printed(
        "evaluate", tmp_path / "nf4", "--data", f"{shapes}:test", "--baseline", tiny_checkpoint, *QUICK, "--limit", 8
    )  # fmt: skip
    assert record["versus_baseline"]["baseline"] == "tiny-vit" and record["accuracy"]["images"] == 8
    assert record["latency"][0]["speedup_vs_baseline"] > 0


def test_sensitivity_prints_its_scores_and_its_choice(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    result = printed(
        "sensitivity", tiny_checkpoint, "--data", f"{shapes}:train", "--format", "nf4", "--output", tmp_path,
        "--max-kl-share", 0.9, "--limit", 8,
    )  # fmt: skip
    assert [unit["unit"] for unit in result["units"]] == ["block.0", "block.1", "block.2"]
    found = result["search"]
    assert result["images"] == found["choosing_images"] == 2 and found["confirming_images"] == 6 and found["chosen"]
    assert json.loads((tmp_path / "sensitivity.json").read_text()) == result


def test_tokens_prints_a_schedule_that_evaluate_takes(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    data, result = ("--data", f"{shapes}:train"), tmp_path / "tokens.json"
    ended = done("tokens", tiny_checkpoint, *data, "--target-flops", 0.85, "--max-steps", 1, "--output", result)
    found = json.loads(result.read_text())
    assert ended.stdout.splitlines()[-1] == f"--merge-tokens {found['chosen']}"
    assert f"{found['confirming_images']} other images" in " ".join(ended.stderr.split())
    for place, words in ((result, "exists"), (result / "below", "in the way")):
        assert words in refusal("tokens", tiny_checkpoint, *data, "--target-flops", 0.85, "--output", place)
    options = ("--merge-tokens", found["chosen"], "--no-size-bias", *QUICK)
    record = printed("evaluate", tiny_checkpoint, *data, *options, "--no-look-alikes")
    assert record["variant"]["ran"]["merge_tokens"] == found["chosen"] and record["variant"]["tokens"][0] == 17
    assert record["variant"]["ran"]["size_bias"] is False


def test_quantize_chooses_its_skip_list(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    made = printed(
        "quantize", tiny_checkpoint, "--format", "nf4", "--skip", "auto", "--data", shapes, "--max-kl-share", 0.9,
        "--output", tmp_path / "auto",
    )  # fmt: skip
    assert made["skip"] and set(made["skip"]) < {"block.0", "block.1", "block.2"}
    assert made["layer_plan"] == {"nf4": 18 - 6 * len(made["skip"]), "bf16": 1 + 6 * len(made["skip"])}


def test_a_sensitivity_is_taken_where_it_is_of_the_same_and_refused_else(
    tiny_checkpoint: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    copy_of: Callable[[Path], Path],
) -> None:
    from vitopt.environment import machine
    from vitopt.search import analysis

    same = ["--format", "nf4", "--data", shapes, "--max-kl-share", 0.9, "--limit", 8]
    found = printed("sensitivity", tiny_checkpoint, *same, "--output", tmp_path / "scores")
    monkeypatch.setattr(analysis, "_Analysis", None)  # nothing is scored from here on
    assert printed("sensitivity", tiny_checkpoint, *same, "--output", tmp_path / "scores") == found

    auto = ["--skip", "auto", "--sensitivity", tmp_path / "scores", "--output", tmp_path / "nf4"]
    made = printed("quantize", tiny_checkpoint, *same, *auto)
    assert made["skip"] == found["search"]["chosen"]
    assert json.loads((tmp_path / "nf4.sensitivity" / "sensitivity.json").read_text()) == found
    assert printed("quantize", tiny_checkpoint, *same, *auto[:2], *auto[4:]) == made  # as it lies beside the output

    other = copy_of(tiny_checkpoint)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    for source, options, named in (
        (other, same, [str(tiny_checkpoint), str(other)]),
        (tiny_checkpoint, ["--format", "int8", *same[2:]], ["nf4", "int8"]),
        (tiny_checkpoint, [*same[:-1], 12], [str(shapes), "12"]),
        (tiny_checkpoint, [*same[:5], 0.8, *same[6:]], ["0.9", "0.8"]),
    ):
        text = refusal("quantize", source, *options, *auto[:-1], tmp_path / "out")
        assert str(tmp_path / "scores") in text and all(word in text for word in named)
    monkeypatch.setattr(machine, "code_digest", lambda: "other code")
    assert "other code" in refusal("quantize", tiny_checkpoint, *same, *auto[:-1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_calibrated_takes_the_train_split_and_keeps_its_hashes(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    train = open_images(DataSpec(source=str(shapes)), "train")
    scores = ["--format", "nf4", "--data", shapes, "--output", tmp_path / "scores"]
    assert printed("sensitivity", tiny_checkpoint, *scores)["dataset_sha256"] == train.sha256
    auto = ["--skip", "auto", "--max-kl-share", 0.9, "--limit", 16]
    done("quantize", tiny_checkpoint, "--format", "nf4", *auto, "--data", shapes, "--output", tmp_path / "nf4")
    fastest = ["--format", "auto", "--no-compile", "--min-agreement", 0]
    done("quantize", tiny_checkpoint, *fastest, "--data", shapes, "--output", tmp_path / "fast")
    done("quantize", tiny_checkpoint, "--format", "nf4", "--output", tmp_path / "plain")
    assert calibration_hashes(tmp_path / "nf4") == set(train.limited(16).image_hashes)
    assert calibration_hashes(tmp_path / "fast") == set(train.image_hashes)
    assert calibration_hashes(tmp_path / "plain") == set()


def test_weights_are_rounded_on_images_that_are_noted(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    rounding = ["--rounding", "gptq", "--calibration-images", 12, "--tuning-steps", 1, "--tuning-batch-size", 2]
    made = [tiny_checkpoint, "--format", "nf4", "--skip", "block.0", *rounding, "--output", tmp_path / "out"]
    assert "--rounding gptq needs --calibrate" in refusal("quantize", *made)
    auto = ["quantize", tiny_checkpoint, "--format", "auto", "--data", shapes, *rounding, "--calibrate", shapes]
    assert "--rounding gptq" in refusal(*auto, "--output", tmp_path / "auto")
    done("quantize", *made, "--calibrate", shapes)
    train = open_images(DataSpec(source=str(shapes)), "train")
    assert calibration_hashes(tmp_path / "out") == set(train.limited(12).image_hashes)


def test_automatic_skip_lists_that_cannot_be_chosen(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    auto = ["quantize", tiny_checkpoint, "--format", "nf4", "--skip", "auto", "--output", tmp_path / "out"]
    assert refusal(*auto).startswith("--skip auto needs --data: calibration images")
    text = refusal(*auto, "--data", shapes, "--max-top1-drop", -1)
    assert "auto.max_top1_drop: input should be greater than 0, not -1.0" in text
    scores = ["sensitivity", tiny_checkpoint, "--data", shapes, "--format", "nf4", "--output", tmp_path / "out"]
    assert "max_kl_share: input should be less than 1, not 2.0" in refusal(*scores, "--max-kl-share", 2)
    assert "format bf16 quantizes nothing" in refusal(*scores[:5], "bf16", *scores[6:])
    assert not (tmp_path / "out").exists()


def test_quantize_measures_which_format_is_fastest(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "auto"
    options = ["--format", "auto", "--no-compile", "--min-agreement", "0", "--data", shapes, "--output", out]
    found = printed("quantize", tiny_checkpoint, *options)
    assert [record["variant"]["name"] for record in found["records"]] == ["fp32", "bf16", "w8a8"]
    assert found["chosen"] in [record["variant"]["name"] for record in found["records"]]
    assert found["chosen"] in found["why"]
    assert found["layer_plan"][found["chosen"]] >= 18
    assert found["run"]["compile"] is False
    assert load_file(out / "model.safetensors")


def test_what_the_fastest_format_cannot_be_chosen_without(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    options = ["quantize", tiny_checkpoint, "--format", "auto", "--output", tmp_path / "out"]
    assert "--format auto needs --data" in refusal(*options)
    assert "--format auto compares whole formats" in refusal(*options, "--data", shapes, "--skip", "block.0")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    taken = ["quantize", tiny_checkpoint, "--format", "auto", "--data", shapes, "--output", mine]
    assert "thesis.txt, which is not part of a vitopt result" in refusal(*taken)
    assert not (tmp_path / "out").exists()


def test_expanding_adds_a_row_beside_the_packed_one(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    done("quantize", tiny_checkpoint, "--format", "nf4", "--output", tmp_path / "nf4")
    rows = printed("benchmark", tiny_checkpoint, tmp_path / "nf4", "--run-as", "bf16", *QUICK)
    names = {row["variant"]["name"]: (row["variant"]["format"], row["variant"]["stored_format"]) for row in rows}
    source = tiny_checkpoint.name
    assert names == {
        source: ("fp32", None),
        f"{source}-as-bf16": ("bf16", "fp32"),
        "nf4": ("nf4", None),
        "nf4-as-bf16": ("bf16", "nf4"),
    }
    packed, expanded = rows[2]["size"]["weight_bytes"], rows[3]["size"]["weight_bytes"]
    assert packed < expanded
    record = printed("evaluate", tmp_path / "nf4", "--data", shapes, "--run-as", "w8a8", *QUICK)
    assert (record["variant"]["format"], record["variant"]["stored_format"]) == ("w8a8", "nf4")


def test_how_a_checkpoint_is_run_is_an_option(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "gemm_rate", lambda *_: rates.GemmRate(1e12, 1e12))
    monkeypatch.setattr(rates, "copy_rate", lambda *_: 1e10)
    options = ["--sdpa-kernel", "math", "--fuse-qkv", "--channels-last", "--roofline"]
    (row,) = printed("benchmark", tiny_checkpoint, *options, *QUICK)
    variant = row["variant"]
    assert (variant["asked"]["sdpa_kernel"], variant["ran"]["sdpa_kernel"]) == ("math", "math")
    assert variant["ran"]["fuse_qkv"] and variant["ran"]["channels_last"]
    assert row["roofline"]["gemm_format"] == "fp32"
    assert 0 < row["latency"][0]["floor_ms"] < row["latency"][0]["p50_ms"]


def test_options_of_running_that_do_not_fit(tiny_checkpoint: Path) -> None:
    assert "`autotune` is a way to compile: set `compile` too" in refusal("benchmark", tiny_checkpoint, "--autotune")
    strict = ["benchmark", tiny_checkpoint, "--sdpa-kernel", "cudnn", "--strict"]
    assert "sdpa kernel cudnn cannot run: the cudnn kernel needs a CUDA device" in refusal(*strict)
    both = ["--attention", "eager", "--sdpa-kernel", "math"]
    assert "`sdpa_kernel` chooses a kernel of sdpa, and `attention` is eager" in refusal(
        "benchmark", tiny_checkpoint, *both
    )


def test_measuring_needs_no_library_of_data_sets_or_reports(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    absent = ["datasets", "evaluate", "pyarrow", "matplotlib", "sklearn", "jinja2", "peft"]
    content = {"name": "speed", "model": str(tiny_checkpoint), "variants": [{"name": "bf16", "format": "bf16"}]}
    content |= {"device": "cpu", "evaluate": {"latency": {"batch_sizes": [1], "iterations": 2, "rounds": 1}}}
    for name, data in (("speed", {}), ("both", {"data": str(shapes), "export": "bf16"})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content | data))
    code = (
        "import sys, importlib.util, importlib.abc\n"
        f"absent = {absent!r}\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] in absent: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n.split('.')[0] in absent else real(n, *a)\n"
        "from vitopt.cli import app\n"
        "from vitopt.measure import evaluator\n"
        "evaluator.peak_memory = lambda *_: None\n"  # its process would see all libraries
        "for name in ('speed', 'both'):\n"
        f"    recipe, output = (f'{tmp_path}/{{name}}{{end}}' for end in ('.yaml', ''))\n"
        "    app(['run', recipe, '--output', output], standalone_mode=False)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for left_out in ("report", "report and predictions"):
        assert f"\n{left_out}: left out, jinja2 and matplotlib and pyarrow not installed" in ran.stderr
    assert "report.html" not in ran.stdout
    for name in ("speed", "both"):
        record = load_record(tmp_path / name / "variants" / "bf16")
        assert record.latency and (record.accuracy is not None) == (name == "both")


def test_benchmark_tells_the_highest_rate(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_SUSTAINED_SECONDS", 0.0)
    said = done("benchmark", tiny_checkpoint, *QUICK, "--throughput").stdout
    assert re.search(r"• tiny-vit: at most [\d,]+ images/s at batch \d+", said)


def test_compare_prints_two_stored_results(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    done("quantize", tiny_checkpoint, "--format", "nf4", "--output", tmp_path / "nf4")
    for name, checkpoint in (("a", tiny_checkpoint), ("b", tmp_path / "nf4")):
        done("evaluate", checkpoint, "--data", shapes, *QUICK, "--output", tmp_path / name)
    comparison = printed("compare", tmp_path / "a", tmp_path / "b" / "record.json")
    assert (comparison["baseline"], comparison["variant"]) == ("tiny-vit", "nf4")
    assert comparison["versus_baseline"]["agreement_percent"] <= 100
    done("evaluate", tiny_checkpoint, "--data", f"{shapes}:train", *QUICK, "--output", tmp_path / "c")
    assert "not measured on the same images" in refusal("compare", tmp_path / "a", tmp_path / "c")
    assert "no record at" in refusal("compare", tmp_path / "a", tmp_path / "nowhere")


def test_benchmark_prints_a_record_per_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    done("quantize", tiny_checkpoint, "--format", "bf16", "--output", tmp_path / "bf16")
    records = printed(
        "benchmark", tiny_checkpoint, tmp_path / "bf16", "--batch-size", "1,2", *QUICK, "--output", tmp_path / "o"
    )
    assert [record["variant"]["name"] for record in records] == ["tiny-vit", "bf16"]
    assert [row["batch_size"] for row in records[1]["latency"]] == [1, 2]
    assert records[0]["latency"][0]["speedup_vs_baseline"] is None
    assert records[1]["latency"][0]["speedup_vs_baseline"] > 0
    assert all(record["accuracy"] is None for record in records)
    assert load_record(tmp_path / "o" / "variants" / "bf16").to_json() == records[1]


def test_benchmark_of_folders_of_one_name_keeps_records_below_output(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in "ab":
        shutil.copytree(tiny_checkpoint, tmp_path / name / "vit")
    done("benchmark", tmp_path / "a" / "vit", tmp_path / "b" / "vit", *QUICK, "--output", tmp_path / "out")
    assert not (tmp_path / "a" / "vit" / "record.json").exists()
    assert len(list((tmp_path / "out" / "variants").glob("*/record.json"))) == 2


def test_finetune_prints_its_report(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    report = printed(
        "finetune", tiny_checkpoint, "--data", shapes, "--output", tmp_path / "out", "--epochs", 1, "--target", "query",
        "--rank", 2, "--no-augment", "--image-size", 16, "--distill-from", tiny_checkpoint, "--teacher-weight", 1,
    )  # fmt: skip
    assert report["checkpoint"] == str(tmp_path / "out")
    assert open_checkpoint(str(tmp_path / "out")).image_size == (16, 16)
    (trained,) = load_origin(tmp_path / "out").steps
    assert (trained["teacher"], trained["teacher_weight"]) == (tiny_checkpoint.name, 1)
    stored = json.loads((tmp_path / "out" / "training.json").read_text())
    assert {key: value for key, value in report.items() if key != "checkpoint"} == stored
    assert stored["steps"] == 2 and stored["test_top1_percent"] is not None


def test_finetune_without_a_test_split_reports_no_accuracy(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    report = printed(
        "finetune", tiny_checkpoint, "--data", f"{shapes}:train", "--output", tmp_path / "out", "--epochs", 1
    )  # fmt: skip
    assert report["images"] == 32 and report["test_top1_percent"] is None


def test_doctor_prints_what_can_run() -> None:
    facts = printed("doctor", "--device", "cpu")
    assert set(facts) == {"machine", "libraries", "can_run"}
    assert facts["libraries"]["torch"] == torch.__version__
    assert facts["can_run"]["format nf4"] is None
    assert facts["can_run"]["format fp8"].startswith("fp8 arithmetic needs a CUDA device")
    assert facts["can_run"]["attention flash_attention_2"] == "FlashAttention-2 needs a CUDA device"
    missing = facts["can_run"]["engine openvino"]
    assert missing is None if find_spec("openvino") else "vitopt[openvino]" in missing
    assert set(facts["machine"]["openmp"]) == {"library", "waiting"}


def test_doctor_for_people_says_yes_or_why_not() -> None:
    text = done("doctor", "--device", "cpu").stdout
    assert re.search(r"format nf4 +yes", text) and re.search(r"format fp8 +fp8 arithmetic needs", text)
    assert re.search(r"OpenMP +lib\S*omp\S*, threads wait", text) and f"torch {torch.__version__}" in text
    assert [line for line in text.splitlines() if line in ("machine", "can run")] == ["machine", "can run"]


def test_doctor_tries_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    works = shutil.which("g++") is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    if works and "CXX" not in os.environ:
        assert printed("doctor", "--device", "cpu")["can_run"]["torch.compile"] is None
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))  # a Python without its headers
    found = printed("doctor", "--device", "cpu")["can_run"]["torch.compile"]
    assert "Python.h" in found or "install g++" in found


def test_report_prints_where_it_is(finished: tuple[Path, Result], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (folder / "report.html").unlink()
    got = printed("report", folder)
    assert got == {"report": str(folder / "report.html"), "variants": ["fp32", "nf4"]}
    assert (folder / "report.html").is_file()


def test_a_report_compares_what_evaluate_left_over_the_same_images(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    done("quantize", tiny_checkpoint, "--format", "nf4", "--output", tmp_path / "nf4")
    one, other, fewer = tmp_path / "one", tmp_path / "other", tmp_path / "fewer"
    done("evaluate", tiny_checkpoint, "--data", shapes, *QUICK, "--output", one)
    done("evaluate", tmp_path / "nf4", "--data", shapes, *QUICK, "--output", other)
    done("evaluate", tmp_path / "nf4", "--data", shapes, "--limit", 8, *QUICK, "--output", fewer)
    got = printed("report", one, other, "--output", tmp_path / "page")
    assert got == {"report": str(tmp_path / "page" / "report.html"), "variants": ["tiny-vit", "nf4"]}
    text = (tmp_path / "page" / "report.md").read_text()
    assert "nf4 against tiny-vit" in text and "not timed together" in text
    assert printed("report", other)["report"] == str(other / "report.html")
    refused = refusal("report", one, fewer, "--output", tmp_path / "none")
    assert str(one) in refused and str(fewer) in refused and "same images" in refused
    assert "--output" in refusal("report", one, other)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ([], 0),
        (["--max-megabytes", 99], 0),
        (["--max-megabytes", 0.01], 3),
        (["--max-top1-drop", 0.5], 4),
        (["--max-megabytes", 99, "--max-top1-drop", 0.5], 4),
        (["--max-megabytes", 0.01, "--max-top1-drop", 0.5], 3),
    ],
)
def test_the_gate_ends_with_its_decision(finished: tuple[Path, Result], limits: list[object], code: int) -> None:
    variants = finished[0] / "variants"
    result = vitopt("compare", variants / "fp32", variants / "nf4", *limits)
    assert result.exit_code == code, result.output


def test_the_gate_has_a_line_for_each_limit_and_writes_a_summary(finished: tuple[Path, Result], tmp_path: Path) -> None:
    pair = [finished[0] / "variants" / name for name in ("fp32", "nf4")]
    limits = ["--max-top1-drop", 0.5, "--max-megabytes", 99]
    result = vitopt("compare", *pair, *limits, "--markdown", tmp_path / "summary.md")
    (top1,) = [line for line in result.stdout.splitlines() if "loss of top-1 at most 0.5 points" in line]
    assert "not shown" in top1 and "more images" in top1
    assert any("weights at most 99 MB" in line and "met" in line for line in result.stdout.splitlines())
    summary = (tmp_path / "summary.md").read_text()
    assert "\n### nf4 against fp32: requirements not shown" in summary
    assert "| loss of top-1 at most 0.5 points | " in summary and "| variant | format |" in summary
    content = json.loads(vitopt("compare", *pair, *limits, "--json").stdout)
    assert content["decision"] == "undecided"
    assert [(one["name"], one["decision"]) for one in content["requirements"]] == [
        ("max_top1_drop", "undecided"),
        ("max_megabytes", "shown"),
    ]


def test_a_summary_replaces_only_an_empty_file_or_an_earlier_summary(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    pair = [finished[0] / "variants" / name for name in ("fp32", "nf4")]
    foreign, summary = tmp_path / "README.md", tmp_path / "summary.md"
    foreign.write_text("# mine\n")
    assert "README.md exists" in refusal("compare", *pair, "--markdown", foreign)
    assert foreign.read_text() == "# mine\n"
    summary.touch()  # as CI does
    done("compare", *pair, "--markdown", summary)
    first = summary.read_text()
    done("compare", *pair, "--max-megabytes", 99, "--markdown", summary)
    assert "nf4 against fp32" in first and summary.read_text() != first


@pytest.mark.parametrize("limit", [("--max-top1-drop", 0), ("--min-agreement", 100), ("--max-kl", -1)])
def test_limits_that_nothing_can_show_are_refused(finished: tuple[Path, Result], limit: tuple[str, float]) -> None:
    variants = finished[0] / "variants"
    key = limit[0].removeprefix("--").replace("-", "_")
    assert f"{key}: input should be" in refusal("compare", variants / "fp32", variants / "nf4", *limit)


def test_plan_says_what_claims_need(finished: tuple[Path, Result]) -> None:
    top1, p99 = printed("plan", "--max-top1-drop", 0.5, "--max-p99-ms", 20)
    assert (top1["requirement"], top1["unit"], top1["least"]) == ("max_top1_drop", "images", 765)
    assert (p99["unit"], p99["least"]) == ("calls", 368)
    pilot = finished[0] / "variants" / "nf4"
    text = done("plan", "--max-top1-drop", 0.5, "--pilot", pilot).stdout
    assert "loss of top-1 at most 0.5 points" in text and "765 images" in text and "of the pilot" in text
    assert "--max-top1-drop" in refusal("plan")
    assert "compared with no baseline" in refusal("plan", "--max-kl", 1, "--pilot", finished[0] / "variants" / "fp32")


def test_compare_prints_the_paired_comparison(finished: tuple[Path, Result]) -> None:
    variants = finished[0] / "variants"
    got = printed("compare", variants / "fp32", variants / "nf4" / "record.json")
    assert (got["baseline"], got["variant"]) == ("fp32", "nf4")
    assert got["versus_baseline"] == load_record(variants / "nf4").to_json()["versus_baseline"]


def test_init_prints_a_recipe_that_loads(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(done("init", tiny_checkpoint, shapes, "--name", "mine").stdout)
    assert load_recipe(tmp_path / "recipe.yaml").name == "mine"


# For people


def test_run_prints_a_table_on_standard_output_and_steps_on_standard_error(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    for name in (
        "fp32",
        "nf4",
        "top-1 %",
        "p50 ms",
        f"report: {folder / 'report.html'}",
        f"export: {folder / 'export'}",
    ):
        assert name in result.stdout
    assert "from transformers import pipeline" in result.stdout
    assert "variant nf4: 7 bf16, 12 nf4" in result.stderr and "variant nf4" not in result.stdout
    assert "%|" not in result.stderr and "Traceback" not in result.stderr


def test_run_again_says_what_was_skipped(finished: tuple[Path, Result], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    result = done("run", finished[0].parent / "recipe.yaml", "--output", folder)
    assert result.stderr.splitlines() == [
        "variant fp32: up to date, skipped",
        "variant nf4: up to date, skipped",
        "evaluate: up to date, skipped",
    ]


def test_quantize_and_finetune_say_what_they_made(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    result = done("finetune", tiny_checkpoint, "--data", shapes, "--output", tmp_path / "ft", "--epochs", 1)
    assert result.stdout == "" and f"checkpoint: {tmp_path / 'ft'}" in result.stderr
    assert re.search(r"top-1 on 24 images of the test split: [\d.]+ %", result.stderr)
    result = done("quantize", tmp_path / "ft", "--format", "int8", "--output", tmp_path / "q")
    assert result.stdout == "" and "18 layers int8, 1 layers bf16" in result.stderr
    trained, quantized = ((tmp_path / name / "README.md").read_text() for name in ("ft", "q"))
    assert "Nothing was measured" in trained and "LoRA (rank 8" in trained and "Converted" not in trained
    assert "Nothing was measured" in quantized and "LoRA (rank 8" in quantized and "Converted to int8" in quantized
    assert "18 int8, 1 bf16" in quantized and str(tmp_path) not in trained + quantized


def test_quantize_says_which_layers_it_could_not(make_family: Callable[..., Checkpoint], tmp_path: Path) -> None:
    result = done("quantize", make_family("swin").source, "--format", "nf4", "--output", tmp_path / "q")
    assert "10 layers stay in bf16: in_features 32 is no multiple of 64, as nf4 needs" in result.stderr


def test_groups_of_images_widen_the_intervals(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    rows = ["file_name,label,video"]
    for index, path in enumerate(sorted((shapes / "test").rglob("*.png"))):
        rows.append(f"{path},{path.parent.name},video {index // 6}")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "metadata.csv").write_text("\n".join(rows))
    options = ["--data", f"{tmp_path / 'table'}:all", "--data-root", shapes, *QUICK, "--output", tmp_path / "out"]
    plain = printed("evaluate", tiny_checkpoint, *options)
    grouped = printed("evaluate", tiny_checkpoint, *options, "--group-column", "video")
    assert (plain["dataset"]["groups"], grouped["dataset"]["groups"]) == (None, 4)
    assert plain["accuracy"]["top1_percent"] == grouped["accuracy"]["top1_percent"]
    (low, high), (lower, higher) = (one["accuracy"]["top1_ci95_percent"] for one in (plain, grouped))
    assert lower < low and higher > high
    assert load_predictions(tmp_path / "out").groups[-1] == "video 3"


def test_images_that_a_checkpoint_was_trained_on_are_told_by_evaluate_and_compare(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    folder = make_images(tmp_path, {"frames:2024": 10}) / "frames:2024"
    tuned, options = tmp_path / "ft", ["--data", f"{folder}:train", *QUICK]
    result = done("finetune", tiny_checkpoint, "--data", folder, "--output", tuned, "--epochs", 1)
    assert "top-1 on 8 images of the test split" in result.stderr
    assert "training images of this checkpoint" in done("evaluate", tuned, *options, "--output", tmp_path / "a").stdout
    done("quantize", tuned, "--format", "bf16", "--output", tmp_path / "bf16")
    record = printed("evaluate", tmp_path / "bf16", *options, "--output", tmp_path / "b")
    assert [(one["where"], one["same"]) for one in record["dataset"]["overlaps"] if one["same"]] == [("training", 32)]
    assert "training images of this checkpoint" in done("compare", tmp_path / "a", tmp_path / "b").stdout
    compared = printed("compare", tmp_path / "a", tmp_path / "b")
    assert compared["overlaps"]["bf16"][-1]["where"] == "training"
    clean = printed("evaluate", tmp_path / "bf16", "--data", f"{folder}:test", *QUICK)
    assert not any(one["same"] for one in clean["dataset"]["overlaps"])


def test_fallback_of_attention_is_a_note(tiny_checkpoint: Path) -> None:
    result = done("benchmark", tiny_checkpoint, *QUICK, "--attention", "flash_attention_2", "--device", "cpu")
    assert "note: tiny-vit: flash_attention_2 cannot run (FlashAttention-2 needs a CUDA device)" in result.stderr


# Refusals


def test_an_unknown_key_is_told_with_the_nearest(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny_checkpoint, shapes, bseline="fp32")
    assert refusal("run", path) == f"{path}: 1 mistake\n  bseline: unknown key; did you mean 'baseline'?"


def test_all_mistakes_of_a_recipe_are_told_at_once(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    variants = [{"name": "a", "format": "int3"}, {"name": "b", "format": "fp32", "skip": ["block.1"]}]
    path = write_recipe(tmp_path, tiny_checkpoint, shapes, variants=variants, seed=-1, expotr="a")
    first, *lines = refusal("run", path).splitlines()
    assert first == f"{path}: 4 mistakes" and len(lines) == 4
    for start in ("seed: ", "variants.0.format: ", "variants.1: format fp32 quantizes nothing", "expotr: unknown key"):
        assert any(line.strip().startswith(start) for line in lines), (start, lines)


def test_wrong_patterns_are_told_together(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    variants = [{"name": "a", "format": "nf4", "skip": ["block.21"]}, {"name": "b", "format": "int8", "skip": "head"}]
    path = write_recipe(
        tmp_path, tiny_checkpoint, shapes, variants=variants, export=None, finetune={"targets": ["dense"]}
    )
    for dry in ([], ["--dry-run"]):
        text = refusal("run", path, "--output", tmp_path / "run", *dry)
        assert [line.partition(" matches no layer")[0] for line in text.splitlines()] == [
            "variant a: pattern 'block.21'",
            "variant b: pattern 'head'",
            "finetune.targets: pattern 'dense'",
        ]
    assert not (tmp_path / "run").exists()


def test_a_wrong_pattern_of_a_command_tells_what_exists(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    exists = "matches no layer; this model has block.0 to block.2, in each of them query, key, value, output, fc1, fc2"
    output = ["--output", tmp_path / "out"]
    assert f"'block.9' {exists}" in refusal(
        "quantize", tiny_checkpoint, "--format", "nf4", "--skip", "block.9", *output
    )
    assert f"'dense' {exists}" in refusal("finetune", tiny_checkpoint, "--data", shapes, "--target", "dense", *output)
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe(tmp_path: Path) -> None:
    assert refusal("run", tmp_path / "no.yaml").startswith(f"cannot read recipe {tmp_path / 'no.yaml'}: No such file")


def test_a_wrong_override(recipe: Path) -> None:
    assert "must look like KEY=VALUE" in refusal("run", recipe, "--set", "finetune.epochs")
    assert "did you mean 'finetune'?" in refusal("run", recipe, "--set", "fintune.epochs=1")


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_a_missing_checkpoint(source: str, shapes: Path, tmp_path: Path, recipe: Path) -> None:
    expected = f"no checkpoint at {source}: the folder does not exist"
    assert refusal("evaluate", source, "--data", shapes) == expected
    assert refusal("quantize", source, "--format", "nf4", "--output", tmp_path / "out") == expected
    assert refusal("predict", source, shapes / "test" / "cross" / "00.png") == expected
    assert refusal("init", source, shapes) == expected
    assert refusal("run", recipe, "--set", f"model={source}") == expected


def test_a_hub_model_without_a_network(shapes: Path, tmp_path: Path) -> None:
    text = refusal("evaluate", "nobody/vit-nothing", "--data", shapes)
    assert "cannot fetch 'nobody/vit-nothing' from the Hugging Face hub" in text
    assert "hf download nobody/vit-nothing --local-dir FOLDER" in text


def test_a_hub_data_set_without_a_network(tiny_checkpoint: Path) -> None:
    text = refusal("evaluate", tiny_checkpoint, "--data", "nobody/no-images")
    assert text.startswith("no folder named 'nobody/no-images', and the Hugging Face hub gave no data set of that name")
    assert "check the spelling and the network, or download it and give its folder" in text


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vi')


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def delete_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def delete_preprocessor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "query.weight" in name or "q_proj.weight" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (cut_weights, r"model.safetensors is not a complete safetensors file .*: copy it again"),
        (break_config, r"tiny-vit: config.json is not a valid JSON file"),
        (pickle_weights, r"pytorch_model.bin is a pickle, which can run code .* convert it with: python -c"),
        (delete_config, r"has no config.json, so it is not a Hugging Face checkpoint"),
        (delete_preprocessor, r"has no preprocessor_config.json: copy it from the model it was made from"),
        (drop_a_weight, r"lacks weights that its config.json asks for, first vit\."),
    ],
)
def test_an_unreadable_checkpoint(
    spoil: Callable[[Path], None], expected: str, tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path]
) -> None:
    folder = copy_of(tiny_checkpoint)
    spoil(folder)
    assert re.search(expected, refusal("evaluate", folder, "--data", shapes, *QUICK))


def overflowing(folder: Path) -> Path:
    """Weights are numbers, and logits are not."""
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_gives_no_numbers_fails_with_its_reason_in_the_record(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path]
) -> None:
    result = vitopt("evaluate", overflowing(copy_of(tiny_checkpoint)), "--data", shapes, *QUICK, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failure"].startswith("logits are not finite, first for image circle/00.png")


def test_a_model_that_gives_no_numbers_is_told_on_standard_error(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path]
) -> None:
    result = vitopt("evaluate", overflowing(copy_of(tiny_checkpoint)), "--data", shapes, *QUICK, "--json")
    assert "error: tiny-vit failed: logits are not finite, first for image circle/00.png" in result.stderr


def test_a_baseline_that_gives_no_numbers_is_told_on_standard_error(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    broken = overflowing(copy_of(tiny_checkpoint).rename(tmp_path / "broken"))
    result = vitopt("evaluate", tiny_checkpoint, "--baseline", broken, "--data", shapes, *QUICK, "--json")
    assert "error: broken failed: logits are not finite" in result.stderr and result.exit_code == 1


def test_a_quantized_checkpoint_is_not_quantized_again(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    done("quantize", tiny_checkpoint, "--format", "nf4", "--output", tmp_path / "nf4")
    assert "is quantized already; start from the 16- or 32-bit checkpoint" in refusal(
        "quantize", tmp_path / "nf4", "--format", "int8", "--output", tmp_path / "out"
    )
    assert "is quantized already; start from the 16- or 32-bit checkpoint" in refusal(
        "finetune", tmp_path / "nf4", "--data", shapes, "--output", tmp_path / "out"
    )


def test_a_format_that_cannot_run_here(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = refusal("quantize", tiny_checkpoint, "--format", "fp8", "--output", tmp_path / "out", "--device", "cpu")
    assert text.startswith("format fp8 cannot run on cpu: ") and text.endswith("the nearest that can is w8a8")


def test_a_device_that_is_not_there(tiny_checkpoint: Path, shapes: Path) -> None:
    text = refusal("evaluate", tiny_checkpoint, "--data", shapes, "--device", "cuda:99")
    assert text.startswith("device cuda:99")


def test_strict_attention(tiny_checkpoint: Path) -> None:
    text = refusal("benchmark", tiny_checkpoint, "--attention", "flash_attention_2", "--strict", "--device", "cpu")
    assert text.startswith("tiny-vit: flash_attention_2 cannot run: FlashAttention-2 needs a CUDA device")


def test_the_same_checkpoint_twice(tiny_checkpoint: Path) -> None:
    assert refusal("benchmark", tiny_checkpoint, tiny_checkpoint).startswith("the same checkpoint is given twice")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch-size", "0"], "batch_size: input should be greater than or equal to 1, not 0"),
        (["--latency-batch-size", "1,x"], "latency.batch_sizes.1: input should be a valid integer"),
        (["--latency-batch-size", "-1"], "latency.batch_sizes.0: "),
        (["--iterations", "0"], "latency.iterations: "),
        (["--limit", "0"], "limit: input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_number(arguments: list[str], expected: str, tiny_checkpoint: Path, shapes: Path) -> None:
    assert expected in refusal("evaluate", tiny_checkpoint, "--data", shapes, *arguments)


@pytest.mark.parametrize(
    ("arguments", "named", "because"),
    [
        (["quantize", "--format", "nf4", "--max-top1-drop", 0.1, "--granularity", "linear"],
         ["--max-top1-drop", "--granularity"], "--skip auto"),
        (["quantize", "--format", "nf4", "--skip", "block.0", "--objective", "size"], ["--objective"], "--skip auto"),
        (["quantize", "--format", "auto", "--max-kl-share", 0.5], ["--max-kl-share"], "--skip auto"),
        (["quantize", "--format", "nf4", "--min-agreement", 98], ["--min-agreement"], "--format auto"),
        (["quantize", "--format", "nf4", "--no-compile"], ["--no-compile"], "--format auto"),
        (["quantize", "--format", "nf4", "--data", "digits"], ["--data"], "--skip auto"),
        (["quantize", "--format", "nf4", "--limit", 9], ["--limit"], "--skip auto"),
        (["quantize", "--format", "nf4", "--calibrate", "d", "--damping", 1], ["--calibrate", "--damping"], "gptq"),
        (["quantize", "--format", "nf4", "--calibration-images", 1], ["--calibration-images"], "gptq"),
        (["quantize", "--format", "bf16", "--half", "bf16"], ["--half"], "bf16"),
        (["finetune", "--method", "full", "--rank", 8, "--target", "query"], ["--rank", "--target"], "--method full"),
        (["finetune", "--method", "full", "--alpha", 8, "--dropout", 0], ["--alpha", "--dropout"], "--method full"),
        (["sensitivity", "--format", "nf4", "--candidates", 8], ["--candidates"], "--sample"),
        (["sensitivity", "--format", "nf4", "--objective", "size"], ["--objective"], "--max-top1-drop"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused_before_anything_is_opened(
    arguments: list[object], named: list[str], because: str, tmp_path: Path
) -> None:
    command, *options = arguments
    if command != "quantize":
        options += ["--data", "absent"]
    line = refusal(command, "absent", *options, "--output", tmp_path / "out")
    told, reason = line.split(": ", 1)
    assert told.split(", ") == named and because in reason
    assert "\n" not in line


def test_a_recipe_cannot_train_and_test_on_one_split(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_checkpoint, f"{shapes}:test", finetune={"epochs": 1})
    line = refusal("run", recipe, "--output", tmp_path / "run")
    assert f"{shapes}:test" in line and "test: test" in line
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_of_images(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    assert f"{tmp_path / 'empty'} has no images" in refusal("evaluate", tiny_checkpoint, "--data", tmp_path / "empty")
    assert "no data at /nowhere: the folder does not exist" in refusal(
        "evaluate", tiny_checkpoint, "--data", "/nowhere"
    )


def test_images_of_one_class(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes / "test" / "cross", tmp_path / "one" / "cross")
    text = refusal("evaluate", tiny_checkpoint, "--data", tmp_path / "one")
    assert f"all 6 images of {tmp_path / 'one'} are of one class; accuracy needs at least two" in text


def test_images_without_labels(tiny_checkpoint: Path, shapes: Path) -> None:
    text = refusal("evaluate", tiny_checkpoint, "--data", shapes / "test" / "cross")
    assert "has images but no labels: put them into one folder per class, or add a metadata.csv" in text


def test_labels_that_do_not_fit(tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(shapes)
    (folder / "test" / "cross").rename(folder / "test" / "plus")
    text = refusal("evaluate", tiny_checkpoint, "--data", folder)
    assert "has the class 'plus', which the model's head does not know (4 classes: circle, cross, square" in text
    (folder / "test" / "metadata.csv").write_text("file_name,label\nplus/00.png,3\nplus/01.png,4\n")
    text = refusal("evaluate", tiny_checkpoint, "--data", folder, "--labels", "index")
    assert "has label 4, but the model's head has 4 classes (0 to 3)" in text


@pytest.fixture
def numbers(shapes: Path, copy_of: Callable[[Path], Path]) -> Path:
    """The test images with the positions of their classes as labels."""
    folder = copy_of(shapes / "test")
    names = ("circle", "cross", "square", "stripe")
    rows = [f"{name}/{index:02d}.png,{number}" for number, name in enumerate(names) for index in range(6)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    return folder


def test_numbers_are_positions_only_where_that_is_said(tiny_checkpoint: Path, numbers: Path, tmp_path: Path) -> None:
    evaluation = ("evaluate", tiny_checkpoint, "--data", f"{numbers}:all", *QUICK)
    sensitivity = ("sensitivity", tiny_checkpoint, "--data", numbers, "--format", "nf4", "--output", tmp_path / "out")
    for command in (evaluation, sensitivity):
        assert "--labels index" in refusal(*command)
    record = printed(*evaluation, "--labels", "index")
    assert [row["name"] for row in record["accuracy"]["classes"]] == ["circle", "cross", "square", "stripe"]
    recipe = write_recipe(tmp_path, tiny_checkpoint, numbers)
    assert "--labels index" in refusal("run", recipe, "--output", tmp_path / "run")
    records = printed("run", recipe, "--output", tmp_path / "run", "--set", "data.labels=index")
    assert [record["accuracy"]["images"] for record in records] == [24, 24]


def test_init_asks_what_numbers_mean(tiny_checkpoint: Path, numbers: Path) -> None:
    asking = done("init", tiny_checkpoint, numbers).stdout
    assert "--labels index" in asking.replace("\n# ", " ")
    assert "finetune" in yaml.safe_load(asking)
    told = done("init", tiny_checkpoint, numbers, "--labels", "index").stdout
    assert yaml.safe_load(told)["data"] == {"source": str(numbers), "labels": "index"}
    assert "nothing is fine-tuned" in told.replace("\n# ", " ")


@pytest.mark.parametrize("command", ["run", "quantize", "evaluate", "predict", "finetune"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_of_a_checkpoint_never_runs(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path], tmp_path: Path, command: str, file: str
) -> None:
    folder, trace = copy_of(tiny_checkpoint), tmp_path / "it-ran"
    (folder / "code.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Any: ...\n")
    own = {
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor"), "code.Any")
    }
    own |= {"model_type": "strange"} if file == "config.json" else {"image_processor_type": "StrangeProcessor"}
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | own))
    arguments = {
        "run": [write_recipe(tmp_path, folder, shapes), "--output", tmp_path / "run"]
        + (["--dry-run"] if file == "config.json" else []),
        "quantize": [folder, "--format", "bf16", "--output", tmp_path / "out"],
        "evaluate": [folder, "--data", shapes, *QUICK],
        "predict": [folder, next(shapes.rglob("*.png"))],
        "finetune": [folder, "--data", shapes, "--output", tmp_path / "out"],
    }[command]
    result = CliRunner().invoke(app, [command, *map(str, arguments)], input="y\n" * 20)
    assert result.exit_code == 1 and "auto_map" in result.stderr, result.output
    assert "[y/N]" not in result.output
    assert not trace.exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def enlarge(path: Path) -> None:
    Image.new("1", (12500, 8000)).save(path)  # 100 megapixels


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (truncate, r"image square/02.png cannot be decoded \(.*\): replace it, or leave it out with --skip-bad-images"),
        (
            enlarge,
            r"image square/02.png cannot be decoded \(100 megapixels, more than the 89 that .* decode\)",
        ),
    ],
)
def test_a_bad_image_is_named_or_left_out_and_counted(
    spoil: Callable[[Path], None],
    expected: str,
    tiny_checkpoint: Path,
    shapes: Path,
    copy_of: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    folder = copy_of(shapes)
    bad = folder / "test" / "square" / "02.png"
    spoil(bad)
    assert re.search(expected, refusal("evaluate", tiny_checkpoint, "--data", folder, *QUICK))
    record = printed("evaluate", tiny_checkpoint, "--data", folder, *QUICK, "--skip-bad-images")
    assert record["dataset"]["skipped"] == ["square/02.png"]
    assert record["dataset"]["images"] == record["accuracy"]["images"] == 23

    text = refusal("predict", tiny_checkpoint, bad)
    assert str(bad) in text and ("cannot be decoded" in text or "100 megapixels" in text)


def test_a_recipe_leaves_bad_images_out_when_told(
    tiny_checkpoint: Path, shapes: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = copy_of(shapes)
    truncate(folder / "test" / "square" / "02.png")
    path = write_recipe(tmp_path, tiny_checkpoint, folder)
    assert "square/02.png cannot be decoded" in vitopt("run", path, "--output", tmp_path / "run").stderr
    records = printed("run", path, "--output", tmp_path / "run", "--skip-bad-images")
    assert [record["dataset"]["skipped"] for record in records] == [["square/02.png"]] * 2


def test_missing_images_and_records(tiny_checkpoint: Path, shapes: Path, tmp_path: Path) -> None:
    assert "holds no records" in refusal("report", tmp_path)
    assert "no record at" in refusal("compare", tmp_path, tmp_path)


def test_an_output_that_is_something_else_is_left_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    text = refusal("quantize", tiny_checkpoint, "--format", "fp32", "--output", tmp_path / "file")
    assert text == f"cannot write {tmp_path / 'file'}: a file is in the way; choose another --output"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("mine")
    text = refusal("quantize", tiny_checkpoint, "--format", "fp32", "--output", tmp_path / "photos")
    assert "holds cat.jpg, which is not part of a vitopt result" in text
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "mine" and (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_while_weights_are_written(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path
) -> None:
    from transformers import modeling_utils

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    done("run", recipe, "--output", tmp_path / "run")
    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    output = tmp_path / "out"
    expected = f"the disk is full while writing {output}: free some space and run it again"
    assert refusal("quantize", tiny_checkpoint, "--format", "nf4", "--output", output) == expected
    text = refusal("finetune", tiny_checkpoint, "--data", shapes, "--output", output, "--epochs", 1, "--method", "full")
    assert text.startswith("the disk is full while writing the training state beside")
    # a run keeps the stages that were complete
    result = vitopt("run", recipe, "--output", tmp_path / "run", "--set", "variants.1.skip=[block.2]")
    assert result.exit_code == 1 and result.stderr.count("error:") == 1
    assert f"error: the disk is full while writing {tmp_path / 'run' / 'variants' / 'nf4'}" in result.stderr
    assert (tmp_path / "run" / "variants" / "fp32" / "model.safetensors").is_file()
    assert not output.exists() and list(tmp_path.rglob("*.partial*")) == []


def test_a_full_disk_while_a_record_is_written(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if "record.json" not in self.name:
            return write(self, content)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    text = refusal("evaluate", tiny_checkpoint, "--data", shapes, *QUICK, "--output", tmp_path / "out")
    assert text.startswith(f"the disk is full while writing {tmp_path / 'out' / 'record.json'}")


# What is the user's stays the user's


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def project(tmp_path: Path, tiny_checkpoint: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: somebody's project, with a checkpoint of its own and a recipe."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_checkpoint, folder / "model")
    for name in ("config.json", "record.json", "sensitivity.json", "src/main.py", ".git/HEAD"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    write_recipe(folder, folder / "model", shapes)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing long may begin."""
    from vitopt import inference, rows
    from vitopt.optimize import quantize
    from vitopt.search import analysis, fastest
    from vitopt.training import finetune as training

    def began(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(rows, "measure", began)
    monkeypatch.setattr(inference, "measure", began)
    monkeypatch.setattr(analysis, "analyse", began)
    monkeypatch.setattr(fastest, "find_fastest", began)
    for module in (training, quantize):
        monkeypatch.setattr(module, "load_model", began)


def writing(model: Path | str, data: Path, recipe: Path | str) -> dict[str, list[object]]:
    """Every command that takes --output, without it."""
    return {
        "quantize": ["quantize", model, "--format", "bf16"],
        "skip auto": ["quantize", model, "--format", "nf4", "--skip", "auto", "--data", data],
        "fastest": ["quantize", model, "--format", "auto", "--data", data],
        "finetune": ["finetune", model, "--data", data],
        "sensitivity": ["sensitivity", model, "--data", data, "--format", "nf4"],
        "evaluate": ["evaluate", model, "--data", data],
        "benchmark": ["benchmark", model],
        "run": ["run", recipe],
    }


WRITING = list(writing("", Path(), ""))


@pytest.mark.parametrize("command", WRITING)
@pytest.mark.parametrize("output", [".", "src/..", "src", "model", "model/out", "..", "config.json"])
def test_nothing_of_a_project_is_lost(command: str, output: str, project: Path, shapes: Path, no_work: None) -> None:
    before = contents(project)
    text = refusal(*writing("model", shapes, "recipe.yaml")[command], "--output", output)
    assert "choose" in text and "--output" in text and text.count("\n") == 0
    assert contents(project) == before and [path.name for path in project.parent.iterdir()] == ["project"]


@pytest.mark.parametrize("command", WRITING)
def test_results_are_never_written_among_the_images(command: str, project: Path, shapes: Path, no_work: None) -> None:
    shutil.copytree(shapes, "shapes")
    path = write_recipe(project, project / "model", project / "shapes")
    if command in ("quantize", "benchmark"):
        pytest.skip("no images are given")
    for output in ("shapes/out", "shapes"):
        text = refusal(*writing("model", Path("shapes"), path)[command], "--output", output)
        assert "the input" in text and "shapes" in text
    assert not Path("shapes/out").exists()


@pytest.mark.parametrize("command", ["quantize", "finetune"])
def test_a_checkpoint_of_vitopt_is_not_replaced_by_what_is_made_of_it(
    command: str, tiny_checkpoint: Path, shapes: Path, tmp_path: Path, no_work: None
) -> None:
    made = tmp_path / "made"
    storage.copy_folder(tiny_checkpoint, made)
    before = contents(made)
    assert f"the input {made}" in refusal(*writing(made, shapes, "")[command], "--output", made)
    assert contents(made) == before


@pytest.mark.parametrize("command", ["evaluate", "benchmark", "sensitivity"])
def test_an_output_that_cannot_be_written_is_found_before_the_measuring(
    command: str, project: Path, shapes: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    arguments = writing("model", shapes, "")[command]
    text = refusal(*arguments, "--output", "config.json/below")
    assert text == "cannot write config.json/below: a file is in the way; choose another --output"
    monkeypatch.setattr(Path, "mkdir", read_only)
    assert refusal(*arguments, "--output", "new") == (
        "cannot write new: Read-only file system; choose another --output"
    )


@pytest.mark.parametrize("place", ["export", "variants/nf4"])
def test_notes_in_a_run_are_refused_by_name_before_the_work(
    place: str, finished: tuple[Path, Result], tmp_path: Path, no_work: None
) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (folder / place / "notes.txt").write_text("mine")
    before = contents(folder)
    text = refusal("run", folder / "recipe.yaml", "--output", folder, "--set", "variants.1.skip=[fc1]")
    assert f"{folder / place} holds notes.txt" in text
    assert contents(folder) == before


@pytest.mark.parametrize("command", ["quantize", "fastest", "finetune", "evaluate", "benchmark", "sensitivity", "run"])
def test_a_second_process_is_refused_at_once(
    command: str, recipe: Path, tiny_checkpoint: Path, shapes: Path, tmp_path: Path, no_work: None
) -> None:
    how = "reserved" if command in ("quantize", "fastest", "finetune") else "claimed"
    code = (
        "import sys, pathlib; from vitopt import storage\n"
        f"with storage.{how}(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    )
    hold = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "held\n"
        text = refusal(*writing(tiny_checkpoint, shapes, recipe)[command], "--output", tmp_path / "out")
        process.communicate()
    assert text.startswith(f"{tmp_path / 'out'} is in use by process {process.pid} on ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("evaluate", "record.json"),
        ("benchmark", "variants/tiny-vit/record.json"),
        ("sensitivity", "sensitivity.json"),
        ("run", "report.md"),
    ],
)
def test_a_file_that_would_be_overwritten_is_found_before_the_work(
    command: str, name: str, recipe: Path, tiny_checkpoint: Path, shapes: Path, tmp_path: Path, no_work: None
) -> None:
    output = tmp_path / "out"
    with storage.claimed(output):
        storage.write_text(output / "other.json", "{}")  # a folder of vitopt
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("mine")
    text = refusal(*writing(tiny_checkpoint, shapes, recipe)[command], "--output", output)
    assert name in text and "vitopt did not write it: move it elsewhere" in text
    assert (output / name).read_text() == "mine"


def test_a_report_of_an_older_vitopt_can_be_written_again_and_the_run_cannot(
    finished: tuple[Path, Result], tmp_path: Path, no_work: None
) -> None:
    folder = Path(shutil.copytree(finished[0], tmp_path / "run"))
    for path in folder.rglob(".vitopt.json"):
        path.unlink()
    (folder / "report.md").unlink()
    done("report", folder)
    assert (folder / "report.md").is_file()
    before = contents(folder)
    text = refusal("run", finished[0].parent / "recipe.yaml", "--output", folder)
    assert "older vitopt" in text and "choose another --output" in text
    assert contents(folder) == before


# Names that a terminal would obey


def test_brackets_and_escape_sequences_in_names_are_printed_as_they_are(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    nasty, shown = "[/x]\x1b[31m", "[/x]\\x1b[31m"
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / f"{nasty}vit"))
    config = json.loads((model / "config.json").read_text())
    names = [f"{nasty}{name}" for name in ("circle", "cross", "square", "stripe")]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    (model / "config.json").write_text(json.dumps(config))
    image = Path(shutil.copy(shapes / "test" / "cross" / "00.png", tmp_path / f"{nasty}.png"))
    outputs = [
        done("predict", model, image),
        done("benchmark", model, *QUICK, "--attention", "flash_attention_2", "--device", "cpu"),
        done("run", write_recipe(tmp_path, tiny_checkpoint, shapes), "--output", tmp_path / f"{nasty}run"),
        done("quantize", model, "--format", "bf16", "--output", tmp_path / f"{nasty}bf16"),
        vitopt("predict", model, tmp_path / f"{nasty}missing.png"),
    ]
    said = [result.stdout + result.stderr for result in outputs]
    name = f"{shown}vit".rpartition("/")[2]
    assert not any("\x1b" in text for text in said)
    assert f"{shown}.png" in said[0] and f"{shown}cross" in said[0]
    assert f"note: {name}: flash_attention_2 cannot run" in said[1] and f"\n{name} " in said[1]
    assert f"report: {tmp_path}/{shown}run/report.html" in said[2] and f"export: {tmp_path}/{shown}run" in said[2]
    assert f"checkpoint: {tmp_path}/{shown}bf16" in said[3]
    assert f"error: no image at {tmp_path}/{shown}missing.png" in said[4]


def test_a_mistake_of_ours_keeps_its_traceback(
    tiny_checkpoint: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitopt import inference

    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(inference, "measure", broken)
    result = vitopt("evaluate", tiny_checkpoint, "--data", shapes)
    assert isinstance(result.exception, AssertionError)


# Signals and pipes need a process of their own


def start(arguments: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "vitopt", *map(str, arguments)]
    # What runs in the background of a shell has Ctrl-C switched off, and hands that down.
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT, preexec_fn=heeding, **options
    )


INTERRUPTED = "interrupted: finished stages are kept; the same command goes on"


def test_ctrl_c_while_variants_are_measured_keeps_what_is_finished(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "time_rows", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    ended = vitopt("run", recipe, "--output", tmp_path / "run")
    assert (ended.exit_code, ended.stdout) == (130, "")
    assert ended.stderr.splitlines()[-1].startswith(INTERRUPTED)
    assert list(tmp_path.rglob("*.partial*")) == []
    assert {p.parent.name for p in (tmp_path / "run").glob("variants/*/model.safetensors")} == {"fp32", "nf4"}
    assert list((tmp_path / "run").rglob("record.json")) == []


def test_a_run_that_is_terminated_while_it_trains_leaves_no_halves(
    tiny_checkpoint: Path, shapes: Path, tmp_path: Path
) -> None:
    # Long enough to be interrupted for certain, and to end some time if that should fail.
    path = write_recipe(tmp_path, tiny_checkpoint, shapes, finetune={"epochs": 300, "batch_size": 8})
    with start(["run", path, "--output", tmp_path / "run"], stdout=subprocess.PIPE) as process:
        said: list[str] = []
        for text in process.stderr:
            # Once: a line whose printing is interrupted may come twice.
            begins = text.startswith("finetune: lora on 32 images")
            if begins and not any(earlier.startswith("finetune: lora") for earlier in said):
                process.send_signal(signal.SIGTERM)
            said.append(text)
        assert process.stdout.read() == ""
    assert process.returncode == 130, "".join(said)
    assert said[-1].startswith(INTERRUPTED), "".join(said)
    assert "Traceback" not in "".join(said)
    assert list(tmp_path.rglob("*.partial*")) == []
    assert not list((tmp_path / "run").glob("variants/*/model.safetensors"))
    assert not (tmp_path / "run" / "finetune").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor"],
        ["doctor", "--json"],
    ],
)
def test_a_reader_that_goes_away_is_no_error_to_speak_of(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with start(arguments, stdout=writing) as process:
        os.close(writing)
        said = process.stderr.read()
    assert said == "" and process.returncode in (0, 1)


# Threads bound to cores are asked for before torch is imported, which only a process of its own can do


THREADED = ["run", "evaluate", "benchmark", "predict"]


def test_only_commands_that_compute_on_the_cpu_bind_threads() -> None:
    offering = {command for command in OPTIONS if "--threads" in done(command, "--help").stdout}
    assert offering == {*THREADED, "quantize"}  # which measures with --format auto


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot bind threads")
@pytest.mark.parametrize("command", THREADED)
def test_more_threads_than_cores_are_refused_before_torch_is_imported(
    command: str, recipe: Path, tiny_checkpoint: Path, shapes: Path
) -> None:
    arguments: dict[str, list[object]] = {
        "run": [recipe],
        "evaluate": [tiny_checkpoint, "--data", shapes],
        "benchmark": [tiny_checkpoint],
        "predict": [tiny_checkpoint, shapes / "test" / "cross" / "00.png"],
    }
    packages, ended = imports(command, *map(str, arguments[command]), "--threads", "999")
    said = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
    assert ended.returncode == 1 and ended.stdout == "" and len(said) == 1
    assert re.fullmatch(
        r"error: cannot bind 999 threads: this process may use \d+ physical cores?, each takes one thread", said[0]
    )
    assert packages & HEAVY == set()


def test_no_threads_are_a_mistake_in_the_arguments(tiny_checkpoint: Path) -> None:
    assert vitopt("benchmark", tiny_checkpoint, "--threads", "0").exit_code == 2


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot bind threads")
def test_benchmark_records_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in threads.WAITING:
        monkeypatch.delenv(name, raising=False)
    arguments = ["benchmark", "random:vit-tiny-patch16-32", "--threads", "1", "--iterations", "2", "--rounds", "1"]
    with start([*arguments, "--json"], stdout=subprocess.PIPE) as process:
        said, complaints = process.communicate()
    assert process.returncode == 0, complaints
    (record,) = json.loads(said)
    facts = record["environment"]
    assert (facts["torch_threads"], facts["threads_bound"]) == (1, True)
    assert facts["openmp"]["waiting"] == {}, "bound threads have the machine alone"
    assert record["memory"]["peak_bytes"] > 0, "the process that measures memory inherits the settings"


# The recipes of the project


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_plans(
    path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "VITOPT_SHARED" in path.read_text():
        monkeypatch.setenv("VITOPT_SHARED", str(request.getfixturevalue("shared")))
    monkeypatch.setattr(forecast, "seconds_per_image", lambda *_: 0.01)  # else calls of a large model are timed
    content = printed("run", path, "--dry-run")
    names = [variant["name"] for variant in content["recipe"]["variants"]]
    assert list(content["layer_plans"]) == names
    assert all("classifier" in plan for plan in content["layer_plans"].values())
