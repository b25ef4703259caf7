"""Results that show themselves as the comparison table, in a notebook and elsewhere."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from vitopt.measure.claims import Decision
from vitopt.measure.comparison import Comparison
from vitopt.measure.predictions import Predictions
from vitopt.records import Record
from vitopt.report.table import batch_sizes, comparison, markdown, notes


class _Shown:
    def _rows(self) -> tuple[Record, ...]:
        raise NotImplementedError

    def _lines(self) -> list[str]:
        return notes(self._rows())

    def _repr_markdown_(self) -> str:
        tables = [comparison(self._rows(), size) for size in batch_sizes(self._rows()) or (None,)]
        parts = [f"{table.caption}\n\n{markdown(table)}" for table in tables]
        return "\n\n".join([*parts, "\n".join(f"- {line}" for line in self._lines())])

    __repr__ = _repr_markdown_


@dataclass(frozen=True, repr=False)
class Result(_Shown):
    """What was measured of one model: its record and, where there were images, its outputs for each."""

    record: Record
    predictions: Predictions | None

    def _rows(self) -> tuple[Record, ...]:
        return (self.record,)


class Results(_Shown, Mapping[str, Result]):
    """Results of models that were measured together, by name."""

    def __init__(self, results: Iterable[Result]):
        self._results = {result.record.variant.name: result for result in results}

    def __getitem__(self, name: str) -> Result:
        return self._results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def _rows(self) -> tuple[Record, ...]:
        return tuple(result.record for result in self._results.values())


@dataclass(frozen=True, repr=False)
class Compared(_Shown):
    """A result against a baseline's; `decision` on what was required, None where nothing was."""

    comparison: Comparison
    record: Record  # with this comparison and what was required
    decision: Decision | None

    def _rows(self) -> tuple[Record, ...]:
        return self.comparison.baseline, self.record

    def _lines(self) -> list[str]:
        return [*self.comparison.lines(), *notes((self.record,))]
