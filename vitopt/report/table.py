"""The comparison table: the same cells in the terminal, in Markdown and on the page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from vitopt.measure.comparison import sessions
from vitopt.measure.gate import overall
from vitopt.measure.latency_statistics import calls_needed
from vitopt.records import Latency, Metric, Record, Variant
from vitopt.report.requirements import DECISIONS, requirement_parts, requirement_sentence
from vitopt.report.variants import describe_format, describe_run, option_words

UNKNOWN = "–"
SUMMARY_MARK = "<!-- vitopt compare -->\n"  # what a summary begins with; unseen where Markdown is shown
TEXT_COLUMNS = 3  # name, format and attention; figures follow

Cell = Callable[[Any], str | None]


def of(path: str, words: Cell = str) -> Cell:
    """A cell: what lies at `path` of an item, such as `size.disk_bytes`, in words; None where a step of it is None."""

    def cell(item: Any) -> str | None:
        for name in path.split("."):
            item = getattr(item, name)
            if item is None:
                return None
        return words(item)

    return cell


@dataclass(frozen=True)
class Table:
    """A table ready to show: the first `text_columns` are words, the others figures. It is false without rows.

    `failures` gives the reason of every row that has no figures, by its first cell.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    failures: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)


def tabulate(caption: str, columns: Mapping[str, Cell], items: Iterable[Any], text_columns: int = 1) -> Table:
    """A row per item and a column per heading, without columns of figures in which nothing is known."""
    rows = [[cell(item) or UNKNOWN for cell in columns.values()] for item in items]
    known = [i for i in range(len(columns)) if i < text_columns or any(row[i] != UNKNOWN for row in rows)]
    headings, *kept = (tuple(row[i] for i in known) for row in [list(columns), *rows])
    return Table(caption, headings, tuple(kept), text_columns)


class _Timed(NamedTuple):
    """A variant at one batch size."""

    record: Record
    latency: Latency | None


def _top1(record: Record) -> str | None:
    return f"{record.accuracy.top1_percent:.{_digits(record)}f}" if record.accuracy else None


def _delta(record: Record) -> str | None:
    if (versus := record.versus_baseline) is None:
        return None
    return delta_words(versus.top1_delta_points, versus.top1_delta_ci95_points, _digits(record))


def _metrics(metrics: Mapping[str, Metric]) -> str | None:
    """The user's own metrics with their intervals, and the change against the baseline where there is one."""
    words = []
    for name, metric in metrics.items():
        change = "" if metric.delta is None else f", Δ {metric.delta:+.3f}{_range(metric.delta_ci95, '+')}"
        words.append(f"{name} {metric.value:.3f}{_range(metric.ci95)}{change}")
    return "; ".join(words) or None


def _range(interval: tuple[float, float] | None, sign: str = "") -> str:
    return "" if interval is None else f" ({interval[0]:{sign}.3f} to {interval[1]:{sign}.3f})"


def _digits(record: Record) -> int:
    # A tenth of a point is less than one image until there are about 10,000.
    return 2 if record.accuracy and record.accuracy.images >= 10_000 else 1


def _peak(timed: _Timed) -> str | None:
    """Peak memory at the batch size where it was measured at each, else the one that was measured."""
    record, latency = timed.record, timed.latency
    if any(row.peak_bytes is not None for row in record.latency):
        return human_bytes(latency.peak_bytes) if latency and latency.peak_bytes is not None else None
    return human_bytes(record.memory.peak_bytes) if record.memory else None


def comparison(records: Sequence[Record], batch_size: int | None) -> Table:
    """The comparison at one batch size (None: nothing was timed)."""
    caption = f"Batch size {batch_size}" if batch_size else "Comparison"
    table = tabulate(caption, _COLUMNS, [_Timed(r, r.latency_at(batch_size)) for r in records], TEXT_COLUMNS)
    return replace(table, failures={record.variant.name: record.failure for record in records if record.failure})


def row(record: Record, batch_size: int | None = None) -> list[str]:
    """Cells of one variant at one batch size (None: the first measured); a dash where a figure is missing."""
    timed = _Timed(record, record.latency_at(batch_size))
    return [cell(timed) or UNKNOWN for cell in _COLUMNS.values()]


def batch_sizes(records: Sequence[Record]) -> list[int]:
    """Batch sizes at which any variant was timed, rising."""
    return sorted({latency.batch_size for record in records for latency in record.latency})


def device_name(environment: Mapping[str, Any]) -> str:
    """Name of the GPU, or of the processor, in what a record says about its machine."""
    gpu = environment.get("gpu")
    return str(gpu["name"] if gpu else environment.get("processor", "unknown device"))


