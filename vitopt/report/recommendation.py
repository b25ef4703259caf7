"""Which variant to ship: the preferred of those that are shown to meet all that is required, and why not the others."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vitopt import storage
from vitopt.measure.claims import Decision
from vitopt.measure.comparison import sessions, speed_ratio
from vitopt.measure.gate import overall
from vitopt.recipe import Prefer
from vitopt.records import Record, Requirement
from vitopt.report.requirements import asked
from vitopt.report.table import delta_words, human_bytes, milliseconds

RECOMMENDATION_FILE = "recommendation.json"


@dataclass(frozen=True)
class Recommendation:
    """`ship`: a variant's name, None where none is shown to meet all. `missed`, `undecided`: name -> requirements."""

    ship: str | None
    line: str
    missed: dict[str, tuple[str, ...]]
    undecided: dict[str, tuple[str, ...]]

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        storage.write_json(folder / RECOMMENDATION_FILE, asdict(self))


def recommend(
    records: Sequence[Record], prefer: Prefer = "latency", price_per_hour: float | None = None
) -> Recommendation | None:
    """The best by `prefer` of the variants that meet all that is required of them; None where nothing is required.

    Of variants that are not measurably slower than the fastest the smallest is taken. `price_per_hour`: what an hour of
    the device costs, in any currency; then the cost of a million images at the highest measured rate is told.
    """
    judged = [record for record in records if record.requirements]
    if not judged:
        return None
    met = [record for record in judged if overall(record.requirements) == "shown" and record.latency]
    missed, undecided = _not_met(judged, "failed"), _not_met(judged, "undecided")
    best = _CHOOSE[prefer](met) if met else None
    parts = [f"ship {best.variant.name}: {', '.join(_figures(best, price_per_hour))}"] if best else []
    parts += [] if best else ["no variant is shown to meet all that is required"]
    parts += [f"{', '.join(n)} {'misses' if len(n) == 1 else 'miss'} {what}" for n, what, _ in _grouped(missed)]
    parts += [_undecided(*group) for group in _grouped(undecided)]
    return Recommendation(best.variant.name if best else None, "; ".join(parts), *map(_in_words, (missed, undecided)))


def cost_per_million(record: Record, price_per_hour: float) -> float:
    """What a million images cost at the record's highest rate."""
    return price_per_hour / 3600 / _rate(record) * 1e6


def _rate(record: Record) -> float:
    """Images per second: sustained where that was measured, else the highest of the timed batch sizes."""
    if record.throughput is not None:
        return record.throughput.images_per_second
    return max(latency.images_per_second for latency in record.latency)


def _weight_bytes(record: Record) -> float:
    return record.size.weight_bytes if record.size else float("inf")


def _fastest(records: Sequence[Record]) -> Record:
    def time(record: Record) -> float:
        # Of different sessions only the speed-ups compare, each over the baseline of its own.
        return record.latency[0].typical_ms if together else 1 / (record.latency[0].speedup_vs_baseline or 1)

    together = len(sessions(records)) < 2
    fastest = min(records, key=time)

    def as_fast(record: Record) -> bool:
        ratio = speed_ratio(record, fastest, fastest.latency[0].batch_size)
        return record is fastest or bool(ratio and ratio.interval and ratio.interval.low <= 1)

    return min(filter(as_fast, records), key=_weight_bytes)


_CHOOSE: dict[Prefer, Callable[[Sequence[Record]], Record]] = {
    "latency": _fastest,
    "size": lambda records: min(records, key=lambda record: (_weight_bytes(record), record.latency[0].typical_ms)),
    "throughput": lambda records: max(records, key=_rate),
    "cost": lambda records: max(records, key=_rate),  # an hour costs the same for all
}


def _figures(record: Record, price_per_hour: float | None) -> list[str]:
    latency = record.latency[0]
    speedup = f" ({latency.speedup_vs_baseline:.2f}x)" if latency.speedup_vs_baseline else ""
    figures = [f"{milliseconds(latency.typical_ms)} ms{speedup}"]
    if versus := record.versus_baseline:
        figures.append(f"top-1 {delta_words(versus.top1_delta_points, versus.top1_delta_ci95_points, 1)} points")
    if record.size:
        figures.append(human_bytes(record.size.weight_bytes))
    if price_per_hour is not None:
        figures.append(f"{cost_per_million(record, price_per_hour):.2f} per million images")
    return figures


def _not_met(records: Sequence[Record], decision: Decision) -> dict[str, tuple[Requirement, ...]]:
    """The requirements that were decided so, of the variants of which all together are."""
    return {
        record.variant.name: tuple(item for item in record.requirements if item.decision == decision)
        for record in records
        if overall(record.requirements) == decision
    }


def _in_words(variants: dict[str, tuple[Requirement, ...]]) -> dict[str, tuple[str, ...]]:
    def words(requirement: Requirement) -> str:
        reason = f": {requirement.reason}" if requirement.reason else ""
        return f"{asked(requirement.name, requirement.limit)}{reason}"

    return {name: tuple(map(words, requirements)) for name, requirements in variants.items()}


def _grouped(variants: dict[str, tuple[Requirement, ...]]) -> list[tuple[list[str], str, int | None]]:
    """(names, the first requirement that they do not meet, what would decide it for all of them)."""
    together: dict[str, dict[str, Requirement]] = {}
    for name, requirements in variants.items():
        first = requirements[0]
        together.setdefault(asked(first.name, first.limit), {})[name] = first
    return [
        (list(group), what, max(requirement.would_decide or 0 for requirement in group.values()) or None)
        for what, group in together.items()
    ]


def _undecided(names: list[str], requirement: str, would_decide: int | None) -> str:
    unit = "calls" if requirement.startswith(("speed-up", "p99")) else "images"
    told = f"; with about {would_decide:,} {unit} it could be told" if would_decide else ""
    return f"undecided: {', '.join(names)} ({requirement}{told})"
