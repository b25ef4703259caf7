"""The run in words: the answer on top, the best variants, a verdict for each."""

from collections.abc import Sequence
from dataclasses import dataclass

from vitopt.measure.comparison import speed_ratio
from vitopt.measure.gate import overall
from vitopt.measure.verdict import loses, speed_verdict
from vitopt.records import Latency, Record
from vitopt.report.requirements import requirement_sentence
from vitopt.report.table import batch_sizes, delta_words, expansion, human_bytes, milliseconds, percent, stored_as


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
    if any(record.versus_baseline for record in records):
        sentences += _about_accuracy([record for record in records if record.versus_baseline])
    elif not any(record.dataset for record in records):
        sentences.append("Measured on random pixels: these figures tell about speed, size and memory only.")
    elif len(records) == 1:
        sentences.append("There is one variant, so there is nothing to compare it with.")
    sentences += _about_requirements(records)
    if failed:
        sentences.append(f"{_names(failed)} failed; the reasons are below.")
    advice = ship(records)
    return [f"{advice[0].upper()}{advice[1:]}.", *sentences] if advice else sentences


def _about_accuracy(compared: Sequence[Record]) -> list[str]:
    found = {record.variant.name: record.versus_baseline for record in compared if record.versus_baseline}
    losing = [record for record in compared if record.versus_baseline and loses(record.versus_baseline)]
    holding = [record for record in compared if record not in losing]
    baseline = next(iter(found.values())).baseline
    images = compared[0].accuracy.images if compared[0].accuracy else 0
    count = f"{len(compared)} variants were" if len(compared) > 1 else f"{_names(compared)} was"
    first = f"{count} compared with {baseline} on the same {images:,} images: "
    if losing:
        first += f"{_names(losing)} {'lose' if len(losing) > 1 else 'loses'} accuracy"
        first += "; for the others no loss is shown." if holding else "."
    else:
        first += f"no loss of accuracy is shown{' for any of them' if len(compared) > 1 else ''}."
    if not holding:
        return [first]
    versus = [found[record.variant.name] for record in holding]
    hidden = max(0.0, *(-one.top1_delta_ci95_points[0] for one in versus))
    last = f"A loss of up to {hidden:.1f} points is not excluded"
    agreement = min(one.agreement_percent for one in versus)
    if agreement < 100:
        least = [one for one in holding if found[one.variant.name].agreement_percent == agreement]
        verb = "give" if len(least) > 1 else "gives"
        last += f", and {_names(least)} {verb} another class than {baseline} on {100 - agreement:.2g} % of the images"
    # Where none loses, the highlights say the same.
    return [first, *(_best(holding) if losing and len(holding) > 1 else []), f"{last}."]


def _best(records: Sequence[Record]) -> list[str]:
    timed = [(latency.p50_ms, latency.batch_size, record) for record in records if (latency := record.latency_at(None))]
    parts = []
    if timed:
        _, batch_size, fastest = min(timed, key=lambda one: one[0])
        parts.append(f"{_names([fastest])} is the fastest at batch {batch_size}")
    if smallest := _smallest(records):
        parts.append(f"{_names(smallest)} {'are' if len(smallest) > 1 else 'is'} the smallest")
    return [f"Of those, {listed(parts)}."] if parts else []


def ship(records: Sequence[Record]) -> str | None:
    """Which variant to ship and why: the fastest of those that are shown to meet what is required of them.

    None where nothing is required.
    """
    asked = [record for record in records if record.requirements]
    if not asked:
        return None
    met = [
        (record, row) for record in asked if overall(record.requirements) == "shown" if (row := record.latency_at(None))
    ]
    if not met:
        return "no variant is shown to meet all that is required"
    best, row = min(met, key=lambda pair: pair[1].p50_ms)
    reasons = ["it meets what is required", f"{milliseconds(row.p50_ms)} ms"]
    if row.speedup_vs_baseline:
        reasons.append(f"{row.speedup_vs_baseline:.2f}x")
    if versus := best.versus_baseline:
        reasons.append(f"top-1 {delta_words(versus.top1_delta_points, versus.top1_delta_ci95_points, 1)} points")
    if best.size:
        reasons.append(human_bytes(best.size.weight_bytes))
    others = " and is the fastest that does" if len(met) > 1 else ""
    return f"ship {best.variant.name}: {reasons[0]}{others}: {', '.join(reasons[1:])}"


def _about_requirements(records: Sequence[Record]) -> list[str]:
    words = {"shown": "met by", "failed": "missed by", "undecided": "not shown for"}
    judged = {
        decision: [r for r in records if r.requirements and overall(r.requirements) == decision] for decision in words
    }
    parts = [f"{words[decision]} {_names(found)}" for decision, found in judged.items() if found]
    return [f"What is required is {listed(parts)}."] if parts else []


