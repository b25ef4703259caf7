"""What `vitopt push` prints, and its refusals in one line."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from hub_stand_in import REPOSITORY, Hub
from huggingface_hub import constants
from typer.testing import CliRunner

from vitopt.cli import app


def push(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["push", *map(str, arguments)])


def test_push_tells_where_the_checkpoint_is(tiny_checkpoint: Path, hub: Hub) -> None:
    result = push(tiny_checkpoint, REPOSITORY)
    assert result.exit_code == 0 and result.stdout == f"pushed: {hub.address}/{REPOSITORY}/commit/{'a' * 40}\n"
    assert hub.private is True and "no model card" in result.stderr

    result = push(tiny_checkpoint, REPOSITORY, "--revision", "small", "--json")
    assert json.loads(result.stdout)["repository"] == REPOSITORY and "model.safetensors" in hub.branches["small"]


def test_push_makes_public_what_it_is_told_to(tiny_checkpoint: Path, hub: Hub) -> None:
    assert push(tiny_checkpoint, REPOSITORY, "--public").exit_code == 0
    assert hub.private is False


@pytest.mark.parametrize(
    ("checkpoint", "repository", "words"),
    [
        ("nowhere/there/vit", REPOSITORY, "no checkpoint at nowhere/there/vit"),
        ("vit-quickstart", "small-vit", "OWNER/NAME"),
        ("vit-quickstart", REPOSITORY, "hf auth login"),
        ("random:vit-tiny-patch16-224", REPOSITORY, "not a local folder"),
    ],
)
def test_refusals_are_one_line(
    checkpoint: str, repository: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    result = push(checkpoint, repository)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr
