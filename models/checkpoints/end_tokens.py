"""Find the tokens that end a text."""

from collections.abc import Mapping
from pathlib import Path

from models.checkpoints.tensor_files import load_json


def read_eos_token_ids(folder: Path, config: Mapping[str, object]) -> tuple[int, ...]:
    """Collect the end tokens that a folder names.

    generation_config.json counts, or config.json where it names none; the tokenizer's own end
    token is added, because chat models often end a turn with that one.

    Args:
        folder: the checkpoint's folder.
        config: its parsed config.json.

    Returns:
        Token ids in increasing order, without repeats; empty if the folder names none.

    Raises:
        CheckpointError: a file is not valid JSON.
    """
    generation = folder / "generation_config.json"
    ids = _ids(load_json(generation).get("eos_token_id")) if generation.is_file() else []
    ids = ids or _ids(config.get("eos_token_id"))
    token_id = _tokenizer_eos(folder)
    return tuple(sorted({*ids, *([] if token_id is None else [token_id])}))


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _tokenizer_eos(folder: Path) -> int | None:
    settings, tokenizer = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not (settings.is_file() and tokenizer.is_file()):
        return None
    token = load_json(settings).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    added = load_json(tokenizer).get("added_tokens")
    entries = added if isinstance(added, list) else []
    return next((entry["id"] for entry in entries if entry.get("content") == text), None)
