"""One colour per format, the same in plots, strips and legends."""

# After Okabe and Ito ("Color universal design", 2008): told apart by colour-blind readers. Blue and orange are
# shifted a little so that all of them stand out from a white and from a near-black page alike.
FORMAT_COLOURS = {
    "fp32": "#8b949e",
    "fp16": "#56b4e9",
    "bf16": "#3381c4",
    "nf4": "#d55e00",
    "int4": "#a8672f",
    "int8": "#009e73",
    "w8a8": "#cc79a7",
    "fp8": "#d99a00",
}
OTHER_COLOUR = "#a08060"


def colour_of(format: str) -> str:
    """Hex colour of a format."""
    return FORMAT_COLOURS.get(format, OTHER_COLOUR)
