"""Hub ids: what is small is checked first, from the commit that is opened; the cache stands in for the hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from vitopt.errors import CheckpointError
from vitopt.models import hub as module
from vitopt.models.checkpoint import load_model, load_processor, open_checkpoint
from vitopt.models.weights import INDEX_FILE

SOURCE, COMMIT = "owner/vit", "0123456789abcdef0123456789abcdef01234567"


def refusal(source: str = SOURCE, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def repository(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a checkpoint into an empty cache under `SOURCE`, without the files named; gives its snapshot."""

    def make(*without: str, commit: str = COMMIT) -> Path:
        cache = tmp_path / "cache"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        folder = cache / "models--owner--vit"
        snapshot = folder / "snapshots" / commit
        shutil.copytree(tiny_checkpoint, snapshot, ignore=shutil.ignore_patterns(*without))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return snapshot

    return make


def test_a_hub_id_opens_from_the_cache(repository, tiny_checkpoint):
    repository()
    checkpoint = open_checkpoint(SOURCE)
    assert (checkpoint.location, checkpoint.folder, checkpoint.revision) == (SOURCE, None, COMMIT)
    local = open_checkpoint(str(tiny_checkpoint))
    assert checkpoint.label_names == local.label_names
    assert torch.equal(load_model(checkpoint).classifier.weight, load_model(local).classifier.weight)
    assert load_processor(checkpoint).to_dict() == load_processor(local).to_dict()


def test_weights_are_those_of_the_commit_that_was_checked(repository):
    repository()
    checkpoint = open_checkpoint(SOURCE)
    repository("model.safetensors", commit="f" * 40)  # the repository moves on
    assert load_model(checkpoint) is not None


@pytest.mark.parametrize("name", ["../../evil.safetensors", "pytorch_model.bin", "/tmp/evil.safetensors"])
def test_the_index_is_checked_before_any_weight_is_fetched(repository, monkeypatch, name):
    snapshot = repository("model.safetensors")
    (snapshot / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": {"classifier.weight": name}}))
    asked: list[str] = []
    fetch = module.cached_file
    monkeypatch.setattr(module, "cached_file", lambda source, name, **o: asked.append(name) or fetch(source, name, **o))
    assert repr(name) in refusal()
    assert asked == ["config.json", "adapter_config.json", INDEX_FILE]


def test_an_adapter_is_refused(repository):
    """transformers would open the model that it names instead."""
    snapshot = repository()
    (snapshot / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other/model"}))
    assert "adapter" in refusal()


@pytest.mark.parametrize("config_only", [True, False])
def test_code_is_refused_where_only_shapes_are_wanted_too(repository, config_only):
    path = repository() / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"model_type": "strange", "auto_map": {"AutoConfig": "a.B"}})
    )
    assert "auto_map" in refusal(config_only=config_only)


def test_a_hub_that_refuses_a_file_is_one_clear_line(repository, monkeypatch):
    repository()
    fetch = module.cached_file

    def gated(source: str, name: str, **options: object) -> str | None:
        if name == INDEX_FILE:
            raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")
        return fetch(source, name, **options)

    monkeypatch.setattr(module, "cached_file", gated)
    assert "`hf auth login`" in refusal()


def test_a_repository_without_weights_in_the_cache(repository):
    repository("model.safetensors")
    with pytest.raises(CheckpointError, match=SOURCE):
        load_model(open_checkpoint(SOURCE))


def test_a_hub_id_without_a_network():
    source = "some-owner/no-such-vit"
    assert refusal(source) == (
        f"cannot fetch '{source}' from the Hugging Face hub: no network, and it is not in the local cache; "
        f"on a connected machine run `hf download {source} --local-dir FOLDER`, then pass that folder"
    )


def test_a_hub_id_that_does_not_exist(monkeypatch):
    def absent(*_: object, **__: object) -> None:
        raise OSError("owner/typo is not a local folder and is not a valid model identifier listed on\nthe hub")

    class Hub:
        def model_info(self, source: str, timeout: float) -> None:
            assert timeout <= 10
            # The client's HTTP library changes between versions; of its response only these are read.
            raise HfHubHTTPError("404 Client Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(module, "HfApi", Hub)
    monkeypatch.setattr(module, "cached_file", absent)
    assert refusal("owner/typo") == (
        "no folder and no hub model named 'owner/typo': check the spelling, or log in with `hf auth login`"
    )
