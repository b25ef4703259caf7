"""How many of the tested images a checkpoint has seen before, and how many are tested twice."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from vitopt.data.duplicates import look_alikes, perceptual_hashes
from vitopt.data.images import ImageSet
from vitopt.models.calibration import TRAINING, Use
from vitopt.records import Overlap

TEST = "test"
_EXAMPLES = 5


@dataclass(frozen=True)
class HashedImages:
    """The tested images by what identifies them: their contents and how they look."""

    ids: tuple[str, ...]
    image_sha256: tuple[str, ...]
    image_phash: tuple[str | None, ...]

    @classmethod
    def of(cls, images: ImageSet, look: bool = True) -> "HashedImages":
        """Hash the images; to `look` at them each is decoded once more, JPEG files at a fraction of their size."""
        return cls(images.ids, images.image_hashes, perceptual_hashes(images) if look else ())

    def overlaps(self, uses: Sequence[Use]) -> tuple[Overlap, ...]:
        """Where tested images are met again: among themselves, then in each use; uses without any are left out."""
        overlaps = [self._among_themselves, *map(self._with, uses)]
        return tuple(overlap for overlap in overlaps if overlap.same or overlap.alike)

    @functools.cached_property
    def _among_themselves(self) -> Overlap:
        positions: dict[str, list[int]] = {}
        for index, content in enumerate(self.image_sha256):
            positions.setdefault(content, []).append(index)
        # Each copy goes with the next, the last with the first.
        copies = {
            here: there
            for same in positions.values()
            if len(same) > 1
            for here, there in zip(same, same[1:] + same[:1], strict=True)
        }
        alike = look_alikes(self.image_phash, self.image_phash, same_set=True)
        return self._overlap(TEST, copies, alike, self.ids)

    def _with(self, use: Use) -> Overlap:
        positions = {content: index for index, content in enumerate(use.image_sha256)}
        copies = {index: positions[content] for index, content in enumerate(self.image_sha256) if content in positions}
        return self._overlap(
            use.purpose, copies, look_alikes(self.image_phash, use.image_phash), use.images, bool(use.image_phash)
        )

    def _overlap(
        self, where: str, copies: dict[int, int], alike: dict[int, int], names: Sequence[str], looked: bool = True
    ) -> Overlap:
        others = {index: position for index, position in alike.items() if index not in copies}
        examples = [
            f"{self.ids[index]} {relation} {names[position] if names else 'one of them'}"
            for relation, pairs in (("is", copies), ("looks like", others))
            for index, position in list(pairs.items())[:_EXAMPLES]
        ]
        return Overlap(
            where=where,
            same=len(copies),
            alike=len(others) if looked and self.image_phash else None,
            examples=tuple(examples),
        )


def warning(overlap: Overlap, images: int) -> str:
    """One sentence for the record of a checkpoint that was tested on `images` images."""
    counts = [f"{overlap.same:,}"] if overlap.same else []
    counts += [f"{overlap.alike:,} look-alike{'s' if overlap.alike != 1 else ''}"] if overlap.alike else []
    which = f"{' and '.join(counts)} of {images:,} tested images"
    if overlap.where == TEST:
        harm = "are tested more than once, so the intervals are narrower than they should be"
    elif overlap.where == TRAINING:
        harm = "are training images of this checkpoint, so its accuracy looks better than it is"
    else:
        harm = f"were used to choose the {overlap.where} of this checkpoint, so it looks better than it is"
    return f"{which} {harm} (first: {overlap.examples[0]})"
