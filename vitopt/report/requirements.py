"""What was required of a variant, in words."""

from vitopt.records import Requirement

DECISIONS = {"shown": "met", "failed": "missed", "undecided": "not shown"}
_WORDS = {
    "max_top1_drop": ("loss of top-1 at most", "points"),
    "min_agreement": ("agreement at least", "%"),
    "max_kl": ("KL divergence at most", "nats"),
    "max_kl_share": ("share of KL at most", ""),
    "min_speedup": ("speed-up at least", "x"),
    "max_p99_ms": ("p99 at most", "ms"),
    "max_megabytes": ("weights at most", "MB"),
}


def asked(name: str, limit: float) -> str:
    """A requirement: as in `p99 at most 20 ms`."""
    floor, _, key = name.rpartition(".")
    words, unit = _WORDS[key]
    figure = f"{_figure(limit)}{'' if unit == 'x' else ' '}{unit}".rstrip()
    return f"{'floor of skip: auto: ' if floor else ''}{words} {figure}"


def requirement_parts(requirement: Requirement) -> tuple[str, str]:
    """What was asked, and what was found: the figure, its 95 % interval, and the decision with its reason."""
    required = asked(requirement.name, requirement.limit)
    required += f" at batch {requirement.batch_size}" if requirement.batch_size else ""
    low, high = requirement.ci95 or (None, None)
    interval = f" ({_figure(low)} to {_figure(high)})" if low != high else ""
    measured = "" if requirement.measured is None else f"{_figure(requirement.measured)}{interval}, "
    reason = f": {requirement.reason}" if requirement.reason else ""
    return required, f"{measured}{DECISIONS[requirement.decision]}{reason}"


def requirement_sentence(requirement: Requirement) -> str:
    """The same on one line."""
    return ": ".join(requirement_parts(requirement))


def _figure(value: float | None) -> str:
    # Four digits tell a limit of an interval from the limit that it misses.
    return "–" if value is None else f"{value:.4g}"
