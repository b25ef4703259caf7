"""Does a served model keep what serving promises?

    python scripts/serving_goals.py CHECKPOINT DATA --output DIR [--target-p99-ms 100] [--seconds 20] [--minutes 10]
                                    [--run compile] [--serve batch-sizes=1,2,4,8]

On this machine, which should have nothing else to do: the rate from files without a server; then of `vitopt serve` the
highest rate that keeps the target, p99 at 80 % of it, so many minutes at 1.5 times of it, and a model process that is
killed under half of it. DIR gets the record of `vitopt load` and `goals.json`: each goal, its limit, and what was
measured. Ends with 1 where a goal is missed.
"""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vitopt.environment import libraries

libraries.quiet_libraries()

import numpy as np

from vitopt import storage
from vitopt.adaptive.runtime import prepare
from vitopt.data.images import ImageSet, open_images
from vitopt.data.labels import fit_labels
from vitopt.environment import devices
from vitopt.errors import VitoptError
from vitopt.measure.predictions import Predictions, save_predictions
from vitopt.models.checkpoint import open_checkpoint
from vitopt.prediction import classify
from vitopt.recipe import DataSpec, RunSpec
from vitopt.recipe_file import validate
from vitopt.records import save_record
from vitopt.serve.load import Client
from vitopt.serve.record import record_of
from vitopt.serving_record import CallerLatency, ServedRate

_REFUSED_MS = 50
_PARTS = 10  # of the overload, in each of which memory is looked at
_GROWTH = 1.05  # of memory, which is called flat below it
_SHARE_OF_OFFLINE = 0.85
_BACK = 1.25  # times the load time, within which a killed model is back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--target-p99-ms", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=20, help="at each rate")
    parser.add_argument("--minutes", type=float, default=10, help="of overload")
    parser.add_argument("--run", action="append", default=[], help="OPTION or OPTION=VALUE of how the model is run")
    parser.add_argument("--serve", action="append", default=[], help="OPTION=VALUE of `vitopt serve`")
    parser.add_argument("--labels", default="name")
    parser.add_argument("--limit", type=int, help="images")
    given = parser.parse_args()
    options = {name.replace("-", "_"): value or True for name, _, value in (text.partition("=") for text in given.run)}
    run = validate(RunSpec, options, where="--run")
    images = open_images(DataSpec(source=given.data, labels=given.labels, limit=given.limit), None)
    fit_labels(images, open_checkpoint(given.checkpoint).label_names)  # refused before the long work
    flags = [f"--{text}" for text in [*given.run, *given.serve, f"target-p99-ms={given.target_p99_ms}", "port=0"]]
    with storage.claimed(given.output, given.checkpoint):
        offline = offline_figures(given.checkpoint, images, run)
        with served([given.checkpoint, *flags]) as url:
            figures = measure(Client(url, images), given.target_p99_ms, given.seconds, given.minutes, given.output)
        found = {"goals": goals(offline=offline, **figures["of_goals"]), **figures["others"]}
        storage.write_json(given.output / "goals.json", found)
    for name, goal in found["goals"].items():
        print(f"{'met' if goal['met'] else 'MISSED':8}{name}: {goal['measured']} (limit {goal['limit']})")
    sys.exit(not all(goal["met"] for goal in found["goals"].values()))


def offline_figures(source: str, images: ImageSet, run: RunSpec) -> dict[str, Any]:
    """Images per second from files at the best of three batch sizes, and the class of each image."""
    device = devices.resolve_device()
    runnable = prepare(open_checkpoint(source), name=source, device=device, run=run)
    rates = {}
    for size in (1, 8, 32):
        list(classify(runnable, images.subset(range(min(size, len(images)))), 1, batch_size=size))  # compiles
        start = time.perf_counter()
        answers = list(classify(runnable, images, 1, batch_size=size))
        rates[size] = len(images) / (time.perf_counter() - start)
    return {"images_per_second": rates, "classes": [answer["classes"][0]["index"] for answer in answers]}


