"""Log probabilities and decoding traces as the API writes them."""

import math
from collections.abc import Sequence

from serve.api.generation import Piece
from serve.requests import TokenLogprob, TokenOutput
from text.tokenizer import Tokenizer

# What stands for a log probability of minus infinity, which JSON cannot say.
_SMALLEST = -9999.0


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _SMALLEST


def _escape(data: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in data)


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes:
    text = tokenizer.token_text(token_id)
    return (tokenizer.token_bytes()[token_id] or b"") if text is None else text.encode()


def name_token(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token's text; bytes that are no whole characters are spelt `\\xe2\\x80`."""
    text = tokenizer.token_text(token_id)
    return _escape(_bytes_of(tokenizer, token_id)) if text is None else text


def _name_legacy(tokenizer: Tokenizer, token_id: int) -> str:
    text = tokenizer.token_text(token_id)
    return f"bytes:{name_token(tokenizer, token_id)}" if text is None else text


def make_trace_entry(tokenizer: Tokenizer, output: TokenOutput) -> dict[str, object]:
    """Return the decoding trace's entry for a token of a traced request."""
    assert output.token_id is not None
    assert output.trace is not None
    assert output.logprob is not None
    entry: dict[str, object] = {
        "token": name_token(tokenizer, output.token_id),
        "token_id": output.token_id,
        "class": output.trace.token_class,
        # Single precision: without the digits that it does not have.
        "temperature": float(f"{output.trace.temperature:.7g}"),
        "entropy": _finite(output.trace.entropy),
        "logprob": _finite(output.logprob.logprob),
    }
    if output.trace.stage is not None:
        entry["stage"] = output.trace.stage
    if output.trace.candidates:
        entry["candidates"] = [
            {
                "token": name_token(tokenizer, token_id),
                "token_id": token_id,
                "score": _finite(score),
            }
            for token_id, score in output.trace.candidates
        ]
    return entry


def make_chat_entry(tokenizer: Tokenizer, output: TokenOutput) -> dict[str, object]:
    """Return the `logprobs.content` entry of a token."""
    assert output.token_id is not None
    assert output.logprob is not None

    def entry(token_id: int, logprob: float) -> dict[str, object]:
        return {
            "token": name_token(tokenizer, token_id),
            "logprob": _finite(logprob),
            "bytes": list(_bytes_of(tokenizer, token_id)),
        }

    value = entry(output.token_id, output.logprob.logprob)
    value["top_logprobs"] = [entry(token_id, logprob) for token_id, logprob in output.logprob.top]
    return value


class LegacyLogprobs:
    """The `logprobs` object of a text completion's choice, or of one of its chunks.

    `text_offset` counts characters of the choice's text. The token itself is always among its
    `top_logprobs`.

    Args:
        tokenizer: names the tokens.
        before: tokens that come first, such as an echoed prompt's.
    """

    def __init__(self, tokenizer: Tokenizer, before: "LegacyLogprobs | None" = None) -> None:
        self._tokenizer = tokenizer
        names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        self._value: dict[str, list[object]] = {
            name: [] if before is None else list(before._value[name]) for name in names
        }

    def add(self, token_id: int, logprob: TokenLogprob | None, offset: int) -> None:
        """Add a token; only a prompt's first has no log probability."""
        name = _name_legacy(self._tokenizer, token_id)
        value = self._value
        value["text_offset"].append(offset)
        value["tokens"].append(name)
        if logprob is None:
            value["token_logprobs"].append(None)
            value["top_logprobs"].append(None)
            return
        top: dict[str, float] = {}
        for other_id, other in logprob.top:
            # Of several tokens with the same text the most likely one counts.
            top.setdefault(_name_legacy(self._tokenizer, other_id), _finite(other))
        top.setdefault(name, _finite(logprob.logprob))
        value["token_logprobs"].append(_finite(logprob.logprob))
        value["top_logprobs"].append(top)

    def add_piece(self, piece: Piece, base: int) -> None:
        """Add a generated token; `base` is the length of the echoed prompt."""
        if piece.output.token_id is not None:
            self.add(piece.output.token_id, piece.output.logprob, base + piece.offset)

    def add_prompt(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob | None], text: str
    ) -> None:
        """Add an echoed prompt whose text is `text`."""
        detokenizer = self._tokenizer.make_detokenizer()
        position = 0
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            self.add(token_id, logprob, position)
            is_control = token_id in self._tokenizer.control_ids
            piece = (
                name_token(self._tokenizer, token_id) if is_control else detokenizer.feed(token_id)
            )
            if not text.startswith(piece, position):
                # A control token that the tokenizer added, or the space before the first word.
                piece = "" if is_control else piece.removeprefix(" ")
            position = min(len(text), position + len(piece))

    def value(self) -> dict[str, list[object]]:
        """Return the object."""
        return self._value
