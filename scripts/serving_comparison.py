"""One open load on several servers of one model: variants by `vitopt serve`, and servers that know nothing of it.

    python scripts/serving_comparison.py CHECKPOINT DATA --labels index --peer-python VENV/bin/python [--output DIR]

All servers are up at the same time; one is sent images while the others wait, and they take turns at each rate. Every
server gets the same JPEG bytes at the same times from the client of `vitopt load`, which shares the machine. One that
misses the target at two rates in turn is not asked for more. `scripts/performance_table.py` puts a result that lies in
benchmarks/results into README. `--vitopt 'NAME: CHECKPOINT OPTIONS'` adds a variant with options of `vitopt serve`,
such as an adaptive one. `--peer-python` is a Python with ray[serve], torch and transformers; without it Ray Serve is
left out.
"""

import argparse
import contextlib
import csv
import datetime
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import psutil
from performance_table import SERVING_SCHEMA, serving_cells, serving_table

from vitopt import storage
from vitopt.environment import devices, libraries, machine

libraries.quiet_libraries()

from vitopt.data.images import open_images
from vitopt.data.labels import fit_labels
from vitopt.models.checkpoint import open_checkpoint
from vitopt.recipe import DataSpec
from vitopt.report.table import device_name
from vitopt.serve.load import Client

RATES = "20,40,60,80,100,120"
_QUALITY = 95
_START_S = 600
_GRACE_S = 10
_COUNTS = ("rate", "seconds", "sent", "answered", "refused", "errors", "right", "mean_batch")
_LATENCY = ("count", "p50_ms", "p95_ms", "p99_ms", "p50_ci95_ms", "p99_ci95_ms")
_ENV = {"GOMP_SPINCOUNT": "10000", **os.environ}  # as vitopt sets it itself; without, threads that wait spin for ms
_VARIANTS = {
    "vitopt fp32": ((), ""),
    "vitopt bf16 compiled": (("--format", "bf16"), "--compile --fuse-qkv"),
    "vitopt bf16 aoti": (("--format", "bf16", "--engine", "aoti"), "--engine aoti"),
    "vitopt int8 openvino": (("--format", "w8a8", "--engine", "openvino"), "--engine openvino"),
}
_PEERS = str(ROOT / "scripts" / "serving_peers.py")


@dataclass(frozen=True)
class Server:
    """A server and the command that starts it, to which `--port N` is added."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """What happened at one rate.

    `seconds`: until the last answer. `latency`: of answered requests, from when they were due, in ms; None where none
    was answered. `errors`: requests by what went wrong, refusals apart. `kept`: whether the target was. `cpu_ms`: CPU
    time of the server's processes for each answer.
    """

    server: str
    rate: float
    seconds: float
    sent: int
    answered: int
    refused: int
    errors: dict[str, int]
    latency: dict[str, Any] | None
    right: int
    mean_batch: float | None
    kept: bool
    cpu_ms: float | None


class Running:
    """A server that has been started, with all processes that it starts itself."""

    def __init__(self, server: Server, logs: Path) -> None:
        self.server = server
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = logs / f"{server.name.replace(' ', '-')}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*server.command, "--port", str(self.port)], stdout=log, stderr=log, start_new_session=True, env=_ENV
            )

    def wait(self, deadline: float) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it ended, or the time did.
        """
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=5):
                return
            time.sleep(0.2)
        raise RuntimeError(
            " ".join(self._log.read_text(errors="replace").splitlines()[-1:]) or "did not answer in time"
        )

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        total = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def stop(self) -> None:
        """End it and all that it started."""
        tree = self._tree()
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(tree, _GRACE_S)

    def _tree(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.Error:
            return []


@contextlib.contextmanager
def started(servers: Sequence[Server], logs: Path) -> Iterator[tuple[list[Running], dict[str, str]]]:
    """All servers that answer, and of the others why not; one starts after the other, as compiling takes all cores."""
    found: list[Running] = []
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as running:
        for server in servers:
            one = Running(server, logs)
            running.callback(one.stop)
            try:
                one.wait(time.monotonic() + _START_S)
                found.append(one)
            except RuntimeError as error:
                failed[server.name] = str(error)
            print(f"{server.name}: {failed.get(server.name, 'answers')}", flush=True)
        yield found, failed


def compare(
    servers: Sequence[Running], photos: Path, rates: Sequence[float], requests: int, seconds: float, target_ms: float
) -> Iterator[Row]:
    """Rows, rate by rate: so many requests, or so many seconds, whichever is longer."""
    images = open_images(DataSpec(source=f"{photos}:all", labels="index"), None)
    clients = [Client(one.url, images) for one in servers]
    missed = [0] * len(servers)
    for client in clients:
        client.send(20, min(seconds, 1.0))  # what is done at the first requests alone
    for place, rate in enumerate(rates):
        order = range(len(servers))
        for which in order if place % 2 == 0 else reversed(order):
            if missed[which] == 2:
                continue
            before = servers[which].cpu_seconds()
            step = clients[which].send(rate, max(seconds, requests / rate), seed=place)
            spent = servers[which].cpu_seconds() - before
            kept = step.keeps(target_ms)
            missed[which] = 0 if kept else missed[which] + 1
            latency = step.latency and {name: getattr(step.latency, name) for name in _LATENCY}
            row = Row(
                servers[which].server.name,
                **{name: getattr(step, name) for name in _COUNTS},
                latency=latency,
                kept=kept,
                cpu_ms=1e3 * spent / step.answered if step.answered else None,
            )
            print(" ".join(serving_cells(asdict(row))), flush=True)
            yield row


def write_photos(data: str, labels: str, label_names: list[str], folder: Path, limit: int | None) -> Path:
    """The images of `data` as JPEG files with the numbers of the checkpoint's classes."""
    images = fit_labels(open_images(DataSpec(source=data, labels=labels, limit=limit), None), label_names)
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "label"])
        for index, label in enumerate(images.labels):
            images.image(index).save(folder / f"{index:06}.jpg", quality=_QUALITY)
            table.writerow([f"{index:06}.jpg", label])
    return folder


