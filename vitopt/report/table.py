"""The comparison table: the same cells in the terminal, in Markdown and on the page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vitopt.formats import QUANTIZED_FORMATS
from vitopt.measure.gate import overall
from vitopt.measure.latency_statistics import calls_needed
from vitopt.records import Latency, Record, Variant, VersusBaseline
from vitopt.report.requirements import DECISIONS, requirement_cells, requirement_sentence

HEADINGS = (
    "variant",
    "format",
    "attention",
    "top-1 %",
    "Δ points (95 %)",
    "agree %",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "floor ms",
    "speed-up",
    "images/s",
    "MFU %",
    "weights",
    "on disk",
    "peak memory",
    "required",
)
UNKNOWN = "–"
SUMMARY_MARK = "<!-- vitopt compare -->\n"  # what a summary begins with; unseen where Markdown is shown
_TEXT_COLUMNS = 3  # name, format and attention; figures follow


@dataclass(frozen=True)
class Table:
    """A table ready to show: the first `text_columns` are words, the others figures.

    `failures` gives the reason of every row that has no figures, by its first cell.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    failures: Mapping[str, str] = field(default_factory=dict)

    def known(self) -> "Table":
        """The table without columns of figures in which nothing is known."""
        shown = [
            index
            for index in range(len(self.headings))
            if index < self.text_columns or any(cells[index] != UNKNOWN for cells in self.rows)
        ]
        return replace(
            self,
            headings=tuple(self.headings[index] for index in shown),
            rows=tuple(tuple(cells[index] for index in shown) for cells in self.rows),
        )


def comparison(records: Sequence[Record], batch_size: int | None) -> Table:
    """The comparison at one batch size (None: nothing was timed)."""
    return Table(
        caption=f"Batch size {batch_size}" if batch_size else "Comparison",
        headings=HEADINGS,
        rows=tuple(tuple(row(record, batch_size)) for record in records),
        text_columns=_TEXT_COLUMNS,
        failures={record.variant.name: record.failure for record in records if record.failure},
    ).known()


def row(record: Record, batch_size: int | None = None) -> list[str]:
    """Cells of one variant at one batch size (None: the first measured); a dash where a figure is missing."""
    latency = record.latency_at(batch_size)
    versus, accuracy = record.versus_baseline, record.accuracy
    # A tenth of a point is less than one image until there are about 10,000.
    digits = 2 if accuracy and accuracy.images >= 10_000 else 1
    return [
        record.variant.name,
        describe_format(record),
        # What was asked for has not run, so it is not shown as if it had.
        "failed" if record.failure else describe_run(record),
        _number(accuracy.top1_percent if accuracy else None, digits),
        _delta(versus, digits),
        UNKNOWN if versus is None else percent(versus.agreement_percent),
        milliseconds(latency.p50_ms if latency else None),
        tail(latency.p95_ms, latency.p95_ci95_ms) if latency else UNKNOWN,
        tail(latency.p99_ms, latency.p99_ci95_ms) if latency else UNKNOWN,
        milliseconds(latency.floor_ms if latency else None),
        f"{latency.speedup_vs_baseline:.2f}x" if latency and latency.speedup_vs_baseline else UNKNOWN,
        rate(latency.images_per_second if latency else None),
        _number(latency.model_flop_utilisation_percent if latency else None, 1),
        human_bytes(record.size.weight_bytes if record.size else None),
        human_bytes(record.size.disk_bytes if record.size else None),
        human_bytes(_peak_bytes(record, latency)),
        DECISIONS[overall(record.requirements)] if record.requirements else UNKNOWN,
    ]


def batch_sizes(records: Sequence[Record]) -> list[int]:
    """Batch sizes at which any variant was timed, rising."""
    return sorted({latency.batch_size for record in records for latency in record.latency})


def describe_format(record: Record) -> str:
    """Format, with the skip list and other exceptions where there are any."""
    variant = record.variant
    kept = f", {' '.join(variant.skip)} in 16 bit" if variant.skip else ""
    others = "".join(f", {pattern} {format}" for pattern, format in variant.layers.items())
    stored = stored_as(variant)
    # What is excepted is so on disk: packed layers and those in 16 bit may run alike once they are expanded.
    if stored is not None:
        return f"{variant.format} (stored as {stored}{kept}{others})"
    return f"{variant.format}{kept}{others}"


