"""Two results compared: their speed from the samples in their records, their answers image by image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitopt.errors import RecordError
from vitopt.measure.accuracy import adjusted, compare, require_same_images
from vitopt.measure.intervals import Interval
from vitopt.measure.latency_statistics import Speedup, mean_speedup, speedup_interval
from vitopt.measure.predictions import Predictions, load_predictions
from vitopt.records import Latency, Metric, Record, VersusBaseline, load_record


@dataclass(frozen=True)
class SpeedRatio(Speedup):
    """How many times faster a variant is than a baseline; without an interval, `caution` says why."""

    batch_size: int
    caution: str | None


@dataclass(frozen=True)
class Comparison:
    """A variant's record against another's, over the same images."""

    baseline: Record
    variant: Record
    versus: VersusBaseline | None  # None where outputs are no classes
    speed: tuple[SpeedRatio, ...]  # by batch size, where both were timed

    @property
    def records(self) -> tuple[Record, Record]:
        """Both records, the variant's with this comparison in place of the one that was stored."""
        metrics = {
            # A paired difference from another baseline says nothing here, and code is not stored to make it anew.
            name: Metric(value=metric.value, ci95=metric.ci95)
            if metric.baseline != self.baseline.variant.name
            else metric
            for name, metric in self.variant.metrics.items()
        }
        changed = {"versus_baseline": self.versus, "metrics": metrics}
        return self.baseline, self.variant.model_copy(update=changed)

    def lines(self) -> list[str]:
        """What the numbers say beyond the table."""
        lines = []
        if (versus := self.versus) is not None:
            lines.append(
                f"{versus.right_to_wrong} images turned wrong, {versus.wrong_to_right} turned right "
                f"(McNemar's exact p = {versus.mcnemar_p:.3g}); mean KL divergence {versus.mean_kl_divergence:.4f} nats"
            )
        lines += [f"batch {speed.batch_size}: {speed.ratio:.2f}x the speed{_worth(speed)}" for speed in self.speed]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data: names, the paired comparison, the ratio of speeds by batch size."""
        return {
            "baseline": self.baseline.variant.name,
            "variant": self.variant.variant.name,
            "versus_baseline": self.versus.model_dump(mode="json") if self.versus else None,
            "overlaps": {
                record.variant.name: [overlap.model_dump(mode="json") for overlap in record.dataset.overlaps]
                for record in (self.baseline, self.variant)
                if record.dataset
            },
            "speed": [
                {
                    "batch_size": speed.batch_size,
                    "ratio": speed.ratio,
                    "ci95": [speed.interval.low, speed.interval.high] if speed.interval else None,
                    "caution": speed.caution,
                }
                for speed in self.speed
            ],
        }


def compare_stored(baseline: Path, variant: Path) -> Comparison:
    """Compare two results by their `record.json` and `predictions.parquet`.

    Raises:
        RecordError: missing, of another schema, failed, or over different images.
    """
    return compare_measured(stored(baseline), stored(variant))


def stored(path: Path) -> tuple[Record, Predictions]:
    """A result by its `record.json` or the folder of it.

    Raises:
        RecordError: missing, of another schema, or failed.
    """
    record = load_record(path)
    if record.failure is not None:
        raise RecordError(f"{path} holds a failed measurement ({record.failure}): there is nothing to compare")
    return record, load_predictions(path if path.is_dir() else path.parent)


def compare_measured(baseline: tuple[Record, Predictions], variant: tuple[Record, Predictions]) -> Comparison:
    """Compare two results, each a record and its predictions.

    Raises:
        RecordError: they are over different images.
    """
    (before, reference), (after, predictions) = baseline, variant
    classes = not (reference.why_no_classes or predictions.why_no_classes)
    require_same_images(reference, predictions)
    versus = compare(before.variant.name, reference, predictions) if classes else None
    ratios = (speed_ratio(before, after, row.batch_size) for row in after.latency)
    return Comparison(before, after, versus, tuple(ratio for ratio in ratios if ratio is not None))


def speed_ratio(baseline: Record, variant: Record, batch_size: int) -> SpeedRatio | None:
    """How many times faster `variant` is at one batch size; None where either was not timed at it.

    Of records that were timed together it is the figure of the run's own table, see `paired_speedup`; so it is where
    `baseline` was measured again and the variant's row is of one of its earlier sessions (`Record.baseline_of`). Of
    others it is the ratio of medians or means, has no interval, and cautions in words, above all where devices differ.
    """
    before, after = (
        next((row for row in record.latency if row.batch_size == batch_size), None) for record in (baseline, variant)
    )
    if before is None or after is None:
        return None
    together = baseline.measured_together is not None and baseline.measured_together == variant.measured_together
    if together and _in_same_rounds(before, after):
        paired = paired_speedup(before, after)
        caution = None if paired.interval else "too few rounds for an interval"
        return SpeedRatio(paired.ratio, paired.interval, batch_size, caution)
    if variant.measured_together in baseline.baseline_of and after.speedup_vs_baseline is not None:
        interval = Interval(*after.speedup_ci95) if after.speedup_ci95 else None
        caution = None if interval else "too few rounds for an interval"
        return SpeedRatio(after.speedup_vs_baseline, interval, batch_size, caution)
    devices = _device(baseline), _device(variant)
    if together:
        caution = "the samples were not kept: no interval"
    elif devices[0] == devices[1]:
        caution = "not timed together: no interval"
    else:
        caution = f"timed on different devices ({devices[0]}; {devices[1]}): no comparison of the variants alone"
    times = (before.mean_ms, after.mean_ms) if before.by_mean or after.by_mean else (before.p50_ms, after.p50_ms)
    return SpeedRatio(times[0] / times[1], None, batch_size, caution)


def sessions(records: Sequence[Record]) -> list[list[Record]]:
    """The timed records by the session that they were measured in; only times of one session compare."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.measured_together is not None and record.latency:
            groups.setdefault(record.measured_together, []).append(record)
    return list(groups.values())


