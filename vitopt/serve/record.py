"""What a load found, as a record that stands beside those of `evaluate` and `benchmark`."""

import ipaddress
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from vitopt.environment import machine
from vitopt.measure.accuracy import summarise
from vitopt.measure.predictions import Predictions
from vitopt.records import Dataset, Record, Variant
from vitopt.serve.load import Client, cost_per_million
from vitopt.serving_record import CallerLatency, ServedRate, Serving


def record_of(
    client: Client,
    predictions: Predictions,
    alone: CallerLatency,
    rates: Sequence[ServedRate],
    *,
    target_p99_ms: float | None = None,
    price_per_hour: float | None = None,
) -> Record:
    """The served model's record: `predictions` of all images, and what happened at each rate."""
    images, said = client.images, client.described
    kept = [one for one in rates if target_p99_ms is not None and one.keeps(target_p99_ms)]
    best = max(kept, key=lambda one: one.rate, default=None)
    serving = Serving(
        alone=alone,
        batch_ms=client.state().get("batch_ms", {}),
        rates=tuple(sorted(rates, key=lambda one: one.rate)),
        target_p99_ms=target_p99_ms,
        highest_rate=best and best.rate,
        price_per_hour=price_per_hour,
        cost_per_million=cost_per_million(best.answered_rate, price_per_hour) if best and price_per_hour else None,
    )
    own: dict[str, Any] = {"variant": Variant(name=client.model, format="unknown")} | said.get("record", {})
    record = Record.model_validate(own)
    fields: dict[str, Any] = {
        "variant": record.variant.model_copy(update={"name": f"{client.model} over HTTP"}),
        "serving": serving,
        "dataset": Dataset(
            name=images.name,
            split=images.split,
            images=len(images),
            sha256=images.sha256,
            preprocessor=said.get("preprocessor", "unknown"),
            groups=None if images.groups is None else len(set(images.groups)),
        ),
        "warnings": _warnings(client.url, rates),
        "unmeasured": {},
    }
    if reason := predictions.why_no_classes:
        fields["unmeasured"] |= {"accuracy": reason}
    else:
        fields["accuracy"] = summarise(predictions, images.class_names or ())
    if all(one.joules_per_answer is None for one in rates):
        fields["unmeasured"] |= {"joules_per_answer": "the server has no GPU that counts its energy"}
    if record.routing is not None and predictions.escalated is not None:
        share = {"escalated_percent": 100 * float(predictions.escalated.mean())}
        fields["routing"] = record.routing.model_copy(update=share)
    return record.model_copy(update=fields | machine.occasion())


def _warnings(url: str, rates: Sequence[ServedRate]) -> tuple[str, ...]:
    lines = []
    host = urlsplit(url).hostname or ""
    try:
        near = ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = host == "localhost"
    if near:
        lines.append("the load was sent from the server's own machine, whose cores it shared")
    if differing := sum(one.differing or 0 for one in rates):
        answers = sum(one.answered for one in rates)
        lines.append(f"{differing:,} of {answers:,} answers under load differ from the image's own without a load")
    return tuple(lines)
