"""The run in words: the answer on top, the best variants, a verdict for each."""

from collections.abc import Sequence
from dataclasses import dataclass

from vitopt.measure.comparison import speed_ratio
from vitopt.measure.gate import overall
from vitopt.measure.verdict import loses, speed_verdict
from vitopt.records import Latency, Record, VersusBaseline
from vitopt.report.requirements import requirement_sentence
from vitopt.report.table import batch_sizes, expansion, human_bytes, milliseconds, percent, stored_as


@dataclass(frozen=True)
class Highlight:
    """The best variants by one measure: more than one where they are equal."""

    title: str
    names: tuple[str, ...]
    figure: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """All that can be said about one variant, in sentences; none for the baseline or a failure."""

    variant: str
    sentences: tuple[str, ...]
    failed: bool


def baseline_of(records: Sequence[Record], name: str | None = None) -> Record | None:
    """The record that the others were compared with; `name` is what the recipe calls the baseline."""
    compared = (record.versus_baseline.baseline for record in records if record.versus_baseline)
    wanted = next(compared, name)
    return next((record for record in records if record.variant.name == wanted), None)


def headline(records: Sequence[Record], baseline: Record | None) -> list[str]:
    """The answer in two or three sentences."""
    failed = [record for record in records if record.failure]
    if len(failed) == len(records):
        return ["No variant could be measured. The reasons are below."]
    if baseline is not None and baseline.failure:
        return [f"The baseline {baseline.variant.name} failed, so the variants are compared with nothing."]
    sentences = []
    compared = [(record, record.versus_baseline) for record in records if record.versus_baseline]
    if compared:
        sentences += _about_accuracy(compared)
    elif not any(record.accuracy for record in records):
        sentences.append("Measured on random pixels: these figures tell about speed, size and memory only.")
    elif len(records) == 1:
        sentences.append("There is one variant, so there is nothing to compare it with.")
    sentences += _about_requirements(records)
    if failed:
        sentences.append(f"{listed(_names(failed))} failed; the reasons are below.")
    return sentences


def highlights(records: Sequence[Record], baseline: Record | None) -> list[Highlight]:
    """Smallest, fastest per batch size, most faithful; none where there is nothing to choose from."""
    measured = [record for record in records if record.failure is None]
    if len(measured) < 2:
        return []
    found = [_smallest(measured, baseline)]
    found += _fastest_at_all_sizes(measured, baseline)
    found.append(_most_faithful(measured))
    return [highlight for highlight in found if highlight is not None]


def verdicts(records: Sequence[Record], baseline: Record | None) -> list[Verdict]:
    """What is known about each variant against the baseline, in plain words; accuracy or failure first."""
    others = [record for record in records if baseline is None or record.variant.name != baseline.variant.name]
    said = [(record, tuple(_sentences(record, baseline))) for record in others]
    return [Verdict(record.variant.name, lines, failed=record.failure is not None) for record, lines in said if lines]


def _about_accuracy(compared: Sequence[tuple[Record, VersusBaseline]]) -> list[str]:
    record, versus = compared[0]
    baseline, images = versus.baseline, record.accuracy.images if record.accuracy else 0
    losing = [record for record, versus in compared if loses(versus)]
    holding = [(record, versus) for record, versus in compared if not loses(versus)]
    count = f"{len(compared)} variants were" if len(compared) > 1 else f"{record.variant.name} was"
    first = f"{count} compared with {baseline} on the same {images:,} images: "
    if losing:
        first += f"{listed(_names(losing))} {'lose' if len(losing) > 1 else 'loses'} accuracy"
        first += "; for the others no loss is shown." if holding else "."
    else:
        first += f"no loss of accuracy is shown{' for any of them' if len(compared) > 1 else ''}."
    if not holding:
        return [first]
    best = _best([record for record, _ in holding]) if losing and len(holding) > 1 else []
    return [first, *best, _what_is_not_excluded(holding, baseline)]


def _what_is_not_excluded(holding: Sequence[tuple[Record, VersusBaseline]], baseline: str) -> str:
    most = max(-versus.top1_delta_ci95_points[0] for _, versus in holding)
    text = f"A loss of up to {max(0.0, most):.1f} points is not excluded"
    agreement = min(versus.agreement_percent for _, versus in holding)
    if agreement < 100:
        least = [record for record, versus in holding if versus.agreement_percent == agreement]
        verb, others = "give" if len(least) > 1 else "gives", f"{100 - agreement:.2g} % of the images"
        text += f", and {listed(_names(least))} {verb} another class than {baseline} on {others}"
    return text + "."


def _about_requirements(records: Sequence[Record]) -> list[str]:
    by_decision: dict[str, list[str]] = {}
    for record in records:
        if record.requirements:
            by_decision.setdefault(overall(record.requirements), []).append(record.variant.name)
    words = {"shown": "met by", "failed": "missed by", "undecided": "not shown for"}
    parts = [f"{words[decision]} {listed(by_decision[decision])}" for decision in words if decision in by_decision]
    return [f"What is required is {listed(parts)}."] if parts else []


