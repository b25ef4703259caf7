"""What the device allows: the rates that floor and utilisation are held against, in words."""

from collections.abc import Sequence

from vitopt.records import Record

TITLE = "What the device allows"


def facts(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Name and text of the device's rates, and the model's arithmetic; empty where no rate is known."""
    measured = [record.roofline for record in records if record.roofline]
    if not measured:
        return []
    formats = dict.fromkeys(rates.gemm_format for rates in measured)
    products = {f: [rates.gemm_flops_per_second for rates in measured if rates.gemm_format == f] for f in formats}
    copies = [rates.copy_bytes_per_second for rates in measured]
    lines = [
        ("matrix rate", ", ".join(f"{_span(rates, 'FLOP/s')} in {format}" for format, rates in products.items())),
        ("copy rate", f"{_span(copies, 'B/s')}, bytes read and bytes written"),
    ]
    models = [record.model for record in records if record.model]
    if images := [model.flops_per_image for model in models if model.flops_per_image]:
        lines.append(
            ("one image", f"{_span(images, 'FLOP')} in matrix products and convolutions, a multiply-add counted as two")
        )
    return lines


def _span(values: Sequence[float], unit: str) -> str:
    """One value, or the lowest and the highest where they differ: as in `712 TFLOP/s`, `35.1 GFLOP`, `4.10 TB/s`."""
    return " to ".join(dict.fromkeys(f"{_figure(value)}{unit}" for value in (min(values), max(values))))


def _figure(value: float) -> str:
    """Three digits, or all before the point, and the prefix of the unit."""
    prefix, size = next((pair for pair in (("T", 1e12), ("G", 1e9)) if value >= pair[1]), ("M", 1e6))
    value /= size
    return f"{value:,.0f} {prefix}" if value >= 99.95 else f"{value:.{1 if value >= 9.995 else 2}f} {prefix}"
