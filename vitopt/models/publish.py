"""A checkpoint and its model card to a repository of the Hugging Face hub, in one commit."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from vitopt.errors import CheckpointError, RecipeError, StorageError
from vitopt.models import hub
from vitopt.models.activations import ACTIVATIONS_FILE
from vitopt.models.checkpoint import CONFIG_FILE, PREPROCESSOR_FILE, Checkpoint
from vitopt.models.origin import ORIGIN_FILE
from vitopt.models.weights import INDEX_FILE
from vitopt.ownership import CARD_FILE, unsealed

logger = logging.getLogger(__name__)

_REMEDIES = {
    401: "the token is not valid: log in with `hf auth login`",
    403: "the repository must be yours, and the token must be allowed to write to it",
}


def push(checkpoint: Checkpoint, repository: str, *, private: bool = True, revision: str | None = None) -> str:
    """Make the repository `OWNER/NAME` if it is not there, add the checkpoint to its branch `revision` (None: the main
    one), and return the address of the commit.

    Only configuration, weights, preprocessor, origin, activations and model card go there: no records, and nothing else
    that lies in the folder. The token is that of `hf auth login` or `HF_TOKEN`.

    Raises:
        CheckpointError: the checkpoint is in no local folder.
        RecipeError: `repository` is no id.
        StorageError: there is no token or no way to the hub; the hub refuses; or the repository is there and is not
            `private` where it should be, or is where it should not.
    """
    if checkpoint.folder is None:
        raise CheckpointError(f"{checkpoint.source} is not a local folder: there is nothing to push")
    if not (hub.is_repo_id(repository) and "/" in repository):
        raise RecipeError(
            f"{repository!r} is not the id of a repository: give OWNER/NAME, of letters, digits and . _ -"
        )
    if get_token() is None:
        raise StorageError("there is no token for the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN")
    operations = [CommitOperationAdd(name, content) for name, content in _files(checkpoint, repository)]
    api = HfApi()
    with _explained(repository):
        _require_repository(api, repository, private)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Add the checkpoint", revision=revision)
    return str(commit.commit_url)


def _files(checkpoint: Checkpoint, repository: str) -> Iterator[tuple[str, str | bytes]]:
    """Names in the repository, and what goes there: a path or the content itself."""
    folder = checkpoint.weights[0].parent
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:  # where some earlier model lay
        yield CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode()
    else:
        yield CONFIG_FILE, str(folder / CONFIG_FILE)
    names = [*(file.name for file in checkpoint.weights), INDEX_FILE, PREPROCESSOR_FILE, ORIGIN_FILE, ACTIVATIONS_FILE]
    yield from ((name, str(folder / name)) for name in names if (folder / name).is_file())
    if (folder / CARD_FILE).is_file():
        yield CARD_FILE, _card(folder / CARD_FILE, repository)
    else:
        logger.warning("%s has no model card (%s), so none is pushed", checkpoint.source, CARD_FILE)


def _card(path: Path, repository: str) -> bytes:
    """The card, where vitopt wrote it with the repository's id for the folder in its code."""
    text = path.read_bytes()
    plain = unsealed(text.decode(errors="surrogateescape"))
    return text if plain.encode(errors="surrogateescape") == text else re.sub(r"\bFOLDER\b", repository, plain).encode()


def _require_repository(api: HfApi, repository: str, private: bool) -> None:
    try:
        existing = api.model_info(repository)
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private)
        return
    if bool(existing.private) != private:
        kinds = ("private", "--private") if existing.private else ("public", "--public")
        raise StorageError(f"{repository} exists and is {kinds[0]}: push with {kinds[1]}, or to another repository")


@contextlib.contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn what the client raises into one line."""
    try:
        yield
    except StorageError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join((error.server_message or error.response.reason_phrase).split())
        remedy = _REMEDIES.get(status, "push again later")
        raise StorageError(f"the Hugging Face hub refuses {repository} ({status} {said}): {remedy}") from error
    except (ValueError, RuntimeError) as error:  # of the card's metadata, or of one file
        raise StorageError(f"{repository} was not pushed: {' '.join(str(error).split())}") from error
    except Exception as error:  # each version of the client wraps the refusals of the network in its own way
        raise StorageError(
            f"{repository} was not pushed, the Hugging Face hub cannot be reached ({type(error).__name__}): check the "
            "network and HF_ENDPOINT"
        ) from error
