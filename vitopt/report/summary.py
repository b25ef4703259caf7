"""The answer on top of a report: which variant to ship, whether accuracy was lost, and the best by each measure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vitopt.measure.comparison import sessions, speed_ratio
from vitopt.measure.verdict import loses, speed_verdict
from vitopt.records import Record
from vitopt.report.table import batch_sizes, human_bytes, milliseconds


@dataclass(frozen=True)
class Highlight:
    """The best variants by one measure: more than one where they are equal."""

    title: str
    names: tuple[str, ...]
    figure: str
    text: str


def baseline_of(records: Sequence[Record], name: str | None = None) -> Record | None:
    """The record that the others were compared with; `name` is what the recipe calls the baseline."""
    compared = (record.versus_baseline.baseline for record in records if record.versus_baseline)
    timed = [record for record in records if record.latency]
    first = [record for record in timed if all(row.speedup_vs_baseline is None for row in record.latency)]
    if name is None and len(first) == 1 < len(timed):
        name = first[0].variant.name  # all others tell their speed-up over it
    wanted = next(compared, name)
    return next((record for record in records if record.variant.name == wanted), None)


def headline(records: Sequence[Record], baseline: Record | None, advice: str | None) -> str:
    """The answer in one or two sentences, first which variant to ship; "" where there is nothing to say."""
    if all(record.failure for record in records):
        return "No variant could be measured."
    if baseline is not None and baseline.failure:
        return f"The baseline {baseline.variant.name} failed, so the variants are not compared."
    sentences = [f"{advice[0].upper()}{advice[1:]}."] if advice else []
    if not any(record.dataset for record in records):
        sentences.append("Measured on random pixels: the figures are of speed, size and memory only.")
    return " ".join([*sentences, *_losses(records)])


def _losses(records: Sequence[Record]) -> list[str]:
    compared = [(record, record.versus_baseline) for record in records if record.versus_baseline]
    if not compared:
        return []
    (first, versus), losing = compared[0], [record.variant.name for record, versus in compared if loses(versus)]
    hidden = [-versus.top1_delta_ci95_points[0] for _, versus in compared if not loses(versus)]
    parts = [f"a loss is shown for {listed(losing)}"] if losing else []
    if hidden:
        whom = "the others" if losing else "any variant"
        parts.append(f"no loss is shown for {whom}, but up to {max(0.0, *hidden):.1f} points are not excluded")
    images = f" on {first.accuracy.images:,} images" if first.accuracy else ""
    return [f"Accuracy against {versus.baseline}{images}: {'; '.join(parts)}."]


def highlights(records: Sequence[Record], baseline: Record | None) -> list[Highlight]:
    """The smallest, the fastest per batch size and the most faithful; none of a measure by which all are equal."""
    # What is served is one of the others, behind a server.
    measured = {record.variant.name: record for record in records if record.failure is None and not record.serving}
    name = baseline.variant.name if baseline else ""
    sizes = {own: record.size.weight_bytes for own, record in measured.items() if record.size}
    # Agreement is too coarse to rank variants that flip a handful of images; the divergence is not.
    kl = {own: versus.mean_kl_divergence for own, record in measured.items() if (versus := record.versus_baseline)}

    def smaller(best: Record) -> str:
        ratio = times_smaller(best, baseline)
        return f"{ratio:.1f}x smaller than {name}" if ratio and ratio > 1 else ""

    cards = [
        _best("Smallest", measured, sizes, human_bytes, smaller),
        *(_fastest(measured, name, size) for size in batch_sizes(records)),
        _best("Most faithful", measured, kl, "KL {:.2g}".format, lambda _: f"KL divergence from {name}, in nats"),
    ]
    return [card for card in cards if card is not None]


def _fastest(records: Mapping[str, Record], baseline: str, batch_size: int) -> Highlight | None:
    rows = {name: row for name, record in records.items() if (row := record.latency_at(batch_size))}
    together = len(sessions(list(records.values()))) < 2
    # Of different sessions only the speed-ups compare, each over the baseline of its own; less is faster.
    times = {name: row.typical_ms if together else 1 / (row.speedup_vs_baseline or 1) for name, row in rows.items()}

    def faster(best: Record) -> str:
        row = rows[best.variant.name]
        ratio, ends = row.speedup_vs_baseline, row.speedup_ci95 or (None, None)
        speed = f"against {baseline}: {speed_verdict(ratio, *ends)}" if ratio else ""
        slower = (name for name, time in times.items() if time > times[best.variant.name])
        close = listed([name for name in slower if _alike(records[name], best, batch_size)])
        return "; ".join(filter(None, [speed, f"not measurably faster than {close}" if close else ""]))

    words = (lambda ms: f"{milliseconds(ms)} ms") if together else (lambda share: f"{1 / share:.2f}x")
    return _best(f"Fastest at batch {batch_size}", records, times, words, faster)


def _best(
    title: str,
    records: Mapping[str, Record],
    figures: Mapping[str, float],
    words: Callable[[float], str],
    why: Callable[[Record], str],
) -> Highlight | None:
    """Those with the least of `figures`; whoever takes them is told of a loss of accuracy."""
    if len(set(figures.values())) < 2:
        return None
    least = min(figures.values())
    names = tuple(name for name, figure in figures.items() if figure == least)
    best = records[names[0]]
    loss = best.versus_baseline.verdict if best.versus_baseline and loses(best.versus_baseline) else ""
    return Highlight(title, names, words(least), "; ".join(filter(None, [why(best), loss])))


def _alike(slower: Record, faster: Record, batch_size: int) -> bool:
    speedup = speed_ratio(slower, faster, batch_size)
    return speedup is not None and speedup.interval is not None and speedup.interval.low <= 1 <= speedup.interval.high


def times_smaller(record: Record, baseline: Record | None) -> float | None:
    """The baseline's bytes of weights over the record's; None where either is not known."""
    if baseline is None or not (baseline.size and record.size):
        return None
    return baseline.size.weight_bytes / record.size.weight_bytes


def listed(names: Sequence[str]) -> str:
    """As in `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
