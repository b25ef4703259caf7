"""Everything that only a device can show, in one go, in the order of what it decides.

    python scripts/device_benchmark.py [--device cuda] [--minutes 9] [--output DIR] [--dry-run]

Needs no network, and to start no more than torch and transformers: each step names what it misses. A step is a process
with a time limit of its own; what it had measured when it was stopped is kept. DIR gets DEVICE-DATE.json, rewritten
whenever something is known, and what each step printed, in logs/. `scripts/performance_table.py` makes README's tables.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    import torch

    from vitopt import storage
    from vitopt.environment import devices, machine
    from vitopt.errors import VitoptError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed for {sys.executable}; `make install`, or name another GPU_PYTHON")

SCHEMA = "vitopt.device/1"
VITOPT = ("pydantic", "yaml", "typer", "rich", "psutil", "PIL", "filelock")  # what `vitopt run` needs without images
SHARED = "shared"  # stands in `needs` for the folder of real weights and images
RUN, DEVICE = "{run}", "{device}"  # stand in a command for the folder of a run and for the device
_TICK_SECONDS = 2.0
_GRACE_SECONDS = 5.0  # from the request to end to the end
_LEAST_SECONDS = 20  # a step that cannot have so much is not begun


@dataclass(frozen=True)
class Plan:
    """A step: its command, the packages that all of it needs, those that some rows need, and its time limit."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """What it needs and is not there."""
        absent = [name for name in self.needs if name != SHARED and not _installed(name)]
        if SHARED in self.needs and not _shared().is_dir():
            absent.append("its model and images (name their folder in VITOPT_SHARED)")
        return absent


def _recipe(name: str, limit_s: float, needs: Sequence[str] = (), wants: Sequence[str] = ()) -> Plan:
    command = ("-m", "vitopt", "run", f"recipes/{name}.yaml", "--output", RUN, "--set", f"device={DEVICE}")
    return Plan(name, command, limit_s, (*VITOPT, *needs), tuple(wants))


_TESTS = Plan(
    "tests", ("-m", "pytest", "-m", "gpu", "-rs", "tests/test_gpu.py"), 110, (*VITOPT, "pytest"), ("torchao",)
)
PLANS = {
    "cuda": (
        Plan("smoke", ("scripts/device_smoke.py", "--device", DEVICE), 60),
        _recipe("goals-vit-l", 270, wants=("torchao",)),
        _recipe("packed-vit-l", 100, ("bitsandbytes",), ("torchao",)),
        _TESTS,
        _recipe("waterfall-vit-l", 120, wants=("torchao",)),
        _recipe("attention-vit-l", 90, wants=("flash_attn",)),
        _recipe("engines-gpu", 240, wants=("tensorrt", "onnx", "onnxscript", "torchao")),
        _recipe("imagenet-vit-tiny", 90, (SHARED,), ("torchao", "bitsandbytes")),
    ),
    "cpu": (
        _recipe("waterfall-cpu-vit-l", 1200, wants=("torchao",)),
        _recipe("imagenet-vit-tiny", 600, (SHARED,)),
        _recipe("engines-cpu", 900, (SHARED,), ("openvino", "nncf", "onnxruntime")),
        _recipe("engines-cpu-vit-l", 1200, wants=("openvino", "nncf", "onnxruntime")),
        _recipe("static-scales-vit-tiny", 600, (SHARED,), ("torchao",)),
        _recipe("tokens-vit-tiny", 900, (SHARED,)),
        _recipe("adaptive-vit-tiny", 1500, (SHARED,), ("openvino",)),
        _recipe("adaptive-photos-vit-tiny", 900, (SHARED,)),
        _recipe("rounding-vit-tiny", 1200, (SHARED,)),
        _recipe("tokens-vit-l-cpu", 1800),
    ),
}


@dataclass
class Step:
    """What was done, or why not."""

    name: str
    command: str | None = None
    seconds: float | None = None
    failure: str | None = None
    skipped: str | None = None
    summary: str | None = None
    figures: list[dict[str, Any]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    threads: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--steps", nargs="*", help="only these, in this order")
    parser.add_argument("--threads", type=int, help="bind so many threads to cores (CPU)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and what is missing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step in hand is ended too

    known = {plan.name: plan for plans in PLANS.values() for plan in plans}
    if unknown := [name for name in arguments.steps or () if name not in known]:
        sys.exit(f"error: no step {unknown[0]!r}; known: {', '.join(known)}")
    if arguments.dry_run:
        kind = "cpu" if arguments.device == "cpu" else "cuda"
        for plan in [known[name] for name in arguments.steps] if arguments.steps else PLANS[kind]:
            print(f"{plan.name}: {_described(plan)}")
        return
    try:
        device = devices.resolve_device(arguments.device)
    except VitoptError as error:
        sys.exit(f"error: {error}")
    facts = machine.describe(device) | {"platform": f"{platform.system()} {platform.machine()}"}
    print(f"{facts['gpu']['name'] if facts['gpu'] else facts['processor']}, torch {torch.__version__}", flush=True)
    plans = [known[name] for name in arguments.steps] if arguments.steps else PLANS[device.type]
    steps = carry_out(
        plans, arguments.output, facts, str(device), deadline=time.monotonic() + 60 * arguments.minutes,
        threads=arguments.threads,
    )  # fmt: skip
    if any(step.failure for step in steps):
        sys.exit(1)


def _described(plan: Plan) -> str:
    if missing := plan.missing():
        return f"skipped, {' and '.join(missing)} not there"
    unwanted = [name for name in plan.wants if not _installed(name)]
    return f"at most {plan.limit_s:.0f} s" + (f"; rows that need {' or '.join(unwanted)} will fail" if unwanted else "")


def carry_out(
    plans: Sequence[Plan],
    output: Path,
    facts: dict[str, Any],
    device: str,
    *,
    deadline: float,
    threads: int | None = None,
) -> list[Step]:
    """Do the steps in their order until the deadline; all that is known stands in a file at any time."""
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    file = output / f"{_device_name(facts)}-{_today()}.json"
    print(f"results: {file}", flush=True)
    steps: list[Step] = []
    for plan in plans:
        step = Step(plan.name)
        steps.append(step)
        limit = min(plan.limit_s, deadline - time.monotonic())
        if missing := plan.missing():
            step.skipped = f"{' and '.join(missing)} not there"
        elif limit < min(plan.limit_s, _LEAST_SECONDS):
            step.skipped = "no time was left for it (--minutes)"
        else:
            print(f"{plan.name}: {_described(plan)}", flush=True)
            _do(plan, step, logs / f"{plan.name}.log", limit, device, threads, lambda: _write(file, facts, steps))
        _tell(step)
        _write(file, facts, steps)
    return steps


def _do(
    plan: Plan, step: Step, log: Path, limit: float, device: str, threads: int | None, keep: Callable[[], None]
) -> None:
    """Run a step, and keep its records and figures whenever there are more of them."""
    shown = [part for part in plan.command if part not in (RUN, "--output")]
    bound = ["--threads", str(threads)] if threads and "vitopt" in plan.command else []
    step.command = " ".join(["python", *shown, *bound]).replace(DEVICE, device)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environ |= {"VITOPT_SHARED": str(_shared()), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "VITOPT_LOG": "info"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as printed:
        run = Path(folder) / "run"
        parts = [part.replace(RUN, str(run)).replace(DEVICE, device) for part in plan.command]
        process = subprocess.Popen(
            [sys.executable, *parts, *bound], cwd=ROOT, env=environ, start_new_session=True, stdout=printed,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(_TICK_SECONDS, max(0.05, limit - (time.monotonic() - started))))
                if _gather(step, run, log):
                    keep()
            if process.poll() is None:
                step.failure = f"stopped after {limit:.0f} s, its limit; what it had measured is kept"
        finally:
            _end(process)
        _gather(step, run, log)
    step.seconds = round(time.monotonic() - started, 1)
    words = log.read_text(encoding="utf-8", errors="replace").strip()
    if process.returncode != 0 and step.failure is None:
        step.failure = f"exit code {process.returncode}: {words[-2000:]}"
    told = f"{len(step.records)} variants" if step.records else f"{len(step.figures)} figures" if step.figures else ""
    step.summary = told or next(reversed(words.splitlines()), "no output")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step with all that it started, such as a compiler's workers, which would go on using the device."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, ending)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)


def _gather(step: Step, run: Path, log: Path) -> bool:
    """Take over the records and figures that a step has left so far; whether there is something new."""
    records = []
    for file in sorted(run.glob("variants/*/record.json")):
        with contextlib.suppress(ValueError, OSError):  # being replaced at this moment
            records.append(json.loads(file.read_text(encoding="utf-8")))
    if records:
        environment = next((one["environment"] for one in records if one["environment"]), {})
        step.threads = {key: environment[key] for key in ("torch_threads", "threads_bound") if key in environment}
    figures = [
        found for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if (found := _figure(line))
    ]
    before = step.records, step.figures
    step.records, step.figures = [_trimmed(record) for record in records], figures
    return before != (step.records, step.figures)


def _figure(line: str) -> dict[str, Any] | None:
    """A line that is a JSON object with a name."""
    with contextlib.suppress(ValueError):
        found = json.loads(line)
        return found if isinstance(found, dict) and "name" in found else None
    return None


def _write(file: Path, facts: dict[str, Any], steps: list[Step]) -> None:
    """Write the steps of this call, and those that an earlier one left in the same file under other names."""
    threads = next((step.threads for step in steps if step.threads), {})  # as in the processes that measured
    content = {"schema": SCHEMA, "created": _today(), "environment": facts | threads}
    earlier = json.loads(file.read_text(encoding="utf-8"))["steps"] if file.exists() else []
    names = [step.name for step in steps]
    kept = [step for step in earlier if step["name"] not in names]
    storage.write_json(file, content | {"steps": [*kept, *(asdict(step) for step in steps)]})


def _shared() -> Path:
    return Path(os.environ.get("VITOPT_SHARED", ROOT.parent / "shared"))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _trimmed(record: dict[str, Any]) -> dict[str, Any]:
    """Without what a table needs no more: single samples, the format of every layer, the row of every class."""
    for row in record["latency"]:
        row.update(samples_ms=[], device_samples_ms=None)
    if record["accuracy"]:
        record["accuracy"]["classes"] = []
    # Where things lie on this machine is nobody's business.
    model = record["model"] and record["model"] | {"source": Path(record["model"]["source"]).name}
    dataset = record["dataset"] and record["dataset"] | {"name": Path(record["dataset"]["name"]).name}
    return record | {"layers": {}, "environment": {}, "model": model, "dataset": dataset, "command": None}


def _tell(step: Step) -> None:
    outcome = (
        f"skipped: {step.skipped}" if step.skipped else f"failed: {step.failure}" if step.failure else step.summary
    )
    print(f"{step.name}: {outcome}" + (f" ({step.seconds:.0f} s)" if step.seconds else ""), flush=True)
    for figure in step.figures:
        print(f"  {json.dumps(figure)}", flush=True)
    for record in step.records:
        for row in record["latency"]:
            line = f"  {record['variant']['name']:16} batch {row['batch_size']:4} p50 {row['p50_ms']:9.3f} ms"
            print(f"{line} {row['images_per_second']:9.1f} images/s", flush=True)
        for reason in filter(None, [record["failure"], *record["variant"]["reasons"].values(), *record["warnings"]]):
            print(f"  {record['variant']['name']}: {reason}", flush=True)


def _device_name(facts: dict[str, Any]) -> str:
    name = facts["gpu"]["name"] if facts["gpu"] else facts["processor"]
    words = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in ("nvidia", "geforce", "cpu")]
    return "-".join(words[:3])


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


if __name__ == "__main__":
    main()
