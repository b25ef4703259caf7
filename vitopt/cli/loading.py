"""`vitopt load`."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitopt import storage
from vitopt.cli.common import JsonOption, WideOption, start
from vitopt.cli.options import Fields, from_fields
from vitopt.cli.printing import err, out, print_json
from vitopt.cli.tables import Column, print_columns
from vitopt.errors import RecipeError, StorageError, UnsupportedError
from vitopt.recipe import DataSpec

if TYPE_CHECKING:
    from vitopt.measure.latency_statistics import LatencySummary
    from vitopt.serve.load import Step


@from_fields()
def load(
    *,
    url: Annotated[str, typer.Argument(help="Where `vitopt serve` listens, as in http://127.0.0.1:8000.")],
    data: Annotated[
        DataSpec,
        Fields(("source", "root", "limit", "labels"), named={"source": "data", "root": "data_root"}),
    ],
    rates: Annotated[
        str | None, typer.Option(help="Requests per second, as in 5,10,20; without it the highest is searched.")
    ] = None,
    target_p99_ms: Annotated[float | None, typer.Option(min=0.001, help="p99 that a rate has to keep.")] = None,
    seconds: Annotated[float, typer.Option(min=1, max=86_400, help="Time at each rate.")] = 20.0,
    model: Annotated[str | None, typer.Option(help="One of several models of the server.")] = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of the server's machine.")] = None,
    seed: Annotated[int, typer.Option(help="Of the times and the choice of images.")] = 0,
    output: Annotated[Path | None, typer.Option(help="New JSON file.")] = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send images to a server at random times that do not wait for answers, and measure what users would feel."""
    asked = _rates(rates)
    if not asked and target_p99_ms is None:
        raise RecipeError("give --rates, or --target-p99-ms to search the highest rate that keeps it")
    if output is not None and output.exists():
        raise StorageError(f"{output} exists already: choose another --output")
    start(as_json)
    from vitopt.environment import support

    if not support.installed("aiohttp"):
        raise UnsupportedError("a load needs aiohttp: pip install 'vitopt[serve]'")
    from vitopt.data.images import open_images
    from vitopt.serve.load import Client, cost_per_million

    client = Client(url, open_images(data, None), model=model, token=os.environ.get("VITOPT_SERVE_TOKEN"))
    if asked:
        steps = [client.send(rate, seconds, seed + place) for place, rate in enumerate(asked)]
    else:
        assert target_p99_ms is not None
        steps = client.highest_rate(target_p99_ms, seconds, seed)
    best = max((s for s in steps if target_p99_ms and s.keeps(target_p99_ms)), key=lambda s: s.rate, default=None)
    cost = cost_per_million(best.answered_rate, price_per_hour) if best and price_per_hour else None
    result = {
        "url": url,
        "model": client.model,
        "runs": client.runs,
        "target_p99_ms": target_p99_ms,
        "highest_rate": best and best.rate,
        "price_per_hour": price_per_hour,
        "cost_per_million": cost,
        "steps": [asdict(step) for step in steps],
    }
    if output is not None:
        storage.write_json(output, result)
    if as_json:
        print_json(result)
        return
    important = ["p50 ms", "p99 ms", "refused", "top-1 %"]
    print_columns(out, f"{client.model} at {url}", _columns(steps), important, wide=wide)
    for step in steps:
        for what, count in step.errors.items():
            err.print(f"{step.rate:.1f} requests/s: {count} x {what}")
    if target_p99_ms is not None:
        kept = f"{best.rate:.1f} requests/s keep" if best else "no rate kept"
        price = f"; a million cost {cost:.2f} at {price_per_hour:g} an hour" if cost is not None else ""
        out.print(f"{kept} a p99 of {target_p99_ms:g} ms{price}")


def _rates(text: str | None) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0.0]
    if not all(0 < rate <= 1e6 for rate in found):
        raise RecipeError(f"--rates {text}: give requests per second above 0, as in 5,10,20")
    return found


def _columns(steps: "list[Step]") -> list[Column]:
    def figure(value: float | None, digits: int = 1) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    def p99(latency: "LatencySummary | None") -> str:
        if latency is None or latency.p99_ms is None:
            return "–"
        limit = latency.p99_ci95_ms[1]
        return figure(latency.p99_ms) + (f" (≤ {limit:.1f})" if limit is not None else "")

    top1 = [f"{100 * step.right / step.answered:.1f}" if step.answered else "–" for step in steps]
    return [
        Column("requests/s", [f"{step.rate:.1f}" for step in steps]),
        Column("answered/s", [f"{step.answered_rate:.1f}" for step in steps]),
        Column("p50 ms", [figure(step.latency.p50_ms if step.latency else None) for step in steps]),
        Column("p99 ms", [p99(step.latency) for step in steps]),
        Column("refused", [str(step.refused) for step in steps]),
        Column("refused within ms", [figure(step.slowest_refusal_ms) for step in steps]),
        Column("errors", [str(sum(step.errors.values())) for step in steps]),
        Column("top-1 %", top1),
        Column("batch", [figure(step.mean_batch) for step in steps]),
        Column("CPU %", [figure(step.cpu_percent, 0) for step in steps]),
    ]
