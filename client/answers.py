"""The bytes of requests and answers: JSON values, server-sent events, the errors in either."""

import json
import re
from typing import Any

from client.errors import RequestError

DONE = "[DONE]"
MAX_EVENT_BYTES = 256 * 2**20
_MAX_MESSAGE_CHARS = 2000
# "\r" at the end may be the first half of "\r\n".
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")


class EventParser:
    """Finds the data of server-sent events in a stream, however it is cut into pieces.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._num_bytes = 0

    def feed(self, piece: bytes) -> list[str]:
        """Return the data of each event that a piece completes; comments have none.

        Raises:
            RequestError: an event is endless, or not UTF-8.
        """
        has_end = b"\n" in piece or b"\r" in piece or self._rest.endswith(b"\r")
        self._rest += piece
        self._num_bytes += len(piece)
        if self._num_bytes > MAX_EVENT_BYTES:
            raise RequestError(f"an event of the answer is longer than {MAX_EVENT_BYTES} bytes")
        # A long line in many pieces is not searched again for each of them.
        if not has_end:
            return []
        *lines, rest = _LINE_END.split(bytes(self._rest))
        self._rest = bytearray(rest)
        found = []
        for line in lines:
            if not line:
                self._num_bytes = len(rest)
                found += self._take()
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
        return found

    def _take(self) -> list[str]:
        """Return the data of the event that ends, if it has any."""
        lines, self._data = self._data, []
        try:
            return [b"\n".join(lines).decode()] if lines else []
        except UnicodeDecodeError:
            raise RequestError("the answer is not in UTF-8") from None


def encode_body(body: object) -> bytes:
    """Return a body as JSON in ASCII, which also holds text that is not valid Unicode."""
    return json.dumps(body).encode()


def parse_json(content: str | bytes) -> Any:
    """Return a JSON value.

    Raises:
        RequestError: it is none.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError("the server does not speak this API: it sent no JSON") from None


def parse_chunk(data: str) -> dict[str, Any]:
    """Return the object of an event.

    Raises:
        RequestError: the server reported an error, or it is no object.
    """
    chunk = parse_json(data)
    if not isinstance(chunk, dict):
        raise RequestError("the server does not speak this API: an event is no object")
    if "error" in chunk:
        raise make_error(chunk, "the server reported an error")
    return chunk


def parse_error(content: bytes, status: int, reason: str) -> RequestError:
    """Return the error that a response with a failing status stands for.

    Args:
        content: its body, of any kind.
        status: its HTTP status.
        reason: what the status is called, for a body that says nothing.
    """
    try:
        body = parse_json(content)
    except RequestError:
        body = None
    return make_error(body, reason or "the server did not say why", status=status)


def make_error(body: Any, fallback: str, *, status: int | None = None) -> RequestError:
    """Return what an error's body says, or the fallback."""
    error = body.get("error") if isinstance(body, dict) else None
    fields = error if isinstance(error, dict) else {"message": error}
    texts = {
        name: value[:_MAX_MESSAGE_CHARS]
        for name in ("message", "code", "param")
        if isinstance(value := fields.get(name), str)
    }
    return RequestError(texts.pop("message", "") or fallback, status=status, **texts)
