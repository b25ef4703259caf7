"""What a checkpoint has seen, kept beside it."""

import json
from pathlib import Path

import pytest
from conftest import calibration_hashes

from vitopt.errors import CheckpointError
from vitopt.models.calibration import CALIBRATION_FILE, Use, load_uses, save_uses
from vitopt.models.checkpoint import open_checkpoint
from vitopt.optimize.quantize import quantize
from vitopt.recipe import VariantSpec

TRAINED = Use("training", "photos", "train", ("aa", "bb"), ("x.jpg", "y.jpg"), ("0" * 16, None))
CHOSEN = Use("skip list", "others", None, ("bb", "cc"))


def test_uses_are_read_back_as_they_were(tmp_path: Path) -> None:
    save_uses([TRAINED, CHOSEN], tmp_path)
    assert load_uses(tmp_path) == (TRAINED, CHOSEN)
    assert calibration_hashes(tmp_path) == {"aa", "bb", "cc"}


def test_a_checkpoint_of_which_nothing_is_known_has_seen_nothing(tmp_path: Path) -> None:
    save_uses([], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert load_uses(tmp_path) == load_uses(None) == ()
    assert calibration_hashes(tmp_path) == set()


def test_one_use_may_stand_alone(tmp_path: Path) -> None:
    alone = {"schema": "vitopt.calibration/1", "purpose": "skip list", "dataset": "d", "split": None}
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(alone | {"image_sha256": ["aa"]}))
    assert load_uses(tmp_path) == (Use("skip list", "d", None, ("aa",)),)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"schema": "vitopt.calibration/9"}', '{"schema": "vitopt.calibration/1", "purpose": "x"}'],
)
def test_a_file_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=CALIBRATION_FILE):
        load_uses(tmp_path)


def test_what_a_checkpoint_has_seen_goes_with_it_into_another_format(tiny_checkpoint: Path, copy_of, tmp_path) -> None:
    folder = copy_of(tiny_checkpoint)
    save_uses([TRAINED], folder)
    quantize(open_checkpoint(str(folder)), VariantSpec(name="b", format="bf16"), tmp_path / "bf16")
    assert load_uses(tmp_path / "bf16") == (TRAINED,)
