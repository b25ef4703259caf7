"""Which images of a data set without splits are held out for testing."""

from collections.abc import Sequence


def held_out(labels: Sequence[int], groups: Sequence[str] | None, share: float) -> list[bool]:
    """Whether each image is held out: at most `share` of each class, evenly spread over it, and only whole groups.

    A group of several classes counts for the class of its first image. Without groups each image is on its own.
    """
    members: dict[str, list[int]] = {}
    for index in range(len(labels)):
        members.setdefault(groups[index] if groups else str(index), []).append(index)
    testing = [False] * len(labels)
    seen: dict[int, int] = {}
    taken: dict[int, int] = {}
    for images in members.values():
        label = labels[images[0]]
        seen[label] = seen.get(label, 0) + len(images)
        if taken.get(label, 0) + len(images) <= int(seen[label] * share):
            taken[label] = taken.get(label, 0) + len(images)
            for index in images:
                testing[index] = True
    return testing
