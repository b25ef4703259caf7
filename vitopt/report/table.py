"""The comparison table: the same cells in the terminal, in Markdown and on the page."""

from collections.abc import Sequence

from vitopt.records import Latency, Record, VersusBaseline

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
    "speed-up",
    "images/s",
    "weights",
    "on disk",
    "peak memory",
)
UNKNOWN = "–"


def row(record: Record, batch_size: int | None = None) -> list[str]:
    """Cells of one variant at one batch size (None: the first measured); a dash where a figure is missing."""
    latency = _at(record, batch_size)
    versus, accuracy = record.versus_baseline, record.accuracy
    return [
        record.variant.name,
        describe_format(record),
        describe_attention(record),
        _number(accuracy.top1_percent if accuracy else None, 1),
        _delta(versus),
        _number(versus.agreement_percent if versus else None, 1),
        _milliseconds(latency.p50_ms if latency else None),
        _milliseconds(latency.p95_ms if latency else None),
        _milliseconds(latency.p99_ms if latency else None),
        f"{latency.speedup_vs_baseline:.2f}x" if latency and latency.speedup_vs_baseline else UNKNOWN,
        _number(
            latency.images_per_second if latency else None,
            0 if latency and latency.images_per_second > 99 else 1,
        ),
        human_bytes(record.size.weight_bytes if record.size else None),
        human_bytes(record.size.disk_bytes if record.size else None),
        human_bytes(record.memory.peak_bytes if record.memory else None),
    ]


def batch_sizes(records: Sequence[Record]) -> list[int]:
    """Batch sizes at which any variant was timed."""
    return sorted({latency.batch_size for record in records for latency in record.latency})


def describe_format(record: Record) -> str:
    """Format, with the skip list where there is one."""
    kept = f", {' '.join(record.variant.skip)} in 16 bit" if record.variant.skip else ""
    return f"{record.variant.format}{kept}"


def describe_attention(record: Record) -> str:
    """What ran, and what was asked for where that differs; compiled or not."""
    variant = record.variant
    text = variant.attention_used
    if variant.attention_requested != variant.attention_used:
        text += f" (not {variant.attention_requested})"
    if variant.compile_used:
        text += " + compile"
    return text


def describe_device(record: Record) -> str:
    """Name of the GPU, or of the processor."""
    gpu = record.environment.get("gpu")
    return str(gpu["name"] if gpu else record.environment.get("processor", "unknown device"))


def human_bytes(count: int | None) -> str:
    """Megabytes of a million bytes, as file managers and vendors count them."""
    if count is None:
        return UNKNOWN
    megabytes = count / 1e6
    return f"{megabytes:.2f} MB" if megabytes < 10 else f"{megabytes:.0f} MB"


def notes(records: Sequence[Record]) -> list[str]:
    """Sentences that belong under the table: what the figures mean, fallbacks, failures, warnings."""
    lines = []
    for record in records:
        name = record.variant.name
        if record.failure:
            lines.append(f"{name} failed: {record.failure}")
        if record.variant.attention_reason:
            lines.append(
                f"{name}: {record.variant.attention_requested} was asked for, {record.variant.attention_used} ran "
                f"({record.variant.attention_reason})"
            )
        if record.variant.compile_reason:
            lines.append(f"{name}: not compiled ({record.variant.compile_reason})")
        lines += [f"{name}: batch {f.batch_size} not timed ({f.reason})" for f in record.latency_failures]
        if record.versus_baseline:
            lines.append(f"{name} against {record.versus_baseline.baseline}: {record.versus_baseline.verdict}")
    measured = next((record for record in records if record.dataset), None)
    if measured and measured.dataset and measured.dataset.skipped:
        skipped = measured.dataset.skipped
        lines.append(f"{len(skipped)} images could not be decoded and were left out, first {skipped[0]}")
    return lines + list(dict.fromkeys(warning for record in records for warning in record.warnings))


def markdown_table(records: Sequence[Record], batch_size: int | None = None) -> str:
    """The table in GitHub's Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(row(record, batch_size)) + " |" for record in records]
    return "\n".join(lines)


def _at(record: Record, batch_size: int | None) -> Latency | None:
    if batch_size is None:
        return record.latency[0] if record.latency else None
    return next((latency for latency in record.latency if latency.batch_size == batch_size), None)


def _delta(versus: VersusBaseline | None) -> str:
    if versus is None:
        return UNKNOWN
    low, high = versus.top1_delta_ci95_points
    return f"{versus.top1_delta_points:+.1f} ({low:+.1f} to {high:+.1f})"


def _number(value: float | None, digits: int, signed: bool = False) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def _milliseconds(value: float | None) -> str:
    return _number(value, 2 if value is not None and value < 100 else 1)
