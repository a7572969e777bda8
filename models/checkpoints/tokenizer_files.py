"""Which files of a Hugging Face folder make its tokenizer, and what reading them takes."""

from importlib.util import find_spec
from pathlib import Path

from models.families import CheckpointError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_SOURCES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_SENTENCEPIECE_NEEDS = ("sentencepiece", "google.protobuf")


def has_older_tokenizer(folder: Path) -> bool:
    """Tell whether tokenizer.json must be made of older files."""
    return not (folder / "tokenizer.json").is_file() and any(
        (folder / name).is_file() for name in _SOURCES[1:]
    )


def check_tokenizer_files(folder: Path, *, is_needed: bool = False) -> None:
    """Check that the tokenizer can be read, before anything large is.

    Args:
        folder: a Hugging Face folder.
        is_needed: there must be one.

    Raises:
        CheckpointError: there is none, or tokenizer.model is all there is, and what reads it is not
            installed.
    """
    if is_needed and not any((folder / name).is_file() for name in _SOURCES):
        raise CheckpointError(f"{folder}: no tokenizer; one of {', '.join(_SOURCES)} is needed")
    if not has_older_tokenizer(folder) or (folder / "vocab.json").is_file():
        return
    missing = [name for name in _SENTENCEPIECE_NEEDS if not _is_installed(name)]
    if missing:
        raise CheckpointError(
            f"{folder}: there is no tokenizer.json, and reading tokenizer.model takes packages "
            f"that are missing ({', '.join(missing)}): pip install sentencepiece protobuf"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
