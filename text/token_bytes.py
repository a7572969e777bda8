"""The bytes that each token id stands for."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    read = _make_reader(description)
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        table[token_id] = read(token)
    for token_id, text in _plain_texts(description).items():
        table[token_id] = text.encode()
    for token_id in control_ids:
        table[token_id] = None
    return table


def find_misread(description: Mapping[str, Any]) -> frozenset[int]:
    """Return the added tokens whose text looks like the spelling of other bytes.

    The library's decoder takes them for that, such as an added "d\u00f6rt" in a byte-level
    vocabulary, where "\u00f6" stands for the byte 0xF6.

    Args:
        description: contents of `tokenizer.json`.
    """
    read = _make_reader(description)
    return frozenset(
        token_id
        for token_id, text in _plain_texts(description).items()
        if read(text) != text.encode()
    )


def _plain_texts(description: Mapping[str, Any]) -> dict[int, str]:
    """Return the added tokens that are text as it is, by id.

    A SentencePiece-like model makes its own pieces, added or not, of text with marked spaces.
    """
    pieces: Iterable[str] = ()
    if not _is_byte_level(description):
        vocab = description["model"]["vocab"]
        pieces = set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    return {
        entry["id"]: entry["content"]
        for entry in description.get("added_tokens", [])
        if entry["content"] not in pieces
    }


def _is_byte_level(description: Mapping[str, Any]) -> bool:
    return any(d["type"] == "ByteLevel" for d in _decoders(description.get("decoder")))


def _make_reader(description: Mapping[str, Any]) -> Callable[[str], bytes]:
    """Return the function from a model's token string to its bytes.

    Raises:
        TokenizerError: the decoder is neither byte-level nor SentencePiece-like.
    """
    decoders = list(_decoders(description.get("decoder")))
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        byte_of = {char: byte for byte, char in _byte_level_alphabet().items()}
        return lambda token: _byte_level_bytes(token, byte_of)
    if not kinds & {"Metaspace", "ByteFallback", "Replace"}:
        raise TokenizerError(
            f"tokenizer.json: decoder {sorted(kinds) or None} is not supported; "
            "supported: ByteLevel (GPT-2 like), Metaspace / ByteFallback (SentencePiece like)"
        )
    space = next((d["replacement"] for d in decoders if d["type"] == "Metaspace"), _META_SPACE)

    def read_piece(token: str) -> bytes:
        is_byte = "ByteFallback" in kinds and _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(is_byte[1]) if is_byte else token.replace(space, " ").encode()

    return read_piece


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
    try:
        return bytes([byte_of[char] for char in token])
    except KeyError:
        return token.encode()
