"""Whatever makes one checkpoint of another is called in the same way and notes the images that it used."""

import functools
from pathlib import Path
from typing import Any

import pytest

from vitopt.data.images import ImageSet, open_images
from vitopt.errors import StorageError
from vitopt.models.calibration import Use, load_uses, save_uses
from vitopt.models.checkpoint import open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.recipe import DataSpec, FinetuneSpec, VariantSpec
from vitopt.training.finetune import finetune
from vitopt.transformation import Transformation, note_images

WAYS = {
    "finetune": (finetune, FinetuneSpec(epochs=1, rank=2, precision="fp32"), "training"),
    "quantize": (quantize, VariantSpec(name="v", format="nf4", skip=["block.1"]), "skip list"),
    "quantize to the fastest": (
        functools.partial(quantize, purpose="format"),
        VariantSpec(name="v", format="nf4"),
        "format",
    ),
}
EARLIER = Use("training", "photos", "train", ("aa", "bb"))


@pytest.fixture
def few(shapes: Path) -> ImageSet:
    return open_images(DataSpec(source=str(shapes), limit=8), "train")


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_are_called_alike(
    way: str, tiny_checkpoint: Path, few: ImageSet, copy_of: Any, tmp_path: Path
) -> None:
    made: tuple[Transformation[Any], Any, str] = WAYS[way]
    transformation, spec, purpose = made
    source, output = copy_of(tiny_checkpoint), tmp_path / "out"
    save_uses([EARLIER], source)
    outcome = transformation(open_checkpoint(str(source)), spec, output, "cpu", images=few)
    assert outcome.summary() and "\n" not in outcome.summary()
    assert open_checkpoint(str(output)).label_names == open_checkpoint(str(source)).label_names
    earlier, noted = load_uses(output)
    assert earlier == EARLIER
    assert (noted.purpose, noted.dataset, noted.split) == (purpose, few.name, "train")
    assert (noted.images, noted.image_sha256) == (few.ids, few.image_hashes)

    (output / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt"):
        transformation(open_checkpoint(str(source)), spec, output, "cpu", images=few)
    with pytest.raises(StorageError, match="input"):
        transformation(open_checkpoint(str(source)), spec, source, "cpu", images=few)


def test_without_images_a_checkpoint_has_seen_what_its_source_has(
    tiny_checkpoint: Path, copy_of: Any, tmp_path: Path
) -> None:
    source = copy_of(tiny_checkpoint)
    output = tmp_path / "out"
    output.mkdir()
    note_images(open_checkpoint(str(source)), None, "format", output)
    assert list(output.iterdir()) == []
    save_uses([EARLIER], source)
    note_images(open_checkpoint(str(source)), None, "format", output)
    assert load_uses(output) == (EARLIER,)
