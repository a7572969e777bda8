"""A small vocabulary with every kind of token."""

from collections.abc import Sequence

import pytest

from decoding import TokenTables, build_token_tables

TEXTS: list[bytes | None] = [
    None,  # id 0 is the special token
    b"\n",
    b"\n\n",
    b":\n",
    b"\n    ",
    b"    ",
    b"  return",
    b"\t",
    b"\r\n",
    b" ",
    b"x",
    b" y",
    b":",
    b"{",
    b"(",
    b" [",
    b"`",
    b"``",
    b"```",
    b"```python\n",
    b"\n```",
    b"\n  x",
    b")\n  ",
    b"\xe2\x80",
    b"a: b",
    b"",
    b" \n ",
    b"````",
    b"x`",
    b" :\n\n",
    b"{\n\t",
    b"\r",
]


class Vocabulary:
    """Token texts with their tables."""

    def __init__(self, texts: Sequence[bytes | None]) -> None:
        self.texts = tuple(texts)
        self.tables: TokenTables = build_token_tables(texts)

    def id_of(self, text: bytes | None) -> int:
        return self.texts.index(text)

    def ids_of(self, *texts: bytes | None) -> list[int]:
        return [self.id_of(text) for text in texts]

    def text_of(self, token_ids: Sequence[int]) -> str:
        texts = (self.texts[token_id] or b"" for token_id in token_ids)
        return b"".join(texts).decode(errors="replace")


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(TEXTS)


@pytest.fixture(scope="session")
def make_vocabulary() -> type[Vocabulary]:
    return Vocabulary
