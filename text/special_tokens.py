"""The special tokens that the files of a model folder name."""

from collections.abc import Mapping
from typing import Any

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


def named_tokens(
    tokenizer_config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]
) -> dict[str, str]:
    """Return the special tokens by name, such as `eos_token`.

    Args:
        tokenizer_config: contents of `tokenizer_config.json`, which comes first.
        special_tokens_map: contents of `special_tokens_map.json`, for what the other lacks.
    """
    named = {}
    for name in _NAMES:
        for settings in (tokenizer_config, special_tokens_map):
            value = settings.get(name)
            if isinstance(value, dict):  # in older files
                value = value.get("content")
            if isinstance(value, str):
                named[name] = value
                break
    return named


def end_token_ids(
    generation_config: Mapping[str, Any], config: Mapping[str, Any], tokenizer_eos: int | None
) -> tuple[int, ...]:
    """Return the tokens that end a text; both training and serving go by them.

    generation_config.json counts, or config.json where it names none; the tokenizer's own end
    token is added, because chat models often end a turn with that one.

    Args:
        generation_config: contents of `generation_config.json`.
        config: contents of `config.json`.
        tokenizer_eos: id of the tokenizer's `eos_token`.

    Returns:
        Token ids without repeats; the first closes a text in training.
    """
    ids = _ids(generation_config.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    return tuple(dict.fromkeys((*ids, *_ids(tokenizer_eos))))


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