def variants(checkpoint: str, folder: Path, wanted: Callable[[str], bool]) -> Iterator[Server]:
    """The checkpoint as `vitopt serve` runs it, made where it is not in `folder` yet; none needs images for that."""
    for name, (making, running) in _VARIANTS.items():
        if wanted(name):
            source = folder / name.replace(" ", "-") if making else Path(checkpoint)
            if not source.exists():
                command = (sys.executable, "-m", "vitopt", "quantize", checkpoint, *making, "--output", str(source))
                subprocess.run(command, check=True, cwd=ROOT)
            yield vitopt_server(f"{name}: {shlex.quote(str(source))} {running}")


def vitopt_server(text: str) -> Server:
    """`NAME: CHECKPOINT OPTIONS`, the options being those of `vitopt serve`."""
    name, _, options = text.partition(":")
    return Server(name.strip(), (sys.executable, "-m", "vitopt", "serve", *shlex.split(options)))


def peers(checkpoint: str, peer_python: str | None) -> list[Server]:
    """A loop without batching, and Ray Serve."""
    found = []
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        command = (sys.executable, _PEERS, "plain", checkpoint, "--dtype", dtype)
        found.append(Server(f"FastAPI loop {short}", command))
    if peer_python:
        command = (peer_python, _PEERS, "ray", checkpoint, "--dtype", "bfloat16", "--compile")
        found.append(Server("Ray Serve bf16 compiled", command))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    parser.add_argument("--labels", default="name", choices=("name", "index"))
    parser.add_argument("--limit", type=int, help="images to send")
    parser.add_argument("--vitopt", action="append", help="'NAME: CHECKPOINT OPTIONS' of `vitopt serve`; repeatable")
    parser.add_argument("--peer-python", help="Python that has ray[serve], torch and transformers")
    parser.add_argument("--only", help="servers whose names hold one of these words, as in compiled,ray")
    parser.add_argument("--rates", default=RATES, help="requests per second, ascending")
    parser.add_argument("--requests", type=int, default=500, help="at each rate, at least")
    parser.add_argument("--seconds", type=float, default=10.0, help="at each rate, at least")
    parser.add_argument("--target-p99-ms", type=float, default=200.0)
    parser.add_argument("--price-per-hour", type=float, default=0.10, help="of this machine")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the result")
    parser.add_argument("--work", type=Path, help="keeps variants that are made, for the next time")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end too
    rates = sorted(float(rate) for rate in arguments.rates.split(","))
    words = (arguments.only or "").lower().split(",")

    def wanted(name: str) -> bool:
        return any(word in name.lower() for word in words)

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(arguments.work or temporary)
        names = open_checkpoint(arguments.checkpoint).label_names
        photos = write_photos(arguments.data, arguments.labels, names, Path(temporary) / "photos", arguments.limit)
        servers = [
            *variants(arguments.checkpoint, work, wanted),
            *(vitopt_server(text) for text in arguments.vitopt or ()),
            *(one for one in peers(arguments.checkpoint, arguments.peer_python) if wanted(one.name)),
        ]
        environment = machine.describe(devices.resolve_device("cpu"))
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        result: dict[str, Any] = {
            "schema": SERVING_SCHEMA,
            "date": date,
            "command": shlex.join(sys.argv),
            "environment": environment,
            "target_p99_ms": arguments.target_p99_ms,
            "price_per_hour": arguments.price_per_hour,
            "servers": {server.name: shlex.join(server.command) for server in servers},
            "failed": {},
            "rows": [],
        }
        device = "-".join(re.findall(r"[a-z0-9]+", device_name(environment).lower())[:3])
        output = arguments.output / f"serving-{device}-{date}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        with started(servers, Path(temporary)) as (running, result["failed"]):
            for row in compare(running, photos, rates, arguments.requests, arguments.seconds, arguments.target_p99_ms):
                result["rows"].append(asdict(row))
                storage.write_json(output, result)
    print(f"\n{serving_table(result)}\n\nresult: {output}")


if __name__ == "__main__":
    main()
