"""Bytes of the chunks of a streamed answer.

A chunk's constant parts are made once for each request; a token costs one JSON string and a few
joins.
"""

import json
from json.encoder import encode_basestring

DONE = b"data: [DONE]\n\n"


class ChunkWriter:
    """Writes chunks of one answer.

    Args:
        head: fields before `choices`.
        content: JSON between a choice's index and its text, and after the text.
        empty: the same for a choice without text.
        role: the same for the opening chunk of a choice.
        with_usage: chunks have a `usage` field.
    """

    def __init__(
        self,
        head: dict[str, object],
        *,
        content: tuple[str, str],
        empty: str,
        role: str,
        with_usage: bool,
    ) -> None:
        self._head = json.dumps(head, ensure_ascii=False, separators=(",", ":"))[:-1]
        self._content = content
        self._empty = empty
        self._role = role
        self._usage = ',"usage":null}\n\n' if with_usage else "}\n\n"
        self._opened: dict[int, str] = {}
        self._closed = f'{content[1]},"logprobs":null,"finish_reason":null}}]'

    def _open(self, index: int) -> str:
        text = self._opened.get(index)
        if text is None:
            text = f'data: {self._head},"choices":[{{"index":{index},'
            self._opened[index] = text
        return text

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
        return self._open(index) + body + details.render("null") + (usage or self._usage)

    def opening(self, index: int, usage: str | None = None) -> str:
        """Return a choice's first chunk."""
        return self._open(index) + self._role + Details().render("null") + (usage or self._usage)

    def finish(self, index: int, reason: str, details: "Details", usage: str | None = None) -> str:
        """Return a choice's last chunk."""
        end = details.render(encode_basestring(reason))
        return self._open(index) + self._empty + end + (usage or self._usage)

    def usage_only(self, usage: dict[str, object]) -> str:
        """Return the chunk that has the usage and no choices."""
        return f'data: {self._head},"choices":[]{self.usage_field(usage)}'

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

    def render(self, finish_reason: str) -> str:
        """Return the rest of the choice after its text."""
        logprobs = "null" if self.logprobs is None else _encode(self.logprobs)
        trace = "" if self.trace is None else f',"decoding_trace":{_encode(self.trace)}'
        return f',"logprobs":{logprobs},"finish_reason":{finish_reason}{trace}}}]'


def _encode(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def make_chat_writer(head: dict[str, object], *, with_usage: bool) -> ChunkWriter:
    """Return the writer of /v1/chat/completions."""
    return ChunkWriter(
        head,
        content=('"delta":{"content":', "}"),
        empty='"delta":{}',
        role='"delta":{"role":"assistant","content":"","refusal":null}',
        with_usage=with_usage,
    )


def make_completion_writer(head: dict[str, object], *, with_usage: bool) -> ChunkWriter:
    """Return the writer of /v1/completions."""
    return ChunkWriter(
        head, content=('"text":', ""), empty='"text":""', role='"text":""', with_usage=with_usage
    )
