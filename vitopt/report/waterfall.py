"""The waterfall: variants that add one technique at a time."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vitopt.measure.statistics import Speedup
from vitopt.records import Latency, Record
from vitopt.report.timing import latency_at, speedup_between

FEWEST_STEPS = 3


@dataclass(frozen=True)
class Step:
    """One bar: a variant, what it changes in words ("" for the first), and its speed-up over the step before."""

    record: Record
    change: str
    latency: Latency
    speedup: Speedup | None  # None for the first step


def find_chain(records: Sequence[Record], baseline: str | None) -> list[Record]:
    """Variants from the baseline on, in order, each of which changes exactly one thing of the one before.

    The things are format, attention, compilation and skip list, as they ran. A variant that ran exactly as the
    one before it is passed over, the first that changes two things ends the chain. Where fewer than three
    variants follow each other from the baseline, the chain may start at the first variant instead (as when the
    baseline is the last step). Empty where there is none of at least three.
    """
    ran = [record for record in records if record.failure is None]
    starts = [index for index, record in enumerate(ran) if record.variant.name == baseline] + [0]
    for start in starts:
        chain = _chain(ran[start:])
        if len(chain) >= FEWEST_STEPS:
            return chain
    return []


def steps(chain: Sequence[Record], batch_size: int) -> list[Step]:
    """The bars of a chain at one batch size; empty where a variant of it was not timed there."""
    found: list[Step] = []
    for record in chain:
        latency = latency_at(record, batch_size)
        if latency is None:
            return []
        before = found[-1] if found else None
        change = _describe(before.record, record) if before else ""
        found.append(Step(record, change, latency, speedup_between(before.latency, latency) if before else None))
    return found


def chain_words(chain: Sequence[Record]) -> list[str]:
    """Each variant of a chain with what it changes, where its name does not say just that."""
    words = [chain[0].variant.name] if chain else []
    for before, after in itertools.pairwise(chain):
        change, name = _describe(before, after), after.variant.name
        words.append(name if change == name else f"{name} ({change})")
    return words


def _chain(records: Sequence[Record]) -> list[Record]:
    chain = list(records[:1])
    for record in records[1:]:
        changed = _changes(chain[-1], record)
        if len(changed) > 1:
            break
        if changed:
            chain.append(record)
    return chain


def _changes(before: Record, after: Record) -> list[str]:
    old, new = before.variant, after.variant
    differs = {
        "format": old.format != new.format,
        "attention": old.attention_used != new.attention_used,
        "compile": old.compile_used != new.compile_used,
        "skip": old.skip != new.skip,
    }
    found = [name for name, changed in differs.items() if changed]
    # Formats of single layers are no part of the variant's description, only of its layer plan.
    return found or (["layers"] if before.layers != after.layers else [])


def _describe(before: Record, after: Record) -> str:
    new = after.variant
    kept = " ".join(new.skip)
    words = {
        "format": new.format,
        "attention": f"{new.attention_used} attention",
        "compile": "compiled" if new.compile_used else "not compiled",
        "skip": f"{kept} in 16 bit" if kept else "nothing skipped",
        "layers": "other layer formats",
    }
    return words[_changes(before, after)[0]]
