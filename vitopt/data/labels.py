"""Labels: what the classes of a data set are called, and which output of a head each of them is."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vitopt.errors import DataError

if TYPE_CHECKING:
    from vitopt.data.images import ImageSet

_MOST_DIGITS = 18  # longer numbers are taken as words: no head has so many outputs
_SAY_INDEX = "--labels index (in a recipe `labels: index` under `data`)"


def classes_of(labels: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Each label as an index of the class names, and these in order: numbers by value, words by name."""
    numeric = all(map(_is_number, labels))
    names = tuple(sorted(set(labels), key=lambda name: (int(name) if numeric else 0, name)))
    index = {name: position for position, name in enumerate(names)}
    return [index[label] for label in labels], names


def _is_number(label: str) -> bool:
    return label.isdecimal() and len(label) <= _MOST_DIGITS


def as_indices(images: "ImageSet") -> "ImageSet":
    """Take the class names for numbers that count a head's outputs from 0.

    Raises:
        DataError: one is not a number.
    """
    names = images.class_names
    if names is None:
        return images
    words = [names[label] for label in sorted(set(images.labels)) if not _is_number(names[label])]
    if words:
        raise DataError(
            f"{images.name} has the label {words[0]!r}, and --labels index (`labels: index`) says that labels are "
            "numbers: leave that out if they are names of classes"
        )
    return replace(images, labels=tuple(int(names[label]) for label in images.labels), class_names=None)


def fit_labels(images: "ImageSet", label_names: Sequence[str]) -> "ImageSet":
    """Express the labels as indices of a head with outputs `label_names`.

    A class is the output of exactly its name, else the only one whose name differs in case, spaces, `_` and `-`
    alone. A head with placeholder names (`LABEL_0`) of the same count takes the classes by position; labels that
    are indices already (`class_names` None) are taken as they are. Only classes that have images matter.

    Raises:
        DataError: the labels do not fit or fit more than one output; the message names the first.
    """
    if images.class_names is None:
        highest = max(images.used_labels, default=0)
        if highest >= len(label_names):
            raise DataError(
                f"{images.name} has label {highest}, but the model's head has {len(label_names)} classes "
                f"(0 to {len(label_names) - 1}): use a model trained for these labels, or fine-tune one"
            )
        return replace(images, class_names=tuple(label_names))
    outputs = _outputs(images, images.class_names, label_names)
    if images.label_sets is not None:
        sets = tuple(frozenset(outputs[label] for label in labels) for labels in images.label_sets)
        return replace(images, label_sets=sets, class_names=tuple(label_names))
    return replace(images, labels=tuple(outputs[label] for label in images.labels), class_names=tuple(label_names))


def _outputs(images: "ImageSet", names: Sequence[str], head: Sequence[str]) -> dict[int, int]:
    exact, folded = _places(head), _places(map(_fold, head))
    fitting = {label: exact.get(names[label]) or folded.get(_fold(names[label]), []) for label in images.used_labels}
    unknown = [names[label] for label, outputs in fitting.items() if not outputs]
    if unknown and len(head) == len(names) and all(name.startswith("LABEL_") for name in head):
        return {label: label for label in fitting}
    if unknown:
        raise DataError(_explain_unknown(images.name, unknown[0], names, head))
    class_of: dict[int, str] = {}
    for label, outputs in fitting.items():
        if len(outputs) > 1:
            raise DataError(_explain_ambiguous(images.name, names[label], outputs, head))
        if (other := class_of.setdefault(outputs[0], names[label])) != names[label]:
            raise DataError(
                f"{images.name}: the classes {other!r} and {names[label]!r} are both the head's output {outputs[0]}, "
                f"{head[outputs[0]]!r}: give their images one name, or fine-tune the model on these classes"
            )
    return {label: outputs[0] for label, outputs in fitting.items()}


def _places(names: Iterable[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        places.setdefault(name, []).append(index)
    return places


def _fold(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def _explain_unknown(source: str, name: str, names: Sequence[str], head: Sequence[str]) -> str:
    if all(map(str.isdecimal, names)) and not all(map(str.isdecimal, head)):
        return (
            f"{source} has numbers as labels, first {name!r}, and the model's head ({len(head)} classes: "
            f"{', '.join(head[:3])}, ...) does not call its classes so: if they count the head's outputs from 0, "
            f"say so with {_SAY_INDEX}; otherwise fine-tune the model on these classes first"
        )
    return (
        f"{source} has the class {name!r}, which the model's head does not know "
        f"({len(head)} classes: {', '.join(head[:3])}, ...): name the class folders as the model does, "
        "or fine-tune the model on these classes first"
    )


def _explain_ambiguous(source: str, name: str, outputs: Sequence[int], head: Sequence[str]) -> str:
    spelt = [head[output] for output in outputs]
    fits = " and ".join(f"{output} ({head[output]!r})" for output in outputs)
    distinct = len(set(spelt)) == len(spelt)
    remedy = "spell it exactly as one of them" if distinct else f"label by the numbers of the outputs and {_SAY_INDEX}"
    return f"{source}: the class {name!r} fits several outputs of the model's head, {fits}: {remedy}"
