"""Where checkpoints come from: noted beside the weights, carried along, without local paths."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vitopt import __version__
from vitopt.data.images import open_images
from vitopt.errors import CheckpointError
from vitopt.models import hub
from vitopt.models.checkpoint import Checkpoint, open_checkpoint
from vitopt.models.origin import ORIGIN_FILE, Origin, load_origin, note_origin, origin_of
from vitopt.optimize.quantize import quantize
from vitopt.ownership import CARD_FILE
from vitopt.recipe import DataSpec, FinetuneSpec, VariantSpec
from vitopt.training.finetune import finetune


def with_card(folder: Path, metadata: str) -> Checkpoint:
    (folder / CARD_FILE).write_text(f"---\n{metadata}\n---\n# A model\n")
    return open_checkpoint(str(folder))


def test_training_and_quantizing_carry_the_origin_along(
    tiny_checkpoint: Path, copy_of: Callable[[Path], Path], shapes: Path, tmp_path: Path
) -> None:
    source = with_card(copy_of(tiny_checkpoint), "license: apache-2.0\nbase_model: owner/vit")
    spec = FinetuneSpec(epochs=1, batch_size=16, rank=2)
    images = open_images(DataSpec(source=str(shapes)), "train")
    finetune(source, spec, tmp_path / "trained", "cpu", images=images)
    variant = VariantSpec(name="x", format="nf4", skip=("block.1",))
    plan = quantize(open_checkpoint(str(tmp_path / "trained")), variant, tmp_path / "nf4", "cpu")

    found = load_origin(tmp_path / "nf4")
    assert (found.base_model, found.license) == ("owner/vit", "apache-2.0")
    trained, held = found.steps
    assert trained["step"] == "finetune" and trained["vitopt"] == __version__
    assert (trained["method"], trained["rank"], trained["epochs"], trained["images"]) == ("lora", 2, 1, len(images))
    assert (trained["dataset"], trained["dataset_hub_id"], trained["split"]) == ("shapes", None, "train")
    assert (held["format"], held["half"], held["skip"]) == ("nf4", "bf16", ["block.1"])
    assert held["layer_plan"] == plan.counts()
    assert found.last("quantize") == held and found.last("prune") is None
    for folder in ("trained", "nf4"):
        assert str(tmp_path) not in (tmp_path / folder / ORIGIN_FILE).read_text()


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ("base_model: owner/vit", "owner/vit"),
        ("base_model: [owner/vit]", "owner/vit"),
        ("base_model: [owner/vit, owner/deit]", None),
        ("base_model: /home/me/vit", None),
        ("base_model: ../vit", None),
        ("license: mit", None),
        ("base_model: {a: b}", None),
        ("base_model: [", None),
        ("- a list", None),
    ],
)
def test_the_base_of_a_folder_is_what_its_card_names(
    metadata: str, base: str | None, tiny_checkpoint: Path, copy_of: Callable[[Path], Path]
) -> None:
    assert origin_of(with_card(copy_of(tiny_checkpoint), metadata)).base_model == base


def test_a_base_that_is_a_folder_here_is_no_hub_id(
    tiny_checkpoint: Path, copy_of: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "trained").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert origin_of(with_card(copy_of(tiny_checkpoint), "base_model: out/trained")).base_model is None


def test_a_folder_without_a_card_and_random_weights_have_no_origin(tiny_checkpoint: Path) -> None:
    assert origin_of(open_checkpoint(str(tiny_checkpoint))) == Origin()
    assert origin_of(open_checkpoint("random:vit-tiny-patch16-224")) == Origin()


def test_a_hub_model_is_its_own_base_and_its_card_states_the_licence(
    tiny_checkpoint: Path, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(tiny_checkpoint)
    local = with_card(folder, "license: mit\nbase_model: owner/older")
    on_hub = replace(local, source="owner/vit", location="owner/vit", weights=(), revision="c0ffee")
    asked = []

    def fetch(source: str, name: str, revision: str) -> Path:
        asked.append((source, name, revision))
        return folder / name

    monkeypatch.setattr(hub, "fetch", fetch)
    assert origin_of(on_hub) == Origin("owner/vit", "c0ffee", "mit")
    assert asked == [("owner/vit", "README.md", "c0ffee")]

    def refuse(*_: str) -> Path:
        raise CheckpointError("the hub refuses")

    for answer in (refuse, lambda *_: None):
        monkeypatch.setattr(hub, "fetch", answer)
        assert origin_of(on_hub) == Origin("owner/vit", "c0ffee")


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "other/1"}', '{"schema": "vitopt.origin/1", "steps": 1}'])
def test_a_damaged_note_is_named(content: str, tiny_checkpoint: Path, copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(tiny_checkpoint)
    (folder / ORIGIN_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"origin\.json cannot be read"):
        note_origin(open_checkpoint(str(folder)), folder, "quantize")
