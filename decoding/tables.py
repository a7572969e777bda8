"""What decoding knows about the text of each token: line classes and shapes."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from decoding.automaton import Automaton
from decoding.lines import build_shape_functions

TOKEN_CLASSES = ("X", "N0", "N1", "W", "K")

# Shapes are texts over this alphabet: newline, blank, backtick, block opener, bracket opener and
# anything else. A carriage return has no effect, so that "\r\n" is a newline.
_LETTERS = {ord("\n"): "n", ord(" "): "b", ord("\t"): "b", ord("`"): "t"}
_LETTERS |= {ord(":"): "o", ord("{"): "o", ord("("): "p", ord("["): "p"}
_SHAPE_OF_BYTE = "".join(_LETTERS.get(byte, "x") for byte in range(256)).encode()
_REPEATS = re.compile(rb"(?:(?<=x)x+)|(?:(?<=b)b+)|(?:(?<=n)n+)|(?:(?<=ttt)t+)")


class TokenTables:
    """Per-token tables of one vocabulary, built once by `build_token_tables`.

    Attributes:
        classes: (V,) uint8, index into `TOKEN_CLASSES` of each token's text: X ends in non-blank
            text on its last line, N0 ends in a newline, N1 ends in a newline and blanks, W is
            blanks only, K is empty (special and control tokens).
        shapes: the distinct shapes of the tokens' texts, see `build_token_tables`.
        shape_ids: index into `shapes` of each token.
        texts: bytes of each token, None or empty without a text.
    """

    def __init__(
        self, shapes: Sequence[bytes], shape_ids: Sequence[int], texts: Sequence[bytes | None]
    ) -> None:
        self.shapes = tuple(shapes)
        self.shape_ids = tuple(shape_ids)
        self.texts = texts
        class_of_shape = torch.tensor([_class_of(shape) for shape in shapes], dtype=torch.uint8)
        self.classes: Tensor = class_of_shape[torch.tensor(self.shape_ids)]
        self._class_of_token = bytes(self.classes.tolist())
        self._line_automata: dict[bool, Automaton] = {}

    @property
    def vocab_size(self) -> int:
        return len(self.shape_ids)

    def class_name(self, token_id: int) -> str:
        """Return the class of a token's text, one of `TOKEN_CLASSES`."""
        return TOKEN_CLASSES[self._class_of_token[token_id]]

    def tokens_with(self, parts: Sequence[bytes]) -> frozenset[int]:
        """Return the tokens whose text has one of these parts in it."""
        return frozenset(
            token_id
            for token_id, text in enumerate(self.texts)
            if text and any(part in text for part in parts)
        )

    def line_automaton(self, *, is_bracket_opener: bool) -> Automaton:
        """Return the automaton of `decoding.lines` over this vocabulary, built at first use.

        Args:
            is_bracket_opener: "(" and "[" open a block, like ":" and "{".
        """
        automaton = self._line_automata.get(is_bracket_opener)
        if automaton is None:
            functions = build_shape_functions(self.shapes, is_bracket_opener=is_bracket_opener)
            automaton = Automaton(functions, self.shape_ids)
            self._line_automata[is_bracket_opener] = automaton
        return automaton


def build_token_tables(token_bytes: Sequence[bytes | None]) -> TokenTables:
    """Classify every token of a vocabulary by its text.

    Args:
        token_bytes: for each id the token's bytes as they stand inside a text (a leading blank
            kept), or None for special, control and unused ids.

    Raises:
        ValueError: the vocabulary is empty.
    """
    if not token_bytes:
        raise ValueError("token_bytes must have an entry for each token id, got none")
    texts = [text.translate(_SHAPE_OF_BYTE, b"\r") if text else b"" for text in token_bytes]
    found: dict[bytes, int] = {}
    joined = _REPEATS.sub(b"", b"|".join(texts))
    shape_ids = [found.setdefault(shape, len(found)) for shape in joined.split(b"|")]
    return TokenTables(tuple(found), shape_ids, token_bytes)


def _class_of(shape: bytes) -> int:
    if not shape:
        return TOKEN_CLASSES.index("K")
    head, newline, tail = shape.rpartition(b"n")
    if tail.strip(b"b"):
        return TOKEN_CLASSES.index("X")
    if not newline:
        return TOKEN_CLASSES.index("W")
    return TOKEN_CLASSES.index("N1" if tail else "N0")
