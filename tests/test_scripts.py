"""The scripts behind the figures of README."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from vitopt.measure.predictions import Predictions
from vitopt.prediction import predict
from vitopt.records import Accuracy, Latency, Memory, Record, Roofline, Variant, VersusBaseline
from vitopt.serving_record import CallerLatency, ServedRate

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
    assert table.replaced(readme, table.all_tables(ROOT / "benchmarks" / "results")) == readme


def test_readme_lists_the_families_that_vitopt_opens() -> None:
    families = script("families_table")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert families.replaced(readme) == readme
    assert families.replaced(readme.replace("| `beit` |", "| `beat` |")) == readme


def test_without_a_gpu_every_row_of_every_gpu_recipe_is_unmeasured(table: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"images": 400}')
    told = table.tables(table.load_results(tmp_path))
    assert told.startswith(
        "**Unmeasured on any GPU** (`make gpu` measures them): `goals-vit-l`: fp32-eager, bf16-fused"
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
    assert "Unmeasured on NVIDIA H200: `packed-vit-l` (fp16, fp16-compiled, bf16-compiled, nf4" in told
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


def test_it_starts_with_torch_and_transformers_alone_and_names_what_each_step_misses() -> None:
    program = """
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "pydantic" or name.startswith("pydantic."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
real = importlib.util.find_spec
absent = ("pydantic", "torchao", "bitsandbytes")
importlib.util.find_spec = lambda name, *rest: None if name in absent else real(name, *rest)
sys.meta_path.insert(0, Absent())
runpy.run_path("scripts/device_smoke.py", run_name="imported")
sys.argv = ["device_benchmark.py", "--dry-run", "--device", "cuda"]
runpy.run_path("scripts/device_benchmark.py", run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    told = dict(line.split(": ", 1) for line in ran.stdout.splitlines())
    assert list(told)[:4] == ["smoke", "goals-vit-l", "packed-vit-l", "tests"], ran.stderr
    assert told["smoke"] == "at most 60 s"
    assert told["goals-vit-l"].startswith("skipped, pydantic")
    assert told["packed-vit-l"].startswith("skipped, pydantic and bitsandbytes")


def stand_in(benchmark: ModuleType, name: str, program: str, limit_s: float = 60, **wants: Any) -> Any:
    """A step whose command is this program; its first argument is the folder of its run."""
    return benchmark.Plan(name, ("-c", program, benchmark.RUN), limit_s, **wants)


def writes(**p50_ms: float) -> str:
    """A program that leaves a record for each variant, as `vitopt run` does."""
    contents = {name: json.dumps(record(name, row(1, p50)).to_json()) for name, p50 in p50_ms.items()}
    return f"""
import pathlib, sys, time
for name, content in {contents!r}.items():
    folder = pathlib.Path(sys.argv[1]) / "variants" / name
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(content)
"""


def carried_out(benchmark: ModuleType, output: Path, *plans: Any, seconds: float = 600) -> dict[str, dict[str, Any]]:
    """The steps that the results hold afterwards, by name, in their order."""
    facts = {"gpu": {"name": "NVIDIA Stand-in"}, "libraries": {"torch": "2"}}
    benchmark._TICK_SECONDS = 0.1
    benchmark.carry_out(plans, output, facts, "cpu", deadline=time.monotonic() + seconds)
    (file,) = output.glob("*.json")
    return {one["name"]: one for one in json.loads(file.read_text())["steps"]}


def test_steps_run_in_their_order_and_one_that_fails_costs_only_itself(benchmark: ModuleType, tmp_path: Path) -> None:
    order = tmp_path / "order"
    note = f"open({str(order)!r}, 'a').write(NAME)"
    plans = [
        stand_in(benchmark, "a", f'NAME = \'a\'; {note}; print(\'{{"name": "rate", "value": 3}}\')'),
        stand_in(benchmark, "b", f"NAME = 'b'; {note}; raise SystemExit('no kernel')"),
        stand_in(benchmark, "absent", "", needs=("pydantic", "no_such_package")),
        stand_in(benchmark, "c", f"NAME = 'c'; {note}; {writes(fast=1.5)}"),
    ]
    steps = carried_out(benchmark, tmp_path / "out", *plans)
    assert order.read_text() == "abc" and list(steps) == ["a", "b", "absent", "c"]
    assert steps["a"]["figures"] == [{"name": "rate", "value": 3}] and steps["a"]["failure"] is None
    assert steps["b"]["failure"] == "exit code 1: no kernel"
    assert steps["absent"]["skipped"] == "no_such_package not there"
    assert [one["variant"]["name"] for one in steps["c"]["records"]] == ["fast"]
    assert (tmp_path / "out" / "logs" / "b.log").read_text() == "no kernel\n"


def test_a_step_that_is_stopped_at_its_limit_keeps_what_it_had_and_leaves_time_for_the_next(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    forever = f"""
import subprocess
print('about 1.5 ms, warm', flush=True)
pid = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid
open({str(child)!r}, "w").write(str(pid))
time.sleep(600)
"""
    plans = [
        stand_in(benchmark, "long", writes(fast=1.5, slow=9.0) + forever, limit_s=2.0),
        stand_in(benchmark, "next", writes(other=2.0)),
    ]
    steps = carried_out(benchmark, tmp_path / "out", *plans)
    assert "stopped after 2 s" in steps["long"]["failure"]
    assert [one["latency"][0]["p50_ms"] for one in steps["long"]["records"]] == [1.5, 9.0]
    assert "about 1.5 ms" in (tmp_path / "out" / "logs" / "long.log").read_text()
    assert len(steps["next"]["records"]) == 1
    status = Path(f"/proc/{child.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()  # what it had started ended with it


def test_results_stand_on_disk_while_a_step_still_runs(benchmark: ModuleType, tmp_path: Path) -> None:
    # Whoever kills the whole command, as a lease that ends does, finds them.
    output = tmp_path / "out"
    wait = f"""
import json
for _ in range(600):
    files = list(pathlib.Path({str(output)!r}).glob("*.json"))
    if files and any(step["records"] for step in json.loads(files[0].read_text())["steps"]):
        print("found")
        break
    time.sleep(0.05)
"""
    steps = carried_out(benchmark, output, stand_in(benchmark, "one", writes(fast=1.5) + wait, limit_s=30))
    assert steps["one"]["failure"] is None and (output / "logs" / "one.log").read_text() == "found\n"


def test_what_the_time_does_not_suffice_for_is_skipped_and_an_earlier_result_of_it_kept(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    carried_out(benchmark, tmp_path, stand_in(benchmark, "other", writes(fast=1.5)))
    steps = carried_out(benchmark, tmp_path, stand_in(benchmark, "late", "print('ran')"), seconds=1)
    assert "--minutes" in steps["late"]["skipped"] and not (tmp_path / "logs" / "late.log").exists()
    assert len(steps["other"]["records"]) == 1


def test_the_images_of_a_step_are_asked_for_by_name(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VITOPT_SHARED", str(tmp_path / "nowhere"))
    (plan,) = [plan for plan in benchmark.PLANS["cuda"] if plan.name == "imagenet-vit-tiny"]
    assert any("VITOPT_SHARED" in missing for missing in plan.missing())


def test_each_step_of_a_gpu_has_a_limit_and_those_that_decide_fit_the_time(benchmark: ModuleType) -> None:
    plans = benchmark.PLANS["cuda"]
    assert [plan.name for plan in plans[:4]] == ["smoke", "goals-vit-l", "packed-vit-l", "tests"]
    assert sum(plan.limit_s for plan in plans[:4]) <= 9 * 60
    recipes = [ROOT / part for plan in plans for part in plan.command if part.startswith("recipes/")]
    assert recipes and all(path.is_file() for path in recipes)


@pytest.fixture(scope="module")
def smoke() -> ModuleType:
    return script("device_smoke")


def test_a_smoke_test_tells_figures_and_reasons_line_by_line(
    smoke: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = torch.device("cpu")
    smoke.tell("model", lambda: smoke.timed(lambda pixels: pixels.sum(), 2, torch.float32, cpu))
    smoke.tell("fp8", lambda: smoke.fp8(32, 64, 16, cpu))
    smoke.tell("broken", lambda: 1 / 0)
    model, fp8, broken = map(json.loads, capsys.readouterr().out.splitlines())
    assert model["batch_size"] == 2 and model["p50_ms"] > 0 and model["device_ms"] > 0
    assert fp8["device_ms"] > 0
    assert broken == {"name": "broken", "failure": "ZeroDivisionError: division by zero"}


@pytest.fixture(scope="module")
def costs() -> ModuleType:
    return script("block_costs")


def test_kernels_of_a_block_are_counted_in_the_compilers_schedule(costs: ModuleType) -> None:
    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 32, bias=False)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.two(torch.nn.functional.gelu(self.one(inputs)))

    found = costs.cost(Mlp().requires_grad_(False), torch.zeros(16, 32))
    assert (found.generated, found.called) == (1, 2)  # GELU, and the products
    inner, outer, weights = 16 * 64, 16 * 32, 2 * 32 * 64
    assert found.bytes == 4 * (outer + inner + 2 * inner + inner + outer + weights)


def test_a_block_takes_fewer_kernels_with_the_options_that_join_them(costs: ModuleType) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    plain, fused, joined = (
        costs.block_cost(costs.ViTConfig(**shape), 1, options)
        for options in ((), ("fuse_qkv",), ("fuse_qkv", "gelu_epilogue"))
    )
    assert fused.called == plain.called - 2 and fused.generated == plain.generated
    assert joined.called == fused.called and joined.generated == fused.generated - 1
    assert joined.bytes < fused.bytes < plain.bytes
    last, narrow = (
        costs.block_cost(costs.ViTConfig(**shape), 1, options, block=-1) for options in ((), ("class_token_last",))
    )
    assert narrow.bytes < last.bytes
    dynamic, static = (
        costs.block_cost(costs.ViTConfig(**shape), 1, ("w8a8", "fuse_qkv", *options))
        for options in ((), ("static_scales",))
    )
    # No scale is looked for: what makes the inputs of a product also quantizes them.
    assert static.generated < dynamic.generated and static.bytes < dynamic.bytes and static.called == dynamic.called


def test_fused_products_leave_the_compiler_nothing_to_generate(costs: ModuleType) -> None:
    pytest.importorskip("triton", reason="needs triton")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    fused, kernels = (
        costs.block_cost(costs.ViTConfig(**shape), 1, ("fuse_qkv", *options)) for options in ((), ("fused_kernels",))
    )
    assert kernels.generated == 0 and kernels.called == fused.called
    assert kernels.bytes < fused.bytes


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


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    pytest.importorskip("aiohttp")
    return script("serving_comparison")


ANSWERS = """
import http.server, json, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        model = {"name": "one", "ready": True, "process": 1, "runs": {}, "labels": LABELS}
        self.answer([model] if self.path == "/models" else {})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        sum(range(100_000))
        self.answer({"classes": [{"label": "", "index": 0, "percent": 100.0}], "batch": 3})
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_servers_are_sent_the_same_load_and_one_that_fails_costs_only_itself(
    comparison: ModuleType, shapes: Path, tmp_path: Path
) -> None:
    labels = ["circle", "cross", "square", "stripe"]
    photos = comparison.write_photos(f"{shapes}:test", "name", labels, tmp_path / "photos", 8)
    assert len(list(photos.glob("*.jpg"))) == 8
    code = f"LABELS = {labels}\n{ANSWERS}"
    servers = [
        *(comparison.Server(name, (sys.executable, "-c", code, str(tmp_path / name))) for name in ("a", "b")),
        comparison.Server("broken", (sys.executable, "-c", "raise SystemExit('no such engine')")),
    ]
    with comparison.started(servers, tmp_path) as (running, failed):
        rows = list(comparison.compare(running, photos, [40, 50], requests=20, seconds=0.1, target_ms=5000))
        slow = list(comparison.compare(running[:1], photos, [100, 101, 102], requests=40, seconds=0.1, target_ms=1e-6))
    assert failed == {"broken": "no such engine"}
    assert [(row.server, row.rate) for row in rows] == [("a", 40), ("b", 40), ("b", 50), ("a", 50)]  # they take turns
    for row in rows:
        assert row.kept and row.answered == row.sent > 5 and row.mean_batch == 3 and row.cpu_ms >= 0
    assert rows[0].sent == rows[1].sent and rows[0].right == rows[1].right  # the same images
    assert len(slow) == 2 and not any(row.kept for row in slow)  # twice in turn is enough
    for name in ("a", "b"):
        status = Path(f"/proc/{(tmp_path / name).read_text()}/status")
        assert not status.exists() or "zombie" in status.read_text()  # what a server had started ended with it


def served(server: str, rate: float, kept: bool = True, **changes: Any) -> dict[str, Any]:
    latency = {"p50_ms": 20.0, "p99_ms": 40.0, "p99_ci95_ms": [35.0, None]}
    counts = {"sent": 100, "answered": 100, "refused": 0, "errors": {}, "right": 90, "mean_batch": 2.0, "cpu_ms": 30.0}
    return {
        "server": server,
        "rate": rate,
        "seconds": 100 / rate,
        "latency": latency,
        "kept": kept,
        **counts,
        **changes,
    }


def test_a_servers_cost_is_that_of_the_highest_rate_below_which_it_keeps_all(table: ModuleType, tmp_path: Path) -> None:
    rows = [served("fast", 40), served("fast", 10), served("lucky", 10), served("lucky", 20, kept=False)]
    rows += [served("lucky", 40), served("dead", 10, kept=False, answered=0, errors={"500: x": 7}, latency=None)]
    environment = {"processor": "Some CPU", "gpu": None, "cpu_count": 2}
    content = {"schema": table.SERVING_SCHEMA, "environment": environment, "target_p99_ms": 50, "price_per_hour": 3.6}
    content |= {"servers": dict.fromkeys(("fast", "lucky", "dead"), ""), "failed": {"gone": "no ray"}, "rows": rows}
    (tmp_path / "serving-cpu.json").write_text(json.dumps(content))
    (text,) = table.serving_tables(tmp_path)
    assert "| fast | 40.0 | 25.00 |" in text  # 3.6 an hour is a thousandth a second
    assert "| lucky | 10.0 | 100.00 |" in text and "| dead | – | – |" in text and "- gone: no ray" in text
    assert "| fast | 40 | 40.0 | 20 | 40 (35 to –) | 0 | 0 | 90.0 | 2.0 | 30.0 |" in text
    assert "| dead | 10 | 0.0 | – | – | 0 | 7 | – |" in text
    assert table.load_results(tmp_path) == []


def test_the_servers_beside_vitopt_answer_as_the_checkpoint_does(shapes: Path) -> None:
    pytest.importorskip("uvicorn")
    testing = pytest.importorskip("fastapi.testclient")
    peers, checkpoint = script("serving_peers"), ROOT / "vitopt" / "assets" / "vit-quickstart"
    photos = sorted((shapes / "test").rglob("*.png"))[::8]
    expected = [one["classes"][0] for one in predict(str(checkpoint), photos, top=1, device="cpu")]
    assert len(photos) == 3
    classifier = peers.Classifier(str(checkpoint), "float32", sizes=(1, 2, 4))
    pixels = [classifier.pixels(photo.read_bytes()) for photo in photos]
    assert classifier.classify(pixels) == [one["index"] for one in expected]  # in a batch of four
    client = testing.TestClient(peers.plain_app(classifier))
    assert client.get("/v2/health/ready").status_code == 200
    labels = client.get("/models").json()[0]["labels"]
    found = client.post("/predict", content=photos[0].read_bytes()).json()
    assert found["batch"] == 1 and labels[found["classes"][0]["index"]] == expected[0]["label"]


def test_serving_goals_are_judged_by_what_was_measured() -> None:
    judge = script("serving_goals")
    limits = {f"{name}_ci95_ms": (None, None) for name in ("p50", "p95", "p99")}
    times = {f"{name}_ms": 20.0 for name in ("mean", "std", "min", "p50", "p95", "p99")}
    alone = CallerLatency(count=400, **times, **limits)
    content = {"rate": 60, "seconds": 10, "sent": 500, "answered": 400, "refused": 100, "errors": {}, "right": 390}
    figures = {"slowest_refusal_ms": 12.0, "mean_batch": 4.0, "differing": 0, "peak_bytes": 10**9}
    step = ServedRate(**content, **figures, latency=alone)
    predictions = Predictions(("a", "b"), ("a", "b"), np.array([0, 1]), np.eye(2, dtype=np.float32))
    facts = {
        "offline": {"images_per_second": {1: 30.0, 8: 45.0}, "classes": [0, 1]},
        "predictions": predictions,
        "alone": alone,
        "batch_ms": 50.0,
        "largest_batch": 8,
        "at_80": step,
        "overload": [step] * 10,
        "target_ms": 100.0,
        "killed": step.model_copy(update={"errors": {"500: lost": 8}}),
        "down_s": 5.0,
        "load_s": 4.0,
    }
    kept = judge.goals(**facts)
    assert all(goal["met"] for goal in kept.values()) and len(kept) == 10

    def missed(**changes: Any) -> set[str]:
        return {name.partition(",")[0] for name, goal in judge.goals(**facts | changes).items() if not goal["met"]}

    def but(**changes: Any) -> ServedRate:
        return step.model_copy(update=changes)

    slow = alone.model_copy(update={"p99_ms": 101.0})
    assert missed(overload=[but(seconds=11)] * 10) == {"requests/s over HTTP"}
    assert missed(at_80=but(latency=slow)) == {"p99 ms at 80 % of the highest rate"}
    assert missed(overload=[step] * 9 + [but(latency=slow)]) == {"p99 ms of what is accepted under overload"}
    assert missed(overload=[step] * 9 + [but(slowest_refusal_ms=51.0)]) == {"ms until a request is refused"}
    assert missed(overload=[step] * 9 + [but(peak_bytes=1_060_000_000)]) == {"memory"}
    assert missed(offline=facts["offline"] | {"classes": [1, 1]}) == {"images whose class is another than offline"}
    assert missed(killed=but(differing=1)) == {"answers that are not the image's own"}
    assert missed(at_80=but(errors={"504": 1})) == {"errors under load"}
    assert missed(killed=but(errors={"500: lost": 9})) == {"requests that failed with the killed model"}
    assert missed(down_s=5.1) == {"seconds until a killed model is back"}
