"""Bytes of the chunks of a streamed answer.

A chunk's constant parts are made once for each request; a token costs one JSON string and a few
joins.
"""

import json
from json.encoder import encode_basestring
from typing import TypedDict

DONE = b"data: [DONE]\n\n"


class _Parts(TypedDict):
    content: tuple[str, str]
    empty: str
    role: str


class ChunkWriter:
    """Writes chunks of one answer.

    Args:
        head: fields before `choices`.
        content: JSON between a choice's index and its text, and after the text.
        empty: the same for a choice without text.
        role: the same for the opening chunk of a choice.
        with_usage: chunks have a `usage` field.
        frame: JSON before a choice's index, after the choice, and in place of both where there is
            no choice.
        no_logprobs: JSON of a choice without log probabilities.
    """

    def __init__(
        self,
        head: dict[str, object],
        *,
        content: tuple[str, str],
        empty: str,
        role: str,
        with_usage: bool,
        frame: tuple[str, str, str] = (',"choices":[{"index":', "}]", ',"choices":[]'),
        no_logprobs: str = ',"logprobs":null',
    ) -> None:
        self._head = json.dumps(head, ensure_ascii=False, separators=(",", ":"))[:-1]
        self._content = content
        self._empty = empty
        self._role = role
        self._usage = ',"usage":null}\n\n' if with_usage else "}\n\n"
        self._opened: dict[int, str] = {}
        self._frame = frame
        self._no_logprobs = no_logprobs
        self._closed = f'{content[1]}{no_logprobs},"finish_reason":null{frame[1]}'

    def _open(self, index: int) -> str:
        text = self._opened.get(index)
        if text is None:
            text = f"data: {self._head}{self._frame[0]}{index},"
            self._opened[index] = text
        return text

    def _close(self, details: "Details", finish_reason: str, usage: str | None) -> str:
        fields = details.render(finish_reason, self._no_logprobs)
        return fields + self._frame[1] + (usage or self._usage)

    def text(self, index: int, text: str, usage: str | None = None) -> str:
        """Return a chunk with text only."""
        return (
            self._open(index)
            + self._content[0]
            + encode_basestring(text)
            + self._closed
            + (self._usage if usage is None else usage)
        )

    def detailed(self, index: int, text: str, details: "Details", usage: str | None = None) -> str:
        """Return a chunk with text and log probabilities or a trace."""
        body = self._content[0] + encode_basestring(text) + self._content[1]
        return self._open(index) + body + self._close(details, "null", usage)

    def opening(self, index: int, usage: str | None = None) -> str:
        """Return a choice's first chunk."""
        return self._open(index) + self._role + self._close(Details(), "null", usage)

    def finish(self, index: int, reason: str, details: "Details", usage: str | None = None) -> str:
        """Return a choice's last chunk."""
        end = self._close(details, encode_basestring(reason), usage)
        return self._open(index) + self._empty + end

    def usage_only(self, usage: dict[str, object]) -> str:
        """Return the chunk that has the usage and no choice."""
        return f"data: {self._head}{self._frame[2]}{self.usage_field(usage)}"

    def usage_field(self, usage: dict[str, object]) -> str:
        """Return the end of a chunk with this usage."""
        return f',"usage":{json.dumps(usage, separators=(",", ":"))}}}\n\n'


class Details:
    """Log probabilities and trace of a chunk's choice; both may be absent."""

    __slots__ = ("logprobs", "trace")

    def __init__(
        self, logprobs: object = None, trace: list[dict[str, object]] | None = None
    ) -> None:
        self.logprobs = logprobs
        self.trace = trace

    def render(self, finish_reason: str, no_logprobs: str) -> str:
        """Return the fields of the choice after its text."""
        logprobs = no_logprobs
        if self.logprobs is not None:
            logprobs = f',"logprobs":{_encode(self.logprobs)}'
        trace = "" if self.trace is None else f',"decoding_trace":{_encode(self.trace)}'
        return f'{logprobs},"finish_reason":{finish_reason}{trace}'


def _encode(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


_CHAT: _Parts = {
    "content": ('"delta":{"content":', "}"),
    "empty": '"delta":{}',
    "role": '"delta":{"role":"assistant","content":"","refusal":null}',
}
_TEXT: _Parts = {"content": ('"text":', ""), "empty": '"text":""', "role": '"text":""'}


def make_chat_writer(head: dict[str, object], *, with_usage: bool) -> ChunkWriter:
    """Return the writer of /v1/chat/completions."""
    return ChunkWriter(head, **_CHAT, with_usage=with_usage)


def make_completion_writer(head: dict[str, object], *, with_usage: bool) -> ChunkWriter:
    """Return the writer of /v1/completions."""
    return ChunkWriter(head, **_TEXT, with_usage=with_usage)


def make_comparison_writer(head: dict[str, object], *, is_chat: bool) -> ChunkWriter:
    """Return the writer of /v1/compare: a chunk is of one arm and has no list of choices."""
    parts = _CHAT if is_chat else _TEXT
    return ChunkWriter(head, **parts, with_usage=False, frame=(',"arm":', "", ""), no_logprobs="")
