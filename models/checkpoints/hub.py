"""Fetch a repository from the Hugging Face hub: weights in safetensors, never pickles or code."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from models.families import CheckpointError

_PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "LICENSE*",
)


def fetch_from_hub(repository: str, report: Callable[[str], None]) -> Path:
    """Download a repository, or find it in the hub's local cache.

    Args:
        repository: "owner/name".
        report: told what is being fetched.

    Returns:
        The folder of the newest revision.

    Raises:
        CheckpointError: the repository does not exist or cannot be reached.
    """
    report(f"fetching {repository} from the Hugging Face hub")
    try:
        folder = snapshot_download(repository, allow_patterns=list(_PATTERNS))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{repository}: neither a local path nor a repository that can be fetched ({reason})"
        ) from error
    return Path(folder)
