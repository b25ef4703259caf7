"""`vitopt load`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from vitopt.cli.common import JsonOption, WideOption, start
from vitopt.cli.options import Fields, from_fields
from vitopt.cli.printing import print_json, print_table
from vitopt.cli.running import claimed, keep
from vitopt.errors import RecipeError, UnsupportedError
from vitopt.recipe import DataSpec


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
    output: Annotated[Path | None, typer.Option(help="Folder for record.json and predictions.parquet.")] = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send images to a server at random times that do not wait for answers, and measure what users would feel.

    First each image is sent once without a load: they tell accuracy, and what answers under load must be.
    """
    asked = _rates(rates)
    if not asked and target_p99_ms is None:
        raise RecipeError("give --rates, or --target-p99-ms to search the highest rate that keeps it")
    if price_per_hour is not None and target_p99_ms is None:
        raise RecipeError("--price-per-hour: a cost is that at the highest rate that keeps --target-p99-ms")
    start(as_json)
    from vitopt.environment import support

    if missing := [name for name in ("aiohttp", "prometheus_client") if not support.installed(name)]:
        raise UnsupportedError(f"a load needs {', '.join(missing)}: pip install 'vitopt[serve]'")
    from vitopt.data.images import open_images
    from vitopt.measure.evaluator import Measured
    from vitopt.serve.load import Client
    from vitopt.serve.record import record_of
    from vitopt.serve.settings import TOKEN_VARIABLE

    client = Client(url, open_images(data, None), model=model, token=os.environ.get(TOKEN_VARIABLE))
    with claimed(output, data.folder):
        predictions, alone = client.learn(), client.alone()
        if asked:
            found = [client.send(rate, seconds, seed + place) for place, rate in enumerate(asked)]
        else:
            assert target_p99_ms is not None
            found = client.highest_rate(target_p99_ms, seconds, seed, alone)
        targets = {"target_p99_ms": target_p99_ms, "price_per_hour": price_per_hour}
        record = record_of(client, predictions, alone, found, **targets)
        if output is not None:
            keep(Measured(record, predictions), output)
    if as_json:
        print_json(record.to_json())
    else:
        print_table([record], wide=wide)


def _rates(text: str | None) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0.0]
    if not all(0 < rate <= 1e6 for rate in found):
        raise RecipeError(f"--rates {text}: give requests per second above 0, as in 5,10,20")
    return found
