"""Checkpoints are pushed whole and alone, to a stand-in for the hub that keeps what it gets."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_stand_in import REPOSITORY, Hub
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForImageClassification

from vitopt.errors import CheckpointError, RecipeError, StorageError
from vitopt.models.activations import ACTIVATIONS_FILE, LayerInputs, save_activations
from vitopt.models.checkpoint import open_checkpoint
from vitopt.models.publish import push
from vitopt.optimize.quantize import quantize
from vitopt.ownership import CARD_FILE
from vitopt.recipe import VariantSpec
from vitopt.report.card import write_card_without_figures


@pytest.fixture(scope="module")
def quantized(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint with its card, beside other things that lie in its folder."""
    folder = tmp_path_factory.mktemp("push") / "nf4"
    quantize(open_checkpoint(str(tiny_checkpoint)), VariantSpec(name="x", format="nf4"), folder, "cpu")
    observed = LayerInputs(torch.zeros(2, 64), torch.ones(2, 64), {"w8a8": 0.001})
    save_activations({"block.0.fc1": observed}, folder)  # without it the option `static_scales` is lost
    write_card_without_figures(folder)
    for name in ("record.json", "predictions.parquet", "calibration.json", "pytorch_model.bin", "notes.txt", ".env"):
        (folder / name).write_text(f"{folder}: mine alone")
    return folder


def test_what_arrives_is_the_checkpoint_and_nothing_else(quantized: Path, hub: Hub, tmp_path: Path) -> None:
    address = push(open_checkpoint(str(quantized)), REPOSITORY)

    assert address == f"{hub.address}/{REPOSITORY}/commit/{'a' * 40}"
    assert hub.private is True and hub.tokens == {"Bearer hf_secret"}
    files = hub.branches["main"]
    same = {"config.json", "model.safetensors", "preprocessor_config.json", "origin.json", ACTIVATIONS_FILE}
    assert set(files) == same | {CARD_FILE}
    for name in same:
        assert files[name] == (quantized / name).read_bytes()
    for content in files.values():
        assert str(quantized.parent).encode() not in content
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert card.data.library_name == "transformers"
    assert f'pipeline("image-classification", "{REPOSITORY}")' in card.text
    assert f"vitopt evaluate {REPOSITORY} " in card.text and "FOLDER" not in card.text and "<!--" not in card.text
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.quantization_config.quant_method == "bitsandbytes"


def test_a_public_branch_of_a_repository_that_is_there(
    tiny_checkpoint: Path, copy_of: Callable[[Path], Path], hub: Hub
) -> None:
    folder = copy_of(tiny_checkpoint)
    hub.private, hub.branches = False, {"main": {"model.safetensors": b"older"}}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": str(folder)}))
    (folder / CARD_FILE).write_text("# Mine\n\nNot vitopt's: FOLDER stays.\n")

    push(open_checkpoint(str(folder)), REPOSITORY, private=False, revision="small")

    assert hub.branches["main"] == {"model.safetensors": b"older"}
    files = hub.branches["small"]
    assert json.loads(files["config.json"]) == config
    assert files[CARD_FILE] == (folder / CARD_FILE).read_bytes()
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_all_shards_and_their_index_arrive(tiny_checkpoint: Path, hub: Hub, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    shards = {path.name for path in (tmp_path / "shards").glob("*.safetensors")}
    assert len(shards) > 1

    push(open_checkpoint(str(tmp_path / "shards")), REPOSITORY)

    assert set(hub.branches["main"]) == shards | {"config.json", "model.safetensors.index.json"}
    for name, content in hub.branches["main"].items():
        assert content == (tmp_path / "shards" / name).read_bytes()


@pytest.mark.parametrize(("there", "asked"), [(False, True), (True, False)])
def test_nothing_is_pushed_where_others_would_see_it(there: bool, asked: bool, quantized: Path, hub: Hub) -> None:
    hub.private, hub.branches = there, {"main": {}}
    with pytest.raises(StorageError, match="--private" if there else "--public") as caught:
        push(open_checkpoint(str(quantized)), REPOSITORY, private=asked)
    assert REPOSITORY in str(caught.value) and hub.branches == {"main": {}} and not hub.large


@pytest.mark.parametrize("there", [None, True])
def test_a_repository_of_others_is_refused(there: bool | None, quantized: Path, hub: Hub) -> None:
    hub.mine, hub.private = False, there
    with pytest.raises(StorageError, match=r"me/small-vit \(403 .*must be yours"):
        push(open_checkpoint(str(quantized)), REPOSITORY)
    assert not hub.branches


def test_a_card_that_the_hub_refuses_is_told_before_anything_is_uploaded(quantized: Path, hub: Hub) -> None:
    hub.invalid_card = True
    with pytest.raises(StorageError, match='"license" must be a string') as caught:
        push(open_checkpoint(str(quantized)), REPOSITORY)
    assert "\n" not in str(caught.value) and not hub.large and hub.branches == {"main": {}}


@pytest.mark.parametrize("repository", ["small-vit", "a/b/c", "me/small vit", "../vit", "me/", "https://hf.co/me/vit"])
def test_what_is_no_id_is_refused(repository: str, quantized: Path) -> None:
    with pytest.raises(RecipeError, match="OWNER/NAME"):
        push(open_checkpoint(str(quantized)), repository)


def test_a_login_is_asked_for(quantized: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(StorageError, match="hf auth login"):
        push(open_checkpoint(str(quantized)), REPOSITORY)


def test_only_a_folder_can_be_pushed() -> None:
    with pytest.raises(CheckpointError, match="not a local folder"):
        push(open_checkpoint("random:vit-tiny-patch16-224"), REPOSITORY)


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_out_of_reach_is_told(offline: bool, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        with pytest.raises(StorageError, match=r"cannot be reached.*network"):
            push(open_checkpoint(str(quantized)), REPOSITORY)
