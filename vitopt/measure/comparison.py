"""Two stored results compared, whatever runs they come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitopt.errors import RecordError
from vitopt.measure.accuracy import compare
from vitopt.measure.predictions import load_predictions
from vitopt.records import Record, VersusBaseline, load_record


@dataclass(frozen=True)
class Comparison:
    """A variant's record against another's, over the same images."""

    baseline: Record
    variant: Record
    versus: VersusBaseline
    latency_ratios: dict[int, float]  # batch size -> baseline's p50 over the variant's

    @property
    def records(self) -> tuple[Record, Record]:
        """Both records, the variant's with this comparison in place of the one that was stored."""
        return self.baseline, self.variant.model_copy(update={"versus_baseline": self.versus})

    def lines(self) -> list[str]:
        """What the numbers say beyond the table."""
        versus = self.versus
        lines = [
            f"{versus.right_to_wrong} images turned wrong, {versus.wrong_to_right} turned right "
            f"(McNemar's exact p = {versus.mcnemar_p:.3g}); mean KL divergence {versus.mean_kl_divergence:.4f} nats"
        ]
        lines += [
            f"batch {size}: {ratio:.2f}x the speed; the two were not interleaved, so no interval can be given"
            for size, ratio in self.latency_ratios.items()
        ]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data: names, the paired comparison, latency ratios by batch size."""
        return {
            "baseline": self.baseline.variant.name,
            "variant": self.variant.variant.name,
            "versus_baseline": self.versus.model_dump(mode="json"),
            "overlaps": {
                record.variant.name: [overlap.model_dump(mode="json") for overlap in record.dataset.overlaps]
                for record in (self.baseline, self.variant)
                if record.dataset
            },
            "latency_ratios_not_interleaved": {str(size): ratio for size, ratio in self.latency_ratios.items()},
        }


def compare_stored(baseline: Path, variant: Path) -> Comparison:
    """Compare two results by their `record.json` and `predictions.parquet`.

    Raises:
        RecordError: missing, of another schema, failed, or over different images.
    """
    records = {path: load_record(path) for path in (baseline, variant)}
    for path, record in records.items():
        if record.failure is not None:
            raise RecordError(f"{path} holds a failed measurement ({record.failure}): there is nothing to compare")
    predictions = [load_predictions(path if path.is_dir() else path.parent) for path in (baseline, variant)]
    versus = compare(records[baseline].variant.name, predictions[0], predictions[1])
    theirs = {row.batch_size: row.p50_ms for row in records[baseline].latency}
    ratios = {
        row.batch_size: theirs[row.batch_size] / row.p50_ms
        for row in records[variant].latency
        if row.batch_size in theirs
    }
    return Comparison(records[baseline], records[variant], versus, ratios)