def adjusted_for_all(records: Sequence[Record]) -> list[Record]:
    """The same with p-values and verdicts that allow for how many of them were compared with the baseline."""
    compared = [record.versus_baseline for record in records if record.versus_baseline]
    images = next((record.dataset.images for record in records if record.dataset), 0)
    comparisons = iter(adjusted(compared, images))
    return [r.model_copy(update={"versus_baseline": next(comparisons)}) if r.versus_baseline else r for r in records]


def _in_same_rounds(before: Latency, after: Latency) -> bool:
    counts = len(before.samples_ms), len(after.samples_ms)
    return before.rounds == after.rounds and all(count > 0 and count % before.rounds == 0 for count in counts)


def paired_speedup(baseline: Latency, variant: Latency) -> Speedup:
    """Geometric mean over rounds of baseline median / variant median, of two that were timed together.

    This is what vitopt calls speed-up, everywhere. Where the work of a call depends on its images it is the mean of all
    calls over the mean of all calls. `interval` is None under three rounds.
    """
    before, after = (np.split(np.asarray(row.samples_ms), row.rounds) for row in (baseline, variant))
    return (mean_speedup if baseline.by_mean or variant.by_mean else speedup_interval)(before, after)


def _worth(speed: SpeedRatio) -> str:
    return f" ({speed.interval.low:.2f} to {speed.interval.high:.2f})" if speed.interval else f"; {speed.caution}"


def _device(record: Record) -> str:
    """What calls ran on, in words: two of the same words are one device."""
    facts = record.environment
    if gpu := facts.get("gpu"):
        return f"{gpu['name']} ({facts.get('device')})"
    bound = "bound " if facts.get("threads_bound") else ""
    return f"{facts.get('processor', 'unknown processor')}, {facts.get('torch_threads', '?')} {bound}threads"
