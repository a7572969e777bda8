"""Turn token ids into text one at a time, and look for stop strings in it."""

from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Sequence

_Utf8Decoder = getincrementaldecoder("utf-8")


def build_token_texts(token_bytes: Sequence[bytes | None]) -> list[str | None]:
    """Return the text of each token that is whole by itself; None where it depends on neighbours.

    Control tokens are whole: they have the empty text.
    """
    texts: list[str | None] = []
    for data in token_bytes:
        try:
            texts.append("" if data is None else data.decode())
        except UnicodeDecodeError:
            texts.append(None)
    return texts


class Detokenizer:
    """Decode a growing sequence of tokens, byte for byte.

    A character whose bytes are spread over several tokens is held back until it is whole. All that
    `feed` and `flush` return, joined, equals decoding the tokens' bytes at once, with U+FFFD for
    bytes that are no UTF-8.

    Args:
        token_bytes: bytes of each id, None for control tokens.
        token_texts: `build_token_texts(token_bytes)`, shared by all sequences.
    """

    __slots__ = ("_bytes", "_decoder", "_texts")

    def __init__(
        self, token_bytes: Sequence[bytes | None], token_texts: Sequence[str | None]
    ) -> None:
        self._bytes = token_bytes
        self._texts = token_texts
        self._decoder: IncrementalDecoder | None = None

    def feed(self, token_id: int) -> str:
        """Return the text that has become certain with this token; ids past the table have none."""
        if token_id >= len(self._bytes):
            return ""
        if self._decoder is None:
            text = self._texts[token_id]
            if text is not None:
                return text
            self._decoder = _Utf8Decoder("replace")
        data = self._bytes[token_id]
        if data is None:
            return ""
        text = self._decoder.decode(data)
        if not self._decoder.getstate()[0]:
            self._decoder = None
        return text

    def flush(self) -> str:
        """Return what an unfinished character decodes to at the end of the sequence."""
        if self._decoder is None:
            return ""
        text = self._decoder.decode(b"", final=True)
        self._decoder = None
        return text


class StopMatcher:
    """Cut a text at the first stop string that is complete in it.

    Of several, the one that ends first counts; of those that end together, the longest. That makes
    the result independent of how the text is cut into pieces. Only what could still become a stop
    string is held back.

    Args:
        stops: stop strings, none empty.
        is_included: keep the stop string itself.
    """

    __slots__ = ("_held", "_is_included", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, is_included: bool = False) -> None:
        self._stops = tuple(stops)
        self._is_included = is_included
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Return the text that no stop string can take back any more; set `matched` on a match."""
        if not self._stops:
            return text
        text = self._held + text
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            end, start, self.matched = best
            self._held = ""
            return text[: end if self._is_included else start]
        num_held = max(_overlap(text, stop) for stop in self._stops)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return what is still held back, at the end of the text."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of `stop` that `text` ends with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