def _best(records: Sequence[Record]) -> list[str]:
    """Only where some variants lose: else the highlights say the same."""
    timed = [(record, latency) for record in records if (latency := record.latency_at(None))]
    sized = [(record.size.weight_bytes, record.variant.name) for record in records if record.size]
    praise: dict[tuple[str, ...], list[str]] = {}
    if timed:
        fastest, latency = min(timed, key=lambda pair: pair[1].p50_ms)
        praise.setdefault((fastest.variant.name,), []).append(f"the fastest at batch {latency.batch_size}")
    if sized:
        smallest = tuple(name for size, name in sized if size == min(sized)[0])
        praise.setdefault(smallest, []).append("the smallest")
    parts = [f"{listed(names)} {'are' if len(names) > 1 else 'is'} {listed(words)}" for names, words in praise.items()]
    return [f"Of those, {listed(parts)}."] if parts else []


def _smallest(records: Sequence[Record], baseline: Record | None) -> Highlight | None:
    sized = [(record, record.size.weight_bytes) for record in records if record.size]
    if len({size for _, size in sized}) < 2:
        return None
    best = min(size for _, size in sized)
    names = tuple(record.variant.name for record, size in sized if size == best)
    first = next(record for record, size in sized if size == best)
    ratio = _ratio_of_sizes(first, baseline)
    parts = [f"weights {ratio}" if ratio else "weights in memory", *_loss(first)]
    return Highlight("Smallest", names, human_bytes(best), "; ".join(parts))


def _fastest_at_all_sizes(records: Sequence[Record], baseline: Record | None) -> list[Highlight]:
    return [
        highlight
        for batch_size in batch_sizes(records)
        if (highlight := _fastest(records, baseline, batch_size)) is not None
    ]


def _fastest(records: Sequence[Record], baseline: Record | None, batch_size: int) -> Highlight | None:
    timed = [(record, latency) for record in records if (latency := record.latency_at(batch_size))]
    if len(timed) < 2:
        return None
    best, latency = min(timed, key=lambda pair: pair[1].p50_ms)
    parts = []
    if baseline is not None and best.variant.name == baseline.variant.name:
        parts.append("the baseline itself")
    elif latency.speedup_vs_baseline and baseline is not None:
        parts.append(f"against {baseline.variant.name}: {_speed(latency)}")
    close = [record.variant.name for record, _ in timed if record is not best and _alike(record, best, batch_size)]
    if close:
        parts.append(f"not measurably faster than {listed(close)}")
    parts += _loss(best)
    figure = f"{milliseconds(latency.p50_ms)} ms"
    return Highlight(f"Fastest at batch {batch_size}", (best.variant.name,), figure, "; ".join(parts))


def _loss(record: Record) -> list[str]:
    """The verdict where accuracy is lost: who takes the fastest or smallest must not miss it."""
    versus = record.versus_baseline
    return [versus.verdict] if versus and loses(versus) else []


def _alike(slower: Record, faster: Record, batch_size: int) -> bool:
    found = speed_ratio(slower, faster, batch_size)
    return found is not None and found.interval is not None and found.interval.low <= 1 <= found.interval.high


def _most_faithful(records: Sequence[Record]) -> Highlight | None:
    compared = [(record, record.versus_baseline) for record in records if record.versus_baseline]
    if not compared:
        return None
    # Agreement is too coarse to rank variants that flip a handful of images; the divergence is not.
    best = min((versus for _, versus in compared), key=lambda versus: versus.mean_kl_divergence)
    names = tuple(r.variant.name for r, versus in compared if versus.mean_kl_divergence == best.mean_kl_divergence)
    within = f" ({best.kl_ci95[0]:.2g} to {best.kl_ci95[1]:.2g})" if best.kl_ci95 else ""
    text = f"lowest KL divergence from {best.baseline}, in nats{within}"
    return Highlight("Most faithful", names, f"KL {best.mean_kl_divergence:.2g}", text)


def _sentences(record: Record, baseline: Record | None) -> list[str]:
    if record.failure:
        return [f"failed: {record.failure}"]
    sentences = []
    versus = record.versus_baseline
    if versus:
        sentences.append(versus.verdict)
        sentences.append(f"same class as {versus.baseline} on {percent(versus.agreement_percent)} % of the images")
    sentences += map(requirement_sentence, record.requirements)
    sentences += [
        f"at batch {latency.batch_size}: {_speed(latency)}" for latency in record.latency if latency.speedup_vs_baseline
    ]
    if size := _ratio_of_sizes(record, baseline):
        sentences.append(f"weights {size}")
    if stored := stored_as(record.variant):
        sentences.append(f"stored as {stored}, {expansion(record.variant)} at load")
    return sentences


def _speed(latency: Latency) -> str:
    assert latency.speedup_vs_baseline is not None
    low, high = latency.speedup_ci95 or (None, None)
    return speed_verdict(latency.speedup_vs_baseline, low, high)


def _ratio_of_sizes(record: Record, baseline: Record | None) -> str | None:
    if baseline is None or not (baseline.size and record.size) or record.variant.name == baseline.variant.name:
        return None
    ratio = baseline.size.weight_bytes / record.size.weight_bytes
    if 0.995 < ratio < 1.005:
        return f"as large as those of {baseline.variant.name}"
    words = f"{ratio:.1f}x smaller" if ratio > 1 else f"{1 / ratio:.1f}x larger"
    return f"{words} than those of {baseline.variant.name}"


def _names(records: Sequence[Record]) -> list[str]:
    return [record.variant.name for record in records]


def listed(names: Sequence[str]) -> str:
    """As in `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
