"""Does a run that is ended at any moment lose or spoil anything?

    python scripts/kills.py [--kills 200] [--seed 0] [--json FILE]

A small run (fine-tune, three variants, measure, report, export) is ended by SIGKILL, SIGTERM or Ctrl-C at random
moments, over and over in one folder, until it comes through; then in a new folder, until so many were ended. Counted
are complete stages that a later run does again, files that count as whole and are not as an undisturbed run leaves
them, and finished runs whose accuracy, layers or weights differ from it. Memory is not measured: it takes a process
of its own, which starts for longer than all the rest takes.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from vitopt.environment import libraries

libraries.quiet_libraries()

from vitopt.finetune import training  # noqa: F401 (imported once here, not in each process)

from vitopt import cli, ownership
from vitopt.measure import evaluator
from vitopt.records import Memory, load_record
from vitopt.report import page  # noqa: F401 (as above)
from vitopt.stages import STAGES_FILE, RunFolder

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
RECIPE = {
    "name": "killed",
    "model": "vit-quickstart",
    "data": {"source": "digits", "limit": 40},
    "device": "cpu",
    "finetune": {"epochs": 0.04, "batch_size": 8, "method": "full"},
    "variants": [
        {"name": "fp32", "format": "fp32"},
        {"name": "nf4", "format": "nf4", "skip": ["block.0"]},
        {"name": "w8a8", "format": "w8a8"},
    ],
    "evaluate": {
        "latency": {"iterations": 4, "rounds": 2, "warmup_seconds": 0},
        "end_to_end": False,
        "look_alikes": False,
    },
    "export": "nf4",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, help="end before so many were ended, at the next finished run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--boundaries", action="store_true", help="once before and after each stage's end instead")
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    arguments = parser.parse_args()
    evaluator.peak_memory = _memory_unmeasured
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place, rng = Path(folder), random.Random(arguments.seed)
        for found in [end_at_boundaries(place)] if arguments.boundaries else end_runs(place, rng):
            late = arguments.minutes is not None and time.perf_counter() - begin > 60 * arguments.minutes
            if late or found["kills"] >= arguments.kills:
                break
    text = json.dumps({"seed": arguments.seed, **found}, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    sys.exit(any(found[key] for key in FAULTS))


FAULTS = ("complete_stages_done_again", "partial_files_taken_as_whole", "finished_runs_that_differ", "odd_endings")


def end_runs(place: Path, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Counts so far, whenever a run has come through, in folders of `place`; without end."""
    recipe = place / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    begin = time.perf_counter()
    if os.waitstatus_to_exitcode(os.waitpid(_started(recipe, place / "undisturbed"), 0)[1]) != 0:
        raise SystemExit("a run that nothing disturbed has failed: " + (place / "undisturbed.log").read_text())
    seconds = time.perf_counter() - begin
    expected = _outcome(place / "undisturbed")
    counts: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
    ended: Counter[str] = Counter()
    run, stages = place / "run-0", set()
    while True:
        fresh, ending, begin = not run.exists(), rng.choice(SIGNALS), time.perf_counter()
        code = _end_after(_started(recipe, run), rng.uniform(0, seconds), ending)
        said = run.with_suffix(".log").read_text()
        skipped = {line.partition(":")[0] for line in said.splitlines() if line.endswith("up to date, skipped")}
        reached = {line.partition(":")[0] for line in said.splitlines()}
        counts["complete_stages_done_again"] += len((stages & reached) - skipped)
        counts["partial_files_taken_as_whole"] += len(_spoiled(run, expected["files"]))
        stages = set(json.loads((run / STAGES_FILE).read_text())) if (run / STAGES_FILE).is_file() else set()
        if code != 0:
            ended[ending.name] += 1
            # A signal that ends the process, or an interruption that the command handles.
            counts["odd_endings"] += code not in (-ending, 130) or "Traceback" in said
            continue
        if fresh:  # on a busy machine the first may have been slow
            seconds = min(seconds, time.perf_counter() - begin)
        counts["finished_runs"] += 1
        counts["finished_runs_that_differ"] += _outcome(run) != expected
        run, stages = place / f"run-{counts['finished_runs']}", set()
        yield {
            "kills": sum(ended.values()),
            "by_signal": dict(ended),
            "seconds_of_the_fastest_run": round(seconds, 1),
            **counts,
        }


def _memory_unmeasured(subject: Any, batch_size: int) -> Memory:
    return Memory(peak_bytes=10**9, kind="resident_set", batch_size=batch_size)


def end_at_boundaries(place: Path) -> dict[str, int]:
    """End a run by SIGKILL right before and right after each stage is noted as complete; count what went wrong."""
    recipe = place / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    os.waitpid(_started(recipe, place / "undisturbed"), 0)
    expected, run = _outcome(place / "undisturbed"), place / "run"
    counts: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
    code, kills = 1, 0
    while code != 0:
        # Each run gets one stage further: it dies before the note of the first stage that it does, then after it.
        note_first = kills % 2 == 1
        _, status = os.waitpid(_started(recipe, run, lambda note_first=note_first: _die_at_a_note(note_first)), 0)
        code = os.waitstatus_to_exitcode(status)
        counts["partial_files_taken_as_whole"] += len(_spoiled(run, expected["files"]))
        counts["odd_endings"] += code not in (0, -signal.SIGKILL)
        kills += code != 0
    counts["finished_runs_that_differ"] += _outcome(run) != expected
    return {"kills": kills, **counts}


def _die_at_a_note(note_first: bool) -> None:
    note = RunFolder._save

    def dying(self: RunFolder) -> None:
        if note_first:
            note(self)
        os.kill(os.getpid(), signal.SIGKILL)

    RunFolder._save = dying


def _started(recipe: Path, run: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Process that carries out the recipe; what it says goes to a log beside the folder."""
    child = os.fork()
    if child:
        return child
    prepare()
    log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["vitopt", "run", str(recipe), "--output", str(run)]
    code = 1
    try:
        cli.main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.stderr.flush()
        os._exit(code)


def _end_after(child: int, seconds: float, ending: signal.Signals) -> int:
    """Exit status of the child, after it was ended, or before, if it was sooner through."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, ending)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _outcome(run: Path) -> dict[str, Any]:
    records = [load_record(run / "variants" / variant["name"]) for variant in RECIPE["variants"]]
    return {
        "files": _checkpoints(run),
        "accuracy": [record.accuracy.model_dump() for record in records],
        "agreement": [record.versus_baseline and record.versus_baseline.agreement_percent for record in records],
        "layers": [(record.layers, record.layer_plan) for record in records],
    }


def _checkpoints(run: Path) -> dict[str, str]:
    files = [path for pattern in ("*.safetensors", "config.json") for path in run.rglob(pattern)]
    # A folder with a point is one that is not complete yet.
    whole = [path for path in files if not any(part.startswith(".") for part in path.relative_to(run).parts)]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in whole}


def _spoiled(run: Path, expected: dict[str, str]) -> list[str]:
    """Files that vitopt takes for whole and that an undisturbed run has otherwise."""
    found = _checkpoints(run)
    return [name for name, digest in found.items() if ownership.is_whole(run / name) and expected.get(name) != digest]


if __name__ == "__main__":
    main()