def stored_as(variant: Variant) -> str | None:
    """Format on disk where another one ran, else None."""
    return None if variant.stored_format == variant.format else variant.stored_format


def expansion(variant: Variant) -> str:
    """What loading made of the format on disk, where another one ran: `expanded to bf16`."""
    return f"{'expanded to' if variant.stored_format in QUANTIZED_FORMATS else 'run as'} {variant.format}"


def describe_run(record: Record) -> str:
    """How a variant ran: what its options were set to, what was asked for where that differs, then what was on."""
    variant = record.variant
    choices = [value for value in variant.ran.values() if isinstance(value, str)]
    if not variant.ran:
        return UNKNOWN
    missing = [str(variant.asked[option]) for option in variant.asked if _fell_back(variant, option)]
    text = " ".join(choices) + (f" (not {', '.join(missing)})" if missing else "")
    return " + ".join(filter(None, [text, *switched_on(variant)]))


def switched_on(variant: Variant) -> list[str]:
    """Options that a variant ran with and that are either on or off."""
    return [option_words(option) for option, value in variant.ran.items() if value is True]


def option_words(option: str) -> str:
    """Name of an option as people read it."""
    return option.replace("_", " ")


def chosen(variant: Variant, option: str) -> str | None:
    """What was demanded for an option and ran; None where the choice was left open, or something else ran."""
    value = variant.asked.get(option)
    return value if isinstance(value, str) and value != "auto" and option not in variant.reasons else None


def _fell_back(variant: Variant, option: str) -> bool:
    asked, ran = variant.asked[option], variant.ran.get(option)
    # Without a reason, and without anything that was recognised, nothing says that another one ran.
    told = ran is not None or option in variant.reasons
    return isinstance(asked, str) and asked not in ("auto", ran) and told


def describe_device(record: Record) -> str:
    """Name of the GPU, or of the processor."""
    return device_name(record.environment)


def device_name(environment: Mapping[str, Any]) -> str:
    """Name of the GPU, or of the processor, in what a record says about its machine."""
    gpu = environment.get("gpu")
    return str(gpu["name"] if gpu else environment.get("processor", "unknown device"))


def human_bytes(count: int | None) -> str:
    """Megabytes of a million bytes, as file managers and vendors count them; gigabytes from a thousand on."""
    if count is None:
        return UNKNOWN
    megabytes = count / 1e6
    if megabytes >= 999.5:
        return f"{megabytes / 1000:.2f} GB"
    return f"{megabytes:.2f} MB" if megabytes < 10 else f"{megabytes:.0f} MB"


def milliseconds(value: float | None) -> str:
    """One decimal from 100 ms on, two below, three under 0.1 ms."""
    return _number(value, 1 if value is None or value >= 100 else 2 if value >= 0.1 else 3)


def tail(estimate: float | None, limits: tuple[float | None, float | None] | None) -> str:
    """A high percentile with its upper 95 % limit; the lower limit alone where so few calls give no upper one.

    The percentile of few calls is mostly below the true one, so it is shown with its limit or not at all. Records of
    earlier versions have no limits.
    """
    if limits is None:
        return milliseconds(estimate)
    low, high = limits
    if high is None:
        return UNKNOWN if low is None else f"≥ {milliseconds(low)}"
    return f"{milliseconds(estimate)} (≤ {milliseconds(high)})"


def percent(value: float) -> str:
    """One decimal, or as many as it takes (up to four) to tell nearly all from all."""
    digits = next((digits for digits in (1, 2, 3) if value == 100 or float(f"{value:.{digits}f}") < 100), 4)
    return f"{value:.{digits}f}"


def rate(images_per_second: float | None) -> str:
    """Whole images per second from 100 on, one decimal below."""
    return _number(images_per_second, 0 if images_per_second is not None and images_per_second > 99 else 1)


def notes(records: Sequence[Record]) -> list[str]:
    """Sentences that belong under the table: failures, fallbacks, warnings, missing limits, verdicts on accuracy and on
    what is required."""
    required = [
        (record.variant.name, f": {requirement_sentence(one)}") for record in records for one in record.requirements
    ]
    return cautions(records) + _unbounded(records) + verdicts(records) + _together(required)