@contextlib.contextmanager
def served(arguments: Sequence[str]) -> Iterator[str]:
    """A server in a process of its own; its address."""
    command = [sys.executable, "-m", "vitopt", "serve", *(part for text in arguments for part in text.split("=", 1))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            line = next((line for line in map(_echoed, server.stderr) if "http://" in line), "")
            if not line:
                sys.exit("the server did not start")
            threading.Thread(target=lambda: list(map(_echoed, server.stderr)), daemon=True).start()
            yield line[line.index("http://") :].split()[0]
            server.terminate()
        except BaseException:
            server.kill()
            raise


def _echoed(line: str) -> str:
    sys.stderr.write(line)
    return line


def measure(client: Client, target_ms: float, seconds: float, minutes: float, output: Path) -> dict[str, Any]:
    """All that the goals are judged by, and all that was seen."""
    predictions, alone = client.learn(), client.alone()
    rates = client.highest_rate(target_ms, seconds, alone=alone)
    record = record_of(client, predictions, alone, rates, target_p99_ms=target_ms)
    save_record(record, output)
    save_predictions(predictions, output)
    assert record.serving is not None and record.serving.highest_rate is not None
    highest = record.serving.highest_rate
    at_80 = client.send(0.8 * highest, 3 * seconds, seed=100)
    overload = [client.send(1.5 * highest, 60 * minutes / _PARTS, seed=200 + part) for part in range(_PARTS)]
    killed, down_s = kill(client, highest / 2, seconds)
    of_goals = {
        "predictions": predictions,
        "alone": alone,
        "batch_ms": max(record.serving.batch_ms.values()),
        "largest_batch": max(record.serving.batch_ms),
        "at_80": at_80,
        "overload": overload,
        "target_ms": target_ms,
        "killed": killed,
        "down_s": down_s,
        "load_s": client.described["load_s"],
    }
    steps = {"at_80_percent": [at_80], "overload": overload, "killed": [killed]}
    others = {name: [one.model_dump(mode="json") for one in of] for name, of in steps.items()}
    return {"of_goals": of_goals, "others": {"highest_rate": highest, **others}}


def kill(client: Client, rate: float, seconds: float) -> tuple[ServedRate, float]:
    """Load of this rate during which the model's process is killed, and for how long no model was there."""
    down: list[float] = []

    def after_a_third() -> None:
        time.sleep(seconds / 3)
        os.kill(client.state()["process"], signal.SIGKILL)
        start = time.perf_counter()
        while client.state()["ready"]:
            time.sleep(0.005)
        while not client.state()["ready"]:
            time.sleep(0.05)
        down.append(time.perf_counter() - start)

    killer = threading.Thread(target=after_a_third)
    killer.start()
    found = client.send(rate, seconds + 3 * client.described["load_s"], seed=300)
    killer.join()
    return found, down[0]


def goals(
    *,
    offline: dict[str, Any],
    predictions: Predictions,
    alone: CallerLatency,
    batch_ms: float,
    largest_batch: int,
    at_80: ServedRate,
    overload: Sequence[ServedRate],
    target_ms: float,
    killed: ServedRate,
    down_s: float,
    load_s: float,
) -> dict[str, dict[str, Any]]:
    """Each goal: what was measured, its limit, and whether it is met."""

    def at_most(measured: float, limit: float) -> dict[str, Any]:
        return {"measured": measured, "limit": limit, "met": measured <= limit}

    best = max(one.answered_rate for one in overload)
    enough = _SHARE_OF_OFFLINE * max(offline["images_per_second"].values())
    accepted = max((one.latency.highest for one in overload if one.latency), default=math.inf)
    memory = [one.peak_bytes or 0 for one in overload]
    every = [at_80, *overload, killed]
    return {
        "requests/s over HTTP, of 85 % of the images/s from files": {
            "measured": best,
            "limit": enough,
            "met": best >= enough,
        },
        "p99 ms at 80 % of the highest rate, of 2x that of lone requests and a batch": at_most(
            at_80.latency.highest if at_80.latency else math.inf, 2 * alone.highest + batch_ms
        ),
        "p99 ms of what is accepted under overload": at_most(accepted, target_ms),
        "ms until a request is refused": at_most(max(one.slowest_refusal_ms or 0 for one in overload), _REFUSED_MS),
        "memory, last tenth of the overload over the second": at_most(memory[-1] / max(memory[1], 1), _GROWTH),
        "images whose class is another than offline": at_most(
            int(np.sum(predictions.classes != np.array(offline["classes"]))), 0
        ),
        "answers that are not the image's own": at_most(sum(one.differing or 0 for one in every), 0),
        "errors under load": at_most(sum(sum(one.errors.values()) for one in [at_80, *overload]), 0),
        "requests that failed with the killed model": at_most(sum(killed.errors.values()), largest_batch),
        "seconds until a killed model is back": at_most(down_s, _BACK * load_s),
    }


if __name__ == "__main__":
    try:
        main()
    except VitoptError as error:
        sys.exit(f"error: {error}")
