"""Everything that only a device can show, in one go: its tests and recipes, into one file of results.

    python scripts/device_benchmark.py [--device cuda] [--minutes 9] [--output FILE]

Needs no network and no more than torch, transformers and vitopt's small dependencies: what is not installed is
skipped by name. Each step is a process of its own, so that one which fails or takes too long costs only itself.
`scripts/performance_table.py` makes README's table from the files.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
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
    from vitopt.records import Record, upgraded
    from vitopt.report.table import cautions
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed for {sys.executable}; `make install`, or name another GPU_PYTHON")

SCHEMA = "vitopt.device/1"
TESTS = "tests"
# In order of importance: what the time does not suffice for is skipped.
STEPS = {
    "cuda": ("waterfall-vit-l", "packed-vit-l", "attention-vit-l", TESTS, "imagenet-vit-tiny", "autotuned-vit-l"),
    "cpu": ("waterfall-cpu-vit-l", "imagenet-vit-tiny"),
}
# What a recipe needs beside torch and transformers for any of its rows.
NEEDS = {"packed-vit-l": ("bitsandbytes",), "imagenet-vit-tiny": ("PIL",)}
LEAST_SECONDS = 45  # a step that cannot have so much is not begun


@dataclass
class Step:
    """What was done, or why not."""

    name: str
    command: str | None = None
    seconds: float | None = None
    failure: str | None = None
    skipped: str | None = None
    summary: str | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    threads: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--steps", nargs="*", help="only these: names of recipes, or tests")
    parser.add_argument("--threads", type=int, help="bind so many threads to cores (CPU)")
    parser.add_argument("--output", type=Path, help="benchmarks/results/DEVICE-DATE.json without it")
    arguments = parser.parse_args()

    try:
        device = devices.resolve_device(arguments.device)
    except VitoptError as error:
        sys.exit(f"error: {error}")
    facts = machine.describe(device) | {"platform": f"{platform.system()} {platform.machine()}"}
    deadline = time.monotonic() + 60 * arguments.minutes
    print(f"{facts['gpu']['name'] if facts['gpu'] else facts['processor']}, torch {torch.__version__}", flush=True)
    output = arguments.output or ROOT / "benchmarks" / "results" / f"{_device_name(facts)}-{_today()}.json"
    steps = []
    for name in arguments.steps or STEPS[device.type]:
        steps.append(
            _tests(deadline) if name == TESTS else _recipe(name, arguments.device, arguments.threads, deadline)
        )
        _tell(steps[-1])
        _write(output, facts, steps)  # after each: what a later step does cannot lose it
    print(f"results: {output}")
    if any(step.failure for step in steps):
        sys.exit(1)


def _write(output: Path, facts: dict[str, Any], steps: list[Step]) -> None:
    """Write the steps of this call, and those that an earlier one left in the same file under other names."""
    threads = next((step.threads for step in steps if step.threads), {})  # as in the processes that measured
    content = {"schema": SCHEMA, "created": _today(), "environment": facts | threads}
    earlier = json.loads(output.read_text(encoding="utf-8"))["steps"] if output.exists() else []
    names = [step.name for step in steps]
    kept = [step for step in earlier if step["name"] not in names]
    storage.write_json(output, content | {"steps": [*kept, *(asdict(step) for step in steps)]})


def _tests(deadline: float) -> Step:
    missing = _missing(("pytest", "PIL"))
    if missing:
        return Step(TESTS, skipped=missing)
    return _run(TESTS, [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "tests/test_gpu.py"], deadline)


def _recipe(name: str, device: str, threads: int | None, deadline: float) -> Step:
    missing = _missing(NEEDS.get(name, ()))
    if name == "imagenet-vit-tiny" and not _shared().is_dir():
        missing = "its model and images are not there: name their folder in VITOPT_SHARED"
    if missing:
        return Step(name, skipped=missing)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vitopt", "run", f"recipes/{name}.yaml", "--output", folder, "--json"]
        command += ["--set", f"device={device}"] + (["--threads", str(threads)] if threads else [])
        step = _run(name, command, deadline)
    if step.failure is None and step.skipped is None:
        try:
            records = json.loads(step.summary or "")
            step.threads = {key: records[0]["environment"][key] for key in ("torch_threads", "threads_bound")}
            step.records = [_trimmed(record) for record in records]
            step.summary = f"{len(step.records)} variants"
        except (ValueError, LookupError) as error:
            step.failure = f"its output is no list of records ({error}): {(step.summary or '')[-500:]}"
    step.command = f"vitopt run recipes/{name}.yaml" + (f" --threads {threads}" if threads else "")
    return step


def _run(name: str, command: list[str], deadline: float) -> Step:
    left = deadline - time.monotonic()
    if left < LEAST_SECONDS:
        return Step(name, skipped="no time was left for it (--minutes)")
    print(f"{name} ...", flush=True)
    started = time.monotonic()
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environ |= {"VITOPT_SHARED": str(_shared()), "HF_HUB_OFFLINE": "1"}
    step = Step(name, " ".join(["python", *command[1:]]))
    try:
        done = subprocess.run(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        step.skipped = f"stopped after {left:.0f} s, when the time was up (--minutes)"
    else:
        step.summary = done.stdout.strip()
        if done.returncode != 0:
            step.failure = f"exit code {done.returncode}: {step.summary[-2000:]}"
    step.seconds = round(time.monotonic() - started, 1)
    return step


def _shared() -> Path:
    return Path(os.environ.get("VITOPT_SHARED", ROOT.parent / "shared"))


def _missing(packages: tuple[str, ...]) -> str | None:
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


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
    print(f"{step.name}: {_outcome(step)}" + (f" ({step.seconds:.0f} s)" if step.seconds else ""), flush=True)
    for record in step.records:
        for row in record["latency"]:
            line = f"  {record['variant']['name']:16} batch {row['batch_size']:4} p50 {row['p50_ms']:9.3f} ms"
            print(f"{line} {row['images_per_second']:9.1f} images/s", flush=True)
    for line in cautions([Record.model_validate(upgraded(record)) for record in step.records]):
        print(f"  {line}", flush=True)


def _outcome(step: Step) -> str:
    if step.skipped:
        return f"skipped: {step.skipped}"
    if step.failure:
        return f"failed: {step.failure}"
    return (step.summary or "no output").splitlines()[-1]


def _device_name(facts: dict[str, Any]) -> str:
    name = facts["gpu"]["name"] if facts["gpu"] else facts["processor"]
    words = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in ("nvidia", "geforce", "cpu")]
    return "-".join(words[:3])


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


if __name__ == "__main__":
    main()