def highlights(records: Sequence[Record], baseline: Record | None) -> list[Highlight]:
    """Smallest, fastest per batch size, most faithful; none where there is nothing to choose from."""
    measured = [record for record in records if record.failure is None]
    if len(measured) < 2:
        return []
    found = []
    smallest = _smallest(measured)
    if smallest and len({record.size.weight_bytes for record in measured if record.size}) > 1:
        text = _joined(f"weights {_ratio_of_sizes(smallest[0], baseline) or 'in memory'}", *_loss(smallest[0]))
        size = smallest[0].size.weight_bytes if smallest[0].size else None
        found.append(_highlight("Smallest", smallest, human_bytes(size), text))
    found += [one for size in batch_sizes(measured) if (one := _fastest(measured, baseline, size))]
    # Agreement is too coarse to rank variants that flip a handful of images; the divergence is not.
    if versus := [record.versus_baseline for record in measured if record.versus_baseline]:
        best = min(versus, key=lambda one: one.mean_kl_divergence)
        equal = [r for r in measured if (v := r.versus_baseline) and v.mean_kl_divergence == best.mean_kl_divergence]
        within = f" ({best.kl_ci95[0]:.2g} to {best.kl_ci95[1]:.2g})" if best.kl_ci95 else ""
        text = f"lowest KL divergence from {best.baseline}, in nats{within}"
        found.append(_highlight("Most faithful", equal, f"KL {best.mean_kl_divergence:.2g}", text))
    return found


def _highlight(title: str, best: Sequence[Record], figure: str, text: str) -> Highlight:
    return Highlight(title, tuple(record.variant.name for record in best), figure, text)


def _smallest(records: Sequence[Record]) -> list[Record]:
    sizes = {record.variant.name: record.size.weight_bytes for record in records if record.size}
    return [record for record in records if sizes.get(record.variant.name) == min(sizes.values())] if sizes else []


def _fastest(records: Sequence[Record], baseline: Record | None, batch_size: int) -> Highlight | None:
    timed = [(record, latency) for record in records if (latency := record.latency_at(batch_size))]
    if len(timed) < 2:
        return None
    best, latency = min(timed, key=lambda pair: pair[1].p50_ms)
    against = ""
    if baseline is not None and best.variant.name == baseline.variant.name:
        against = "the baseline itself"
    elif baseline is not None and latency.speedup_vs_baseline:
        against = f"against {baseline.variant.name}: {_speed(latency)}"
    close = [record for record, _ in timed if record is not best and _alike(record, best, batch_size)]
    text = _joined(against, f"not measurably faster than {_names(close)}" if close else "", *_loss(best))
    return _highlight(f"Fastest at batch {batch_size}", [best], f"{milliseconds(latency.p50_ms)} ms", text)


def _alike(slower: Record, faster: Record, batch_size: int) -> bool:
    found = speed_ratio(slower, faster, batch_size)
    return found is not None and found.interval is not None and found.interval.low <= 1 <= found.interval.high


def _loss(record: Record) -> list[str]:
    """The verdict where accuracy is lost: who takes the fastest or smallest must not miss it."""
    versus = record.versus_baseline
    return [versus.verdict] if versus and loses(versus) else []


def verdicts(records: Sequence[Record], baseline: Record | None) -> dict[str, list[str]]:
    """What is known of each variant against the baseline, in sentences by its name; accuracy or failure first."""
    others = [record for record in records if baseline is None or record.variant.name != baseline.variant.name]
    said = {record.variant.name: list(filter(None, _sentences(record, baseline))) for record in others}
    return {name: sentences for name, sentences in said.items() if sentences}


def _sentences(record: Record, baseline: Record | None) -> list[str]:
    if record.failure:
        return [f"failed: {record.failure}"]
    size, stored = _ratio_of_sizes(record, baseline), stored_as(record.variant)
    sentences = []
    if versus := record.versus_baseline:
        agreement = percent(versus.agreement_percent)
        sentences = [versus.verdict, f"same class as {versus.baseline} on {agreement} % of the images"]
    return [
        *sentences,
        *map(requirement_sentence, record.requirements),
        *(f"at batch {one.batch_size}: {_speed(one)}" for one in record.latency if one.speedup_vs_baseline),
        f"weights {size}" if size else "",
        f"stored as {stored}, {expansion(record.variant)} at load" if stored else "",
    ]


def _speed(latency: Latency) -> str:
    assert latency.speedup_vs_baseline is not None
    return speed_verdict(latency.speedup_vs_baseline, *(latency.speedup_ci95 or (None, None)))


def _ratio_of_sizes(record: Record, baseline: Record | None) -> str | None:
    if baseline is None or not (baseline.size and record.size) or record.variant.name == baseline.variant.name:
        return None
    ratio = baseline.size.weight_bytes / record.size.weight_bytes
    if 0.995 < ratio < 1.005:
        return f"as large as those of {baseline.variant.name}"
    words = f"{ratio:.1f}x smaller" if ratio > 1 else f"{1 / ratio:.1f}x larger"
    return f"{words} than those of {baseline.variant.name}"


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def _names(records: Sequence[Record]) -> str:
    return listed([record.variant.name for record in records])


def listed(names: Sequence[str]) -> str:
    """As in `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
