"""How a variant is held and how it ran, in words."""

from vitopt.formats import QUANTIZED_FORMATS
from vitopt.records import Record, Variant

_SCHEDULES = ("merge_tokens", "prune_tokens")  # whose values alone say nothing


def describe_format(record: Record) -> str:
    """Format, with the skip list and other exceptions where there are any."""
    variant = record.variant
    kept = f", {' '.join(variant.skip)} in 16 bit" if variant.skip else ""
    others = "".join(f", {pattern} {format}" for pattern, format in variant.layers.items())
    # What is excepted is so on disk: packed layers and those in 16 bit may run alike once they are expanded.
    if (stored := stored_as(variant)) is not None:
        return f"{variant.format} (stored as {stored}{kept}{others})"
    return f"{variant.format}{kept}{others}"


def kept_layers(record: Record) -> dict[str, list[str]]:
    """Format -> layers that are not in the quantized format of most, a whole block by its name; empty without one."""
    counts = {format: count for format, count in record.layer_plan.items() if format in QUANTIZED_FORMATS}
    most = max(counts, key=lambda format: counts[format], default=None)
    block = {name: name.rpartition(".")[0] or name for name in record.layers}
    formats = {whole: {record.layers[name] for name in block if block[name] == whole} for whole in block.values()}
    kept: dict[str, dict[str, None]] = {}
    for name, format in record.layers.items():
        if most is not None and format != most:
            kept.setdefault(format, {})[block[name] if formats[block[name]] == {format} else name] = None
    return {format: list(names) for format, names in kept.items()}


def stored_as(variant: Variant) -> str | None:
    """Format on disk where another one ran, else None."""
    return None if variant.stored_format == variant.format else variant.stored_format


def expansion(variant: Variant) -> str:
    """What loading made of the format on disk, where another one ran: `expanded to bf16`."""
    return f"{'expanded to' if variant.stored_format in QUANTIZED_FORMATS else 'run as'} {variant.format}"


def describe_run(record: Record) -> str | None:
    """How a variant ran: what its options were set to, what was asked for where that differs, then what was on."""
    variant = record.variant
    if not variant.ran:
        return None
    choices = [
        f"{option_words(option)} {value}" if option in _SCHEDULES else value
        for option, value in variant.ran.items()
        if isinstance(value, str)
    ]
    missing = [str(variant.asked[option]) for option in variant.asked if _fell_back(variant, option)]
    text = " ".join(choices) + (f" (not {', '.join(missing)})" if missing else "")
    return " + ".join(filter(None, [text, *switched_on(variant)])) + _first_pass(record)


def _first_pass(record: Record) -> str:
    """What is different about the first pass of an adaptive variant, to be put behind how the second ran."""
    if (routing := record.routing) is None:
        return ""
    first, second = routing.first, record.model
    differs = [] if second and first.architecture == second.architecture else [first.architecture]
    if second is None or first.image_size != second.image_size:
        differs.append(f"{' x '.join(map(str, first.image_size))} px")
    for option, value in routing.first_ran.items():
        if value is not None:
            differs.append(option_words(option) if value is True else f"{option_words(option)} {value or 'off'}")
    return f"; first pass: {', '.join(differs) or 'another checkpoint'}"


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
