"""README's performance tables, made of what `scripts/device_benchmark.py` and `scripts/serving_comparison.py` wrote.

    python scripts/performance_table.py           writes them between the markers in README.md
    python scripts/performance_table.py --check   exits with 1 if README.md says anything else

Rows come from the recipes: one that no file holds a figure for is named as unmeasured.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vitopt.recipe_file import load_recipe
from vitopt.record_upgrade import upgraded
from vitopt.records import Record
from vitopt.report.table import HEADINGS, UNKNOWN, cautions, device_name, markdown_text, row

SCHEMA, SERVING_SCHEMA = "vitopt.device/1", "vitopt.serving/1"
BEGIN, END = "<!-- performance tables: scripts/performance_table.py -->", "<!-- end of performance tables -->"
GPU_RECIPES = ("goals-vit-l", "packed-vit-l", "waterfall-vit-l", "attention-vit-l", "engines-gpu")
CPU_RECIPES = ("waterfall-cpu-vit-l", "engines-cpu-vit-l", "tokens-vit-l-cpu")
FIDELITY_RECIPES = (
    "imagenet-vit-tiny",
    "engines-cpu",
    "static-scales-vit-tiny",
    "tokens-vit-tiny",
    "adaptive-vit-tiny",
    "adaptive-photos-vit-tiny",
    "rounding-vit-tiny",
)
_FIDELITY = ("top-1 %", "Δ points (95 %)", "agree %", "p50 ms", "speed-up", "weights", "on disk")
_SERVING = ("offered/s", "answered/s", "p50 ms", "p99 ms (95 %)", "refused", "errors", "top-1 %", "batch", "CPU ms")
UNMEASURED = "unmeasured"


@dataclass(frozen=True)
class Results:
    """One file: where it lies, on what it was measured, and the records of each recipe."""

    path: Path
    environment: dict[str, Any]
    records: dict[str, list[Record]]
    skipped: dict[str, str]

    @property
    def is_gpu(self) -> bool:
        return bool(self.environment["gpu"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where README is not up to date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = replaced(before, all_tables(ROOT / "benchmarks" / "results"))
    if arguments.check and after != before:
        sys.exit("README.md is not what the results say: run python scripts/performance_table.py")
    if not arguments.check:
        readme.write_text(after, encoding="utf-8")


def replaced(readme: str, content: str) -> str:
    """README with `content` between the markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        sys.exit(f"README.md lacks the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n\n{content}\n\n{END}{tail}"


def all_tables(folder: Path) -> str:
    """Markdown of what all results in a folder say."""
    return "\n\n".join([tables(load_results(folder)), *serving_tables(folder)])


def load_results(folder: Path) -> list[Results]:
    """Results of all devices in a folder, GPUs first; of each device and recipe those of its last file by name."""
    found: list[Results] = []
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA:
            continue
        steps = content["steps"]
        records = {s["name"]: [Record.model_validate(upgraded(r)) for r in s["records"]] for s in steps if s["records"]}
        skipped = {s["name"]: s["skipped"] or s["failure"] for s in steps if s["skipped"] or s["failure"]}
        for earlier in found:
            if device_name(earlier.environment) == device_name(content["environment"]):
                for recipe in records:
                    earlier.records.pop(recipe, None)
        found.append(Results(path, content["environment"], records, skipped))
    return sorted(found, key=lambda results: not results.is_gpu)


def tables(results: list[Results]) -> str:
    """Markdown of all tables, and what no file holds."""
    parts = [part for one in results for part in _of_device(one)]
    return "\n\n".join([*parts, *_unmeasured(results)])


def _of_device(results: Results) -> Iterator[str]:
    environment = results.environment
    torch = environment["libraries"]["torch"]
    where = f"{device_name(environment)}" if results.is_gpu else f"{device_name(environment)}, {_threads(environment)}"
    for recipe in GPU_RECIPES if results.is_gpu else CPU_RECIPES:
        if recipe not in results.records:
            continue
        records = results.records[recipe]
        yield f"**{where}**, torch {torch}: `{recipe}` (`benchmarks/results/{results.path.name}`)"
        sizes = sorted({row.batch_size for record in records for row in record.latency})
        yield "\n".join(_table(recipe, records, sizes))
        yield from _cautions(records)
        if (roofline := next((r.roofline for r in records if r.roofline), None)) is not None:
            yield _rates(records, roofline.copy_bytes_per_second)
    for recipe in FIDELITY_RECIPES:
        if recipe in results.records:
            yield from _fidelity(recipe, results.records[recipe], where, results.path)


def _fidelity(recipe: str, records: list[Record], where: str, path: Path) -> Iterator[str]:
    """What each way to hold and to run a real model does to its answers."""
    images = next(record.accuracy.images for record in records if record.accuracy)
    yield f"**{where}**: `{recipe}`, {images} photos, batch 1 (`benchmarks/results/{path.name}`)"
    lines = [f"| variant | {' | '.join(_FIDELITY)} | KL, nats |", "|---|" + "---:|" * (len(_FIDELITY) + 1)]
    for record in records:
        if record.latency:
            versus, cells = record.versus_baseline, _named(record, 1)
            kl = UNKNOWN if versus is None else f"{versus.mean_kl_divergence:.4f}"
            lines.append(f"| {record.variant.name} | {' | '.join(cells[name] for name in _FIDELITY)} | {kl} |")
    yield "\n".join(lines)
    yield from _cautions(records)


def _cautions(records: list[Record]) -> Iterator[str]:
    """What failed, or ran in another way than the row's name says."""
    lines = cautions(records)
    if lines:
        yield "\n".join(f"- {markdown_text(line)}" for line in lines)


def _threads(environment: dict[str, Any]) -> str:
    count = environment["torch_threads"]
    return f"{count} {'bound ' if environment.get('threads_bound') else ''}threads"


def _table(recipe: str, records: list[Record], sizes: list[int]) -> Iterator[str]:
    known = {record.variant.name: record for record in records}
    first, last = sizes[0], sizes[-1]
    headings = [f"p50 ms, batch {first}", "p99 ms", "speed-up", "floor ms"]
    headings += [*(f"images/s, batch {size}" for size in sizes), f"MFU %, batch {last}", "memory"]
    yield f"| {' | '.join(['variant', *headings])} |"
    yield "|---|" + "---:|" * len(headings)
    for name in _rows(recipe):
        record = known.get(name)
        cells = _cells(record, sizes) if record and record.latency else [UNMEASURED] + [""] * (len(headings) - 1)
        yield f"| {' | '.join([name, *cells])} |"


def _cells(record: Record, sizes: list[int]) -> list[str]:
    first = _named(record, sizes[0])
    rates = [_named(record, size)["images/s"] for size in sizes]
    used = next((r.model_flop_utilisation_percent for r in record.latency if r.batch_size == sizes[-1]), None)
    speed = [first[name] for name in ("p50 ms", "p99 ms", "speed-up", "floor ms")]
    return [*speed, *rates, f"{used:.0f}" if used else UNKNOWN, first["peak memory"]]


def _named(record: Record, batch_size: int) -> dict[str, str]:
    """The cells of the report's table by their heading."""
    return dict(zip(HEADINGS, row(record, batch_size), strict=True))


def _rates(records: list[Record], copy_bytes_per_second: float) -> str:
    found = {r.roofline.gemm_format: r.roofline.gemm_flops_per_second for r in records if r.roofline}
    gemm = ", ".join(f"{format} {_significant(value / 1e12)}" for format, value in found.items())
    copy = _significant(copy_bytes_per_second / 1e9)
    return f"Measured in the same run: matrix products in TFLOP/s {gemm}; copy {copy} GB/s."


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def serving_tables(folder: Path) -> Iterator[str]:
    """Of each device, from its last file by name."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") == SERVING_SCHEMA:
            found[device_name(content["environment"])] = (
                f"{serving_table(content)}\n\n(`benchmarks/results/{path.name}`)"
            )
    yield from found.values()


def serving_table(content: dict[str, Any]) -> str:
    """What each server did at each rate, then what a million requests cost at the highest rate that it keeps."""
    environment, target, price = content["environment"], content["target_p99_ms"], content["price_per_hour"]
    lines = [f"| server | {' | '.join(_SERVING)} |", "|---|" + "---:|" * len(_SERVING)]
    costs = [f"| server | answered/s with p99 ≤ {target:g} ms | a million at {price:g} an hour |", "|---|---:|---:|"]
    for server in content["servers"]:
        rows = sorted((row for row in content["rows"] if row["server"] == server), key=lambda row: row["rate"])
        lines += [f"| {' | '.join(serving_cells(row))} |" for row in rows]
        kept = list(itertools.takewhile(lambda row: row["kept"], rows))  # a lucky row above one that misses is no proof
        rate = kept[-1]["answered"] / kept[-1]["seconds"] if kept else None
        figures = f"{rate:.1f} | {price / 3600 / rate * 1e6:.2f}" if rate else f"{UNKNOWN} | {UNKNOWN}"
        costs.append(f"| {server} | {figures} |")
    where = (
        f"**{device_name(environment)}**, {environment['cpu_count']} cores, which the client shares: photos over HTTP"
    )
    failed = [f"- {markdown_text(f'{server}: {why}')}" for server, why in content["failed"].items()]
    return "\n\n".join(["\n".join(part) for part in ([where], lines, costs, failed) if part])


def serving_cells(row: dict[str, Any]) -> list[str]:
    """One server at one rate."""
    latency, answered, batch, cpu = row["latency"], row["answered"], row["mean_batch"], row["cpu_ms"]
    p50 = p99 = UNKNOWN
    if latency:
        p50 = f"{latency['p50_ms']:.0f}"
        limits = [UNKNOWN if limit is None else f"{limit:.0f}" for limit in latency["p99_ci95_ms"]]
        p99 = UNKNOWN if latency["p99_ms"] is None else f"{latency['p99_ms']:.0f} ({' to '.join(limits)})"
    return [
        row["server"],
        f"{row['rate']:g}",
        f"{answered / row['seconds']:.1f}",
        p50,
        p99,
        str(row["refused"]),
        str(sum(row["errors"].values())),
        f"{100 * row['right'] / answered:.1f}" if answered else UNKNOWN,
        UNKNOWN if batch is None else f"{batch:.1f}",
        UNKNOWN if cpu is None else f"{cpu:.1f}",
    ]


def _unmeasured(results: list[Results]) -> Iterator[str]:
    if not any(one.is_gpu for one in results):
        rows = "; ".join(f"`{recipe}`: {', '.join(_rows(recipe))}" for recipe in GPU_RECIPES)
        yield f"**Unmeasured on any GPU** (`make gpu` measures them): {rows}."
        return
    measured = {(device_name(one.environment), recipe) for one in results for recipe in one.records}
    for one in (one for one in results if one.is_gpu):
        device = device_name(one.environment)
        for recipe in GPU_RECIPES:
            if (device, recipe) not in measured:
                why = one.skipped.get(recipe, "not run")
                yield f"Unmeasured on {device}: `{recipe}` ({', '.join(_rows(recipe))}): {why}."


def _rows(recipe: str) -> list[str]:
    return [variant.name for variant in load_recipe(ROOT / "recipes" / f"{recipe}.yaml").variants]


if __name__ == "__main__":
    main()