def cautions(records: Sequence[Record]) -> list[str]:
    """What makes the figures other than they seem: failures, fallbacks, images left out, disturbed timing."""
    found: list[tuple[str, str]] = []
    for record in records:
        name, variant = record.variant.name, record.variant
        if record.failure:
            found.append((name, f" failed: {record.failure}"))
        found += [(name, f": {_reason(variant, option)}") for option in variant.reasons]
        found += [(name, f": batch {f.batch_size} not timed ({f.reason})") for f in record.latency_failures]
        found += [(name, f": {figure} not measured ({why})") for figure, why in record.unmeasured.items()]
    lines = _together(found)
    skipped = next((record.dataset.skipped for record in records if record.dataset and record.dataset.skipped), ())
    if skipped:
        lines.append(f"{len(skipped)} images could not be decoded and were left out, first {skipped[0]}")
    return lines + _warnings([record for record in records if record.failure is None])


def _reason(variant: Variant, option: str) -> str:
    asked, ran, reason = variant.asked.get(option), variant.ran.get(option), variant.reasons[option]
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
            lines.append(f"no upper bound for {name} from {calls} calls: {calls_needed(quantile)} give one")
    return lines


def verdicts(records: Sequence[Record]) -> list[str]:
    """One sentence on accuracy per variant that was compared, the same ones together; then how they allow for their
    number."""
    compared = [(record.variant.name, record.versus_baseline) for record in records if record.versus_baseline]
    lines = _together((name, f" against {versus.baseline}: {versus.verdict}") for name, versus in compared)
    adjusted = sum(versus.mcnemar_holm_p is not None for _, versus in compared)
    holm = f"a change counts as shown if it stands among {adjusted} variants (McNemar's exact p, Holm's method)"
    return lines + ([holm] if adjusted > 1 else [])


def markdown_table(records: Sequence[Record], batch_size: int | None = None) -> str:
    """The comparison in GitHub's Markdown."""
    return markdown(comparison(records, batch_size))


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
    lines = cautions(records) + verdicts(records)
    parts = [markdown_table(records, size) for size in batch_sizes(records) or (None,)]
    if after.requirements:
        title += f": requirements {DECISIONS[overall(after.requirements)]}"
        rows = tuple(map(requirement_cells, after.requirements))
        parts.insert(0, markdown(Table("", ("required", "measured", "95 %", ""), rows)))
    parts = [f"### {markdown_text(title)}", *parts, "\n".join(f"- {markdown_text(x)}" for x in lines)]
    return SUMMARY_MARK + "\n\n".join(parts) + "\n"


def markdown_text(text: str) -> str:
    """The text on one line, with nothing that Markdown reads as a cell border or as HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _together(found: Iterable[tuple[str, str]]) -> list[str]:
    """Join (name, sentence) pairs of the same sentence: `a, b: sentence`."""
    names: dict[str, list[str]] = {}
    for name, sentence in found:
        names.setdefault(sentence, []).append(name)
    return [", ".join(who) + sentence for sentence, who in names.items()]


def _warnings(records: Sequence[Record]) -> list[str]:
    sentences = dict.fromkeys(warning for record in records for warning in record.warnings)
    lines = []
    for sentence in sentences:
        names = [record.variant.name for record in records if sentence in record.warnings]
        lines.append(sentence if len(names) == len(records) else f"{', '.join(names)}: {sentence}")
    return lines


def _peak_bytes(record: Record, latency: Latency | None) -> int | None:
    """Peak memory at the batch size of `latency` where it was measured at each, else the one that was measured."""
    if any(one.peak_bytes is not None for one in record.latency):
        return latency.peak_bytes if latency else None
    return record.memory.peak_bytes if record.memory else None


def _delta(versus: VersusBaseline | None, digits: int) -> str:
    if versus is None:
        return UNKNOWN
    return delta_words(versus.top1_delta_points, versus.top1_delta_ci95_points, digits)


def delta_words(points: float, interval: tuple[float, float], digits: int) -> str:
    """A change in percentage points with its interval, as in `+0.5 (-1.0 to +2.0)`."""
    low, high = interval
    return f"{points:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"