def human_bytes(count: float) -> str:
    """Megabytes of a million bytes, as file managers and vendors count them; gigabytes from a thousand on."""
    megabytes = count / 1e6
    if megabytes >= 999.5:
        return f"{megabytes / 1000:.2f} GB"
    return f"{megabytes:.{2 if megabytes < 10 else 0}f} MB"


def milliseconds(value: float) -> str:
    """One decimal from 100 ms on, two below, three under 0.1 ms."""
    return f"{value:.{1 if value >= 100 else 2 if value >= 0.1 else 3}f}"


def tail(estimate: float | None, limits: tuple[float | None, float | None] | None) -> str | None:
    """A high percentile with its upper 95 % limit; the lower limit alone where so few calls give no upper one.

    The percentile of few calls is mostly below the true one, so it is shown with its limit or not at all. Records of
    earlier versions have no limits.
    """
    low, high = limits or (None, None)
    if high is None and limits:
        return None if low is None else f"≥ {milliseconds(low)}"
    within = "" if high is None else f" (≤ {milliseconds(high)})"
    return None if estimate is None else milliseconds(estimate) + within


def with_interval(words: Callable[[float], str], value: float, interval: tuple[float, float] | None) -> str:
    """A figure with its interval where there is one, as in `1.50x (1.42x to 1.58x)`."""
    return words(value) + (f" ({words(interval[0])} to {words(interval[1])})" if interval else "")


def percent(value: float) -> str:
    """One decimal, or as many as it takes (up to four) to tell nearly all from all."""
    digits = next((digits for digits in (1, 2, 3) if value == 100 or float(f"{value:.{digits}f}") < 100), 4)
    return f"{value:.{digits}f}"


def rate(images_per_second: float) -> str:
    """Whole images per second from 100 on, one decimal below."""
    return f"{images_per_second:.{0 if images_per_second > 99 else 1}f}"


def notes(records: Sequence[Record]) -> list[str]:
    """Sentences that belong under the table: failures, fallbacks, warnings, missing limits, verdicts on accuracy and on
    what is required."""
    required = [
        (record.variant.name, f": {requirement_sentence(requirement)}")
        for record in records
        for requirement in record.requirements
    ]
    return cautions(records) + _unbounded(records) + verdicts(records) + _together(required)


def cautions(records: Sequence[Record]) -> list[str]:
    """What makes the figures other than they seem: failures, fallbacks, images left out, disturbed timing."""
    sentences = []
    for record in records:
        variant = record.variant
        said = [f" failed: {record.failure}"] if record.failure else []
        said += [f": {_reason(variant, option)}" for option in variant.reasons]
        said += [f": batch {row.batch_size} not timed ({row.reason})" for row in record.latency_failures]
        said += [f": {figure} not measured ({why})" for figure, why in record.unmeasured.items()]
        said += [f": {record.routing.promise}"] if record.routing else []
        sentences += [(variant.name, sentence) for sentence in said]
    if routed := [record.variant.name for record in records if any(row.by_mean for row in record.latency)]:
        lines = [f"{', '.join(routed)}: speed-up and images/s are of means, over real images in turn"]
    else:
        lines = []
    lines += _together(sentences) + _sessions(records)
    skipped = next((record.dataset.skipped for record in records if record.dataset and record.dataset.skipped), ())
    if skipped:
        lines.append(f"{len(skipped)} images could not be decoded and were left out, first {skipped[0]}")
    measured = [record for record in records if record.failure is None]
    for sentence in dict.fromkeys(warning for record in measured for warning in record.warnings):
        names = [record.variant.name for record in measured if sentence in record.warnings]
        lines.append(sentence if len(names) == len(measured) else f"{', '.join(names)}: {sentence}")
    return lines


def _sessions(records: Sequence[Record]) -> list[str]:
    """Which rows were not timed together, where not all were."""
    groups = sessions(records)
    if len(groups) < 2:
        return []
    told = []
    for group in groups:
        when = f" ({group[0].created[:16].replace('T', ' ')})" if group[0].created else ""
        told.append(", ".join(record.variant.name for record in group) + when)
    own = any(record.baseline_of for record in records)
    against = ", and each speed-up is over the baseline of its own session" if own else ""
    return [f"not timed together: {'; '.join(told)}: times of different sessions do not compare{against}"]


def _reason(variant: Variant, option: str) -> str:
    asked = variant.format if option == "format" else variant.asked.get(option)
    ran, reason = variant.ran.get(option), variant.reasons[option]
    if isinstance(asked, str):
        return f"{option_words(option)} {asked} was asked for, {ran or 'another'} ran ({reason})"
    return f"{option_words(option)} was asked for{'' if ran else ' and did not run'} ({reason})"


