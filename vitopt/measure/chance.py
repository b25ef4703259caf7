"""Whether an accuracy is that of guessing: then labels and model do not belong together, and no figure is valid."""

from vitopt.measure.intervals import wilson_interval

# Chance-corrected accuracy below which a classifier is of no use; a working one is far above it.
_USELESS = 0.1


def is_guessing(right: int, images: int, classes: int) -> bool:
    """Whether `right` of `images` shows that a head of `classes` outputs does no better than guess.

    Accuracy p is corrected for chance, (p - 1/classes) / (1 - 1/classes) (Brennan and Prediger 1981,
    doi 10.1177/001316448104100307), and its 95 % Wilson interval decides: it holds 0, or lies below it, and nothing
    above 0.1. With few images the interval is wide and nothing is shown.
    """
    chance = 1 / classes
    interval = wilson_interval(right, images)
    return interval.low <= chance and interval.high <= chance + _USELESS * (1 - chance)


def explain_guessing(name: str, right: int, images: int, classes: int) -> str:
    """One line that names the likely causes."""
    return (
        f"{name} is right on {right} of {images} images, no better than guessing among {classes} classes: its labels "
        "may count in another order than the head's outputs, the images may be another data set's, or the head is "
        "untrained"
    )
