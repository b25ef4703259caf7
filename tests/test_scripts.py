"""The scripts behind the figures of README."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vitopt.records import Accuracy, Latency, Memory, Record, Roofline, Variant, VersusBaseline

ROOT = Path(__file__).parents[1]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return script("performance_table")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return script("device_benchmark")


def row(batch_size: int, p50_ms: float, **changes: Any) -> Latency:
    times = {
        "mean_ms": p50_ms,
        "std_ms": 0.1,
        "min_ms": p50_ms,
        "p50_ms": p50_ms,
        "p95_ms": p50_ms,
        "p99_ms": p50_ms + 1,
    }
    counts = {"iterations": 100, "rounds": 10, "warmup_ms": 1, "warmup_iterations": 10, "samples_ms": ()}
    rate = {"images_per_second": 1000 * batch_size / p50_ms}
    return Latency(batch_size=batch_size, **times | counts | rate | changes)


def record(name: str, *rows: Latency, **changes: Any) -> Record:
    variant = Variant(name=name, format="bf16", asked={"attention": "sdpa"}, ran={"attention": "sdpa"} if rows else {})
    return Record(variant=variant, latency=rows, **changes)


GPU = {"gpu": {"name": "NVIDIA H200"}, "libraries": {"torch": "2.11.0"}, "torch_threads": 16}


def written(folder: Path, name: str, steps: list[dict[str, Any]], environment: dict[str, Any] = GPU) -> None:
    content = {"schema": "vitopt.device/1", "created": "2026-01-02", "environment": environment, "steps": steps}
    (folder / name).write_text(json.dumps(content))


def step(name: str, *records: Record, **changes: Any) -> dict[str, Any]:
    told = {"skipped": None, "failure": None} | changes
    return {"name": name, "records": [one.to_json() for one in records]} | told


def test_readme_says_what_the_results_say(table: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.replaced(readme, table.tables(table.load_results(ROOT / "benchmarks" / "results"))) == readme


def test_without_a_gpu_every_row_of_every_gpu_recipe_is_unmeasured(table: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"images": 400}')
    told = table.tables(table.load_results(tmp_path))
    assert told.startswith(
        "**Unmeasured on any GPU** (`make gpu` measures them): `waterfall-vit-l`: fp32-eager, bf16-eager"
    )
    assert "nf4-as-fp8" in told and "cudnn" in told


def test_figures_come_from_the_file_and_absent_rows_are_named(table: ModuleType, tmp_path: Path) -> None:
    rates = Roofline(gemm_format="bf16", gemm_flops_per_second=7e14, copy_bytes_per_second=4e12)
    rows = (
        row(1, 1.25, speedup_vs_baseline=8.04, floor_ms=0.176, peak_bytes=700_000_000),
        row(64, 12.5, model_flop_utilisation_percent=61.8, speedup_vs_baseline=20),
    )
    fp8 = record("fp8", failure="compute capability 8.0 is below 8.9")
    waterfall = step("waterfall-vit-l", record("bf16-fused", *rows, roofline=rates), fp8)
    written(tmp_path, "h200-2026-01-02.json", [waterfall, step("packed-vit-l", skipped="bitsandbytes not installed")])
    told = table.tables(table.load_results(tmp_path))
    assert "**NVIDIA H200**, torch 2.11.0: `waterfall-vit-l` (`benchmarks/results/h200-2026-01-02.json`)" in told
    assert "| bf16-fused | 1.25 | 2.25 | 8.04x | 0.18 | 800 | 5120 | 62 | 700 MB |" in told
    assert "| w8a8 | unmeasured |" in told and "| fp8 | unmeasured |" in told
    assert "- fp8 failed: compute capability 8.0 is below 8.9" in told
    assert "matrix products in TFLOP/s bf16 700; copy 4,000 GB/s" in told
    assert "Unmeasured on NVIDIA H200: `packed-vit-l` (fp32, bf16-compiled, nf4" in told
    assert "): bitsandbytes not installed." in told
    assert "`attention-vit-l` (auto, flash" in told and "): not run." in told


def test_a_cpu_is_named_with_its_threads(table: ModuleType, tmp_path: Path) -> None:
    machine = {"gpu": None, "processor": "AMD EPYC", "libraries": {"torch": "2.13.0"}, "torch_threads": 2}
    memory = Memory(peak_bytes=2_000_000_000, kind="resident_set", batch_size=1)
    waterfall = step("waterfall-cpu-vit-l", record("bf16-sdpa", row(1, 200.0), memory=memory))
    written(tmp_path, "epyc.json", [waterfall], machine | {"threads_bound": True})
    told = table.tables(table.load_results(tmp_path))
    assert "**AMD EPYC, 2 bound threads**, torch 2.13.0: `waterfall-cpu-vit-l`" in told
    assert "| bf16-sdpa | 200.0 | 201.0 | – | – | 5.0 | – | 2.00 GB |" in told
    assert "Unmeasured on any GPU" in told


def test_a_later_file_of_a_device_replaces_an_earlier_one_recipe_by_recipe(table: ModuleType, tmp_path: Path) -> None:
    both = [step("waterfall-vit-l", record("w8a8", row(1, 1.5))), step("packed-vit-l", record("int8", row(1, 9.5)))]
    written(tmp_path, "h200-2026-01-02.json", both)
    written(tmp_path, "h200-2026-01-03.json", [step("waterfall-vit-l", record("w8a8", row(1, 1.25)))])
    told = table.tables(table.load_results(tmp_path))
    assert "| w8a8 | 1.25 |" in told and "1.50" not in told
    assert "| int8 | 9.50 |" in told


def test_fidelity_stands_beside_speed(table: ModuleType, tmp_path: Path) -> None:
    accuracy = Accuracy(
        images=400, top1_percent=90.75, top1_ci95_percent=(87, 93), top5_percent=99.0, expected_calibration_error=0.1
    )
    versus = VersusBaseline(
        baseline="fp32",
        top1_delta_points=-0.5,
        top1_delta_ci95_points=(-1.8, 0.5),
        agreement_percent=99.5,
        right_to_wrong=2,
        wrong_to_right=0,
        mcnemar_p=0.5,
        mean_kl_divergence=0.00031,
        normalised_logit_error=0.01,
        smallest_visible_loss_points=1,
        verdict="",
    )
    bf16 = record("bf16", row(1, 9.0, speedup_vs_baseline=1.76), accuracy=accuracy, versus_baseline=versus)
    reason = "fp8 arithmetic needs a CUDA device"
    failed = [record(name, failure=reason) for name in ("fp8", "fp8-compiled")]
    written(tmp_path, "h200-2026-01-02.json", [step("imagenet-vit-tiny", bf16, *failed)])
    told = table.tables(table.load_results(tmp_path))
    assert "**NVIDIA H200**: `imagenet-vit-tiny`, 400 photos, batch 1" in told
    assert "| bf16 | 90.8 | -0.5 (-1.8 to +0.5) | 99.5 | 9.00 | 1.76x | – | – | 0.0003 |" in told
    assert "- fp8, fp8-compiled failed: fp8 arithmetic needs a CUDA device" in told


def test_a_readme_without_markers_is_left_alone(table: ModuleType) -> None:
    with pytest.raises(SystemExit, match="lacks the markers"):
        table.replaced("# vitopt\n", "content")


def test_a_device_that_is_not_there_is_one_line(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["device_benchmark.py", "--device", "cuda:99"])
    with pytest.raises(SystemExit, match=r"^error: device cuda:99[^\n]*$"):
        benchmark.main()


def test_results_keep_figures_and_no_place_of_this_machine(benchmark: ModuleType) -> None:
    timed = record("a", row(1, 2.0, samples_ms=(2.0,)), command="vitopt run /home/me/recipe.yaml")
    trimmed = benchmark._trimmed(timed.to_json())
    assert trimmed["latency"][0]["p50_ms"] == 2.0 and trimmed["latency"][0]["samples_ms"] == []
    assert "/home/me" not in json.dumps(trimmed)
    assert Record.model_validate(trimmed).variant.name == "a"


def test_what_is_not_installed_is_skipped_by_name(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    assert benchmark._recipe("packed-vit-l", "cuda", None, 0).skipped == "bitsandbytes not installed"
    monkeypatch.undo()
    monkeypatch.setenv("VITOPT_SHARED", str(tmp_path / "nowhere"))
    assert "VITOPT_SHARED" in benchmark._recipe("imagenet-vit-tiny", "cuda", None, 0).skipped
    assert benchmark._recipe("waterfall-vit-l", "cuda", None, 0).skipped == "no time was left for it (--minutes)"


def test_files_are_named_after_the_device(benchmark: ModuleType) -> None:
    assert benchmark._device_name({"gpu": {"name": "NVIDIA H200"}}) == "h200"
    assert benchmark._device_name({"gpu": {"name": "NVIDIA A100-SXM4-80GB"}}) == "a100-sxm4-80gb"
    assert benchmark._device_name({"gpu": None, "processor": "AMD EPYC"}) == "amd-epyc"


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    module = script("claims_coverage")
    module.TRUTH_IMAGES = 100_000
    return module


@pytest.mark.parametrize(
    ("name", "runs"),
    [("wilson", 200), ("tango", 200), ("speedup", 200), ("floor-flat", 60), ("floor-steep", 60), ("floor-tied", 60)],
)
def test_claims_are_seldom_wrong(coverage: ModuleType, name: str, runs: int) -> None:
    """A few of the runs that the script makes: false in at most 5 %, as far as so few can tell."""
    wrong, interval = coverage.simulate(coverage.CLAIMS[name], runs, seed=1)
    assert 100 * interval.low <= coverage.CLAIMS[name].allowed_percent, f"wrong in {wrong} of {runs}"


def test_a_floor_is_shown_often_enough_for_its_errors_to_count(coverage: ModuleType) -> None:
    rng = coverage.np.random.default_rng(2)
    goal = coverage.Goal(max_top1_drop=0.97 * coverage.true_drop(coverage.VARIANCE))
    decisions = [coverage.search(rng, "steep", goal, 4096)[0].decision for _ in range(30)]
    assert decisions.count("shown") >= 15
