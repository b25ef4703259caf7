"""Small files of a hub repository, fetched before its weights are."""

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not listed among its exports
from transformers.utils import cached_file

from vitopt.errors import CheckpointError

_SECONDS = 10


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a repository's id on the hub: `NAME` or `OWNER/NAME`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def fetch_config(source: str, name: str) -> Path:
    """The configuration of a hub id, in a folder of the cache that is named after its commit.

    Raises:
        CheckpointError: there is no such repository, or no way to reach it.
    """
    _require_answer(source, name)
    try:
        return Path(cached_file(source, name))
    except OSError as error:
        text = " ".join(str(error).split())
        if "not a valid model identifier" in text or "404" in text:
            raise CheckpointError(
                f"no folder and no hub model named {source!r}: check the spelling, or log in with `hf auth login`"
            ) from error
        raise CheckpointError(explain_no_network(source)) from error


def fetch(source: str, name: str, revision: str) -> Path | None:
    """Another file of that commit, None where it has no such file, or neither the hub nor the cache gives it.

    Raises:
        CheckpointError: the hub refuses.
    """
    try:
        path = cached_file(
            source,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise CheckpointError(f"the hub refuses {name} of {source}: log in with `hf auth login`") from error
    return None if path is None else Path(path)


def explain_no_network(source: str) -> str:
    """Why a hub id cannot be opened, and how to bring it here."""
    return (
        f"cannot fetch {source!r} from the Hugging Face hub: no network, and it is not in the local cache; "
        f"on a connected machine run `hf download {source} --local-dir FOLDER`, then pass that folder"
    )


def _require_answer(source: str, name: str) -> None:
    """Ask once whether the hub answers: transformers would try again for half a minute before it gives up."""
    if isinstance(try_to_load_from_cache(source, name), str):
        return
    try:
        HfApi().model_info(source, timeout=_SECONDS)
    except HfHubHTTPError:
        return  # it answers; a refusal is told when the configuration is read
    except Exception as error:  # each version of the client wraps the refusals of the network in its own way
        raise CheckpointError(explain_no_network(source)) from error
