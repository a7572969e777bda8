"""The bytes that each token id stands for."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_META_SPACE = "\u2581"


class TokenizerError(ValueError):
    """The tokenizer files are missing, broken or of a kind that is not supported."""


def build_token_bytes(
    description: Mapping[str, Any], vocabulary: Mapping[str, int], control_ids: frozenset[int]
) -> list[bytes | None]:
    """Build the table from token id to bytes.

    Args:
        description: contents of `tokenizer.json`.
        vocabulary: token string to id, added tokens included.
        control_ids: ids without text.

    Returns:
        One entry for each id up to the largest: its bytes, or None for control tokens and for ids
        that no token has.

    Raises:
        TokenizerError: the decoder is neither byte-level nor SentencePiece-like.
    """
    decoders = list(_decoders(description.get("decoder")))
    kinds = {decoder["type"] for decoder in decoders}
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    if "ByteLevel" in kinds:
        byte_of = {char: byte for byte, char in _byte_level_alphabet().items()}
        for token, token_id in vocabulary.items():
            table[token_id] = _byte_level_bytes(token, byte_of)
    elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
        space = next((d["replacement"] for d in decoders if d["type"] == "Metaspace"), _META_SPACE)
        for token, token_id in vocabulary.items():
            is_byte = "ByteFallback" in kinds and _BYTE_TOKEN.fullmatch(token)
            table[token_id] = (
                bytes.fromhex(is_byte[1]) if is_byte else token.replace(space, " ").encode()
            )
    else:
        raise TokenizerError(
            f"tokenizer.json: decoder {sorted(kinds) or None} is not supported; "
            "supported: ByteLevel (GPT-2 like), Metaspace / ByteFallback (SentencePiece like)"
        )
    for token_id in control_ids:
        table[token_id] = None
    return table


def _decoders(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _decoders(part)
    else:
        yield decoder


def _byte_level_alphabet() -> dict[int, str]:
    """Return the printable character that stands for each byte in a GPT-2 like vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet]
    return alphabet | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _byte_level_bytes(token: str, byte_of: Mapping[str, int]) -> bytes:
    # Added tokens are stored as plain text; the library's decoder tells them apart the same way.
    try:
        return bytes([byte_of[char] for char in token])
    except KeyError:
        return token.encode()