def _unbounded(records: Sequence[Record]) -> list[str]:
    """Which percentiles have no upper limit, and how many calls would give one."""
    rows = [row for record in records for row in record.latency]
    lines = []
    for name, quantile in (("p95", 0.95), ("p99", 0.99)):
        limits = {row.iterations: getattr(row, f"{name}_ci95_ms") for row in rows}
        few = sorted(count for count, limit in limits.items() if limit is not None and limit[1] is None)
        if few:
            calls = " or ".join(map(str, few))
            lines.append(f"no upper bound for {name} from {calls} calls: at least {calls_needed(quantile)} are needed")
    return lines


def verdicts(records: Sequence[Record]) -> list[str]:
    """One sentence on accuracy per variant that was compared, the same ones together; then how they allow for their
    number."""
    compared = [(record.variant.name, record.versus_baseline) for record in records if record.versus_baseline]
    lines = _together((name, f" against {versus.baseline}: {versus.verdict}") for name, versus in compared)
    adjusted = sum(versus.mcnemar_holm_p is not None for _, versus in compared)
    holm = f"a change counts as shown only if it is significant among {adjusted} variants (McNemar's exact p, Holm)"
    return lines + ([holm] if adjusted > 1 else [])


def markdown(table: Table) -> str:
    """A table in GitHub's Markdown."""
    figures = len(table.headings) - table.text_columns
    lines = ["| " + " | ".join(table.headings) + " |", "|" + "---|" * table.text_columns + "---:|" * figures]
    lines += ["| " + " | ".join(map(markdown_text, cells)) + " |" for cells in table.rows]
    return "\n".join(lines)


def pull_request(records: tuple[Record, Record]) -> str:
    """What a pull request needs of a comparison: the decision, what was required, the table, the notes."""
    before, after = records
    title = f"{after.variant.name} against {before.variant.name}"
    parts = [markdown(comparison(records, size)) for size in batch_sizes(records) or (None,)]
    if after.requirements:
        title += f": requirements {DECISIONS[overall(after.requirements)]}"
        rows = tuple(map(requirement_parts, after.requirements))
        parts.insert(0, markdown(Table("", ("required", "measured (95 %)"), rows)))
    lines = "\n".join(f"- {markdown_text(line)}" for line in cautions(records) + verdicts(records))
    return SUMMARY_MARK + "\n\n".join([f"### {markdown_text(title)}", *parts, lines]) + "\n"


def markdown_text(text: str) -> str:
    """The text on one line, with nothing that Markdown reads as a cell border or as HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _together(sentences: Iterable[tuple[str, str]]) -> list[str]:
    """Join (name, sentence) pairs of the same sentence: `a, b: sentence`."""
    names: dict[str, list[str]] = {}
    for name, sentence in sentences:
        names.setdefault(sentence, []).append(name)
    return [", ".join(who) + sentence for sentence, who in names.items()]


def delta_words(points: float, interval: tuple[float, float], digits: int) -> str:
    """A change in percentage points with its interval, as in `+0.5 (-1.0 to +2.0)`."""
    return with_interval(f"{{:+.{digits}f}}".format, points, interval)


_COLUMNS: dict[str, Cell] = {
    "variant": of("record.variant.name"),
    "format": of("record", describe_format),
    # What was asked for has not run, so it is not shown as if it had.
    "attention": of("record", lambda record: "failed" if record.failure else describe_run(record)),
    "top-1 %": of("record", _top1),
    "Δ points (95 %)": of("record", _delta),
    "agree %": of("record.versus_baseline.agreement_percent", percent),
    "KL": of("record.versus_baseline.mean_kl_divergence", "{:.4f}".format),
    "metrics": of("record.metrics", _metrics),
    "escalated %": of("record.routing.escalated_percent", "{:.1f}".format),
    "mean ms": of("latency", lambda latency: milliseconds(latency.mean_ms) if latency.by_mean else None),
    "p50 ms": of("latency.p50_ms", milliseconds),
    "p95 ms": of("latency", lambda latency: tail(latency.p95_ms, latency.p95_ci95_ms)),
    "p99 ms": of("latency", lambda latency: tail(latency.p99_ms, latency.p99_ci95_ms)),
    "floor ms": of("latency.floor_ms", milliseconds),
    "speed-up": of("latency.speedup_vs_baseline", "{:.2f}x".format),
    "images/s": of("latency.images_per_second", rate),
    "MFU %": of("latency.model_flop_utilisation_percent", "{:.1f}".format),
    "weights": of("record.size.weight_bytes", human_bytes),
    "on disk": of("record.size.disk_bytes", human_bytes),
    "peak memory": _peak,
    "required": of("record.requirements", lambda found: DECISIONS[overall(found)] if found else None),
}
HEADINGS = tuple(_COLUMNS)
