"""The waterfall: variants that add one technique at a time."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vitopt.measure.statistics import Speedup
from vitopt.records import Latency, Record, Variant
from vitopt.report.summary import listed
from vitopt.report.table import batch_sizes, expansion, kernel_chosen, milliseconds, stored_as
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

    The things are format, attention, its kernel, fused projections, memory layout, compilation and skip list, as
    they ran. A variant that ran exactly as the one before it is passed over, the first that changes two things ends
    the chain. Where fewer than three variants follow each other from the baseline, the chain may start at the first
    variant instead (as when the baseline is the last step). Empty where there is none of at least three.
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
        change = _changes(before.record, record)[0] if before else ""
        found.append(Step(record, change, latency, speedup_between(before.latency, latency) if before else None))
    return found


def chain_words(chain: Sequence[Record]) -> list[str]:
    """Each variant of a chain with what it changes, where its name does not say just that."""
    words = [chain[0].variant.name] if chain else []
    for before, after in itertools.pairwise(chain):
        change, name = _changes(before, after)[0], after.variant.name
        words.append(name if says(name, change) else f"{name} ({change})")
    return words


def says(name: str, change: str) -> bool:
    """Whether the name of a variant alone tells what it changes."""
    return name.replace("-", " ").replace("_", " ") == change


def floor_words(chain: Sequence[Record]) -> str:
    """How far the last step of a chain is from its floor at each batch size; "" where no floor is known."""
    last = [found[-1].latency for size in batch_sizes(chain) if (found := steps(chain, size))]
    known = [(latency, latency.floor_ms) for latency in last if latency.floor_ms]
    parts = [
        f"{latency.p50_ms / floor:.1f} times {'its floor ' if number == 0 else ''}at batch {latency.batch_size} "
        f"({milliseconds(floor)} ms)"
        for number, (latency, floor) in enumerate(known)
    ]
    return f"{chain[-1].variant.name} takes {listed(parts)}." if parts else ""


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
    """What differs between how the two ran, in words: what the second has that the first has not."""
    old, new = before.variant, after.variant
    found = []
    if (old.format, stored_as(old)) != (new.format, stored_as(new)):
        found.append(_format_words(old, new))
    if old.attention_used != new.attention_used:
        chosen = kernel_chosen(new)
        found.append(f"{new.attention_used} {'' if chosen == 'auto' else f'{chosen} '}attention")
    elif _other_kernel(old, new):
        chosen = kernel_chosen(new)
        found.append("the kernel that torch chooses" if chosen == "auto" else f"{chosen} kernel")
    if old.fused_attentions != new.fused_attentions:
        found.append("fused qkv" if new.fused_attentions else "qkv not fused")
    if old.channels_last != new.channels_last:
        found.append("channels last" if new.channels_last else "not channels last")
    if _compiler(old) != _compiler(new):
        found.append(_compiler_words(old, new))
    if old.skip != new.skip:
        found.append(f"{' '.join(new.skip)} in 16 bit" if new.skip else "nothing skipped")
    # Formats of single layers are no part of the variant's description, only of its layer plan.
    return found or (["other layer formats"] if before.layers != after.layers else [])


def _format_words(old: Variant, new: Variant) -> str:
    before, now = stored_as(old) or old.format, stored_as(new) or new.format  # on disk
    if old.format == new.format:
        return f"stored as {now}"
    if stored_as(new) is None:
        return new.format
    return expansion(new) if before == now else f"{now} {expansion(new)}"


def _other_kernel(old: Variant, new: Variant) -> bool:
    """Whether another kernel was demanded, unless both are known to have run the same.

    A compiler may choose a kernel of its own, and a replayed CUDA graph shows other names: what a profile
    recognised does not tell two variants apart.
    """
    same = old.sdpa_kernel_used is not None and old.sdpa_kernel_used == new.sdpa_kernel_used
    return kernel_chosen(old) != kernel_chosen(new) and not same


def _compiler(variant: Variant) -> tuple[bool, bool]:
    return variant.compile_used, variant.compile_used and variant.autotune


def _compiler_words(old: Variant, new: Variant) -> str:
    if not new.compile_used:
        return "not compiled"
    if not old.compile_used:
        return "compiled, autotuned" if new.autotune else "compiled"
    return "autotuned" if new.autotune else "not autotuned"
