"""What the device allows: the rates that floor and utilisation are held against, in words."""

from collections.abc import Callable, Sequence

from vitopt.records import Record

TITLE = "What the device allows"


def facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Name and text of the device's rates, and the model's arithmetic; empty where no rate is known."""
    by_format: dict[str, list[float]] = {}
    copies = []
    for one in (record.roofline for record in records if record.roofline):
        by_format.setdefault(one.gemm_format, []).append(one.gemm_flops_per_second)
        copies.append(one.copy_bytes_per_second)
    if not copies:
        return []
    products = ", ".join(f"{_span(found, _flops)}/s in {format}" for format, found in by_format.items())
    copy = _span(copies, lambda rate: f"{_figure(rate / 1e9)} GB")
    images = [record.model.flops_per_image for record in records if record.model and record.model.flops_per_image]
    found = [("matrix rate", products), ("copy rate", f"{copy}/s, bytes read and bytes written")]
    if images:
        arithmetic = f"{_span(images, _flops)} in matrix products and convolutions, a multiply-add counted as two"
        found.append(("one image", arithmetic))
    return found


def _span(values: Sequence[float], words: Callable[[float], str]) -> str:
    """One value in words, or the lowest and the highest where they differ."""
    return " to ".join(dict.fromkeys([words(min(values)), words(max(values))]))


def _flops(count: float) -> str:
    """As in `712 TFLOP`, `35.1 GFLOP`, `4.20 MFLOP`."""
    unit, size = next((pair for pair in (("T", 1e12), ("G", 1e9)) if count >= pair[1]), ("M", 1e6))
    return f"{_figure(count / size)} {unit}FLOP"


def _figure(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
