"""HTTP/1 connections of the server: uvicorn's, with limits of size, number and time.

What uvicorn leaves open: heads of any length, connections that say nothing or read nothing, clients
that half close, and streams to HTTP/1.0 clients, which know no chunks.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from serve.api.errors import ApiError, encode_json

_LOG = logging.getLogger("proa.http")
_WARN_EVERY_S = 10.0
_LINGER_S = 1.0
_MAX_LINGERING = 32
_PROBE_EVERY_S = (0.05, 0.2, 1.0)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_COMMENT = b"3\r\n:\n\n\r\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionLimits:
    """What a client may take of a server before anything knows who it is.

    Attributes:
        max_connections: open at once; None: any number.
        max_head_bytes: longest request line and headers together.
        head_timeout_s: longest time until they have arrived, on a new connection or after a
            request's first byte.
        body_timeout_s: longest time that a body may take, also one that nobody reads any more;
            longer than the application gives it, which says so.
        write_timeout_s: longest time that a full write buffer may stand, or a closing connection
            keep what is left to send.
    """

    max_connections: int | None = None
    max_head_bytes: int = 64 * 2**10
    head_timeout_s: float = 15.0
    body_timeout_s: float = 35.0
    write_timeout_s: float = 60.0


class LimitedProtocol(HttpToolsProtocol):
    """A connection within limits.

    Args:
        limits: they.
        arguments: of uvicorn's protocol.
    """

    _warned_s = -math.inf

    def __init__(self, *, limits: ConnectionLimits, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._limits = limits
        self._refusal: ApiError | None = None
        self._is_refused = False
        self._is_head_open = True
        self._num_head_bytes = 0
        self._num_unparsed_bytes = 0
        self._is_half_closed = False
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._probing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        limit = self._limits.max_connections
        if limit is not None and len(self.connections) > limit:
            self._warn(limit)
            self._refuse(
                ApiError(
                    "The server has as many connections as it may have; try again later.",
                    status=503,
                    code="too_many_connections",
                    headers={"Retry-After": "5"},
                )
            )
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._reading, self._writing, self._probing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection if an answer is under way: the client may only have half closed.

        Whether it has gone for good shows when something is written: hence the probes.
        """
        if self._is_refused or not self._is_answering() or self.cycle.more_body:
            return False
        self._is_half_closed = True
        self.cycle.keep_alive = False
        self._probe(0)
        return True

    def data_received(self, data: bytes) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        if self._is_head_open:
            if self._reading is None:
                self._await_head()
            self._num_unparsed_bytes += len(data)
        super().data_received(data)
        is_too_large = self._num_unparsed_bytes > self._limits.max_head_bytes
        if self._is_head_open and is_too_large and not self._is_refused:
            self._refuse(self._head_too_large())

    def on_message_begin(self) -> None:
        self._is_head_open = True
        self._num_head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._num_head_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_head_bytes += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._num_head_bytes > self._limits.max_head_bytes:
            self._refusal = self._head_too_large()
            raise ValueError  # ends in `send_400_response`
        self._is_head_open = False
        self._num_unparsed_bytes = 0
        self._await(self._limits.body_timeout_s, self._on_late_body)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_head_open = True
        self._stop_waiting()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError("This is not HTTP/1.", code="bad_http"))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None and not self.transport.is_closing():
            self._writing.cancel()
            self._writing = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._await_reader()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._await_reader()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = partial(_answer_plainly, app, cycle)
        super()._start_asgi_task(cycle, app)

    def _await(self, timeout_s: float, on_late: Callable[[], None]) -> None:
        self._stop_waiting()
        self._reading = self.loop.call_later(timeout_s, on_late)

    def _stop_waiting(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _await_head(self) -> None:
        self._await(self._limits.head_timeout_s, self._on_late_head)

    def _await_reader(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(
                self._limits.write_timeout_s, self._on_stalled_reader
            )

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _on_late_head(self) -> None:
        if self._is_answering():
            self._await_head()
        elif self._num_unparsed_bytes == 0:
            self._close()
        else:
            self._refuse(
                ApiError(
                    "The request's headers did not arrive within "
                    f"{self._limits.head_timeout_s:g} s.",
                    status=408,
                    code="head_timeout",
                )
            )

    def _on_late_body(self) -> None:
        if self.pipeline or self.flow.read_paused:
            # Not the client's fault: an earlier request is being answered.
            self._await(self._limits.body_timeout_s, self._on_late_body)
        else:
            self._close()

    def _close(self) -> None:
        self.transport.close()
        self._await_reader()

    def _on_stalled_reader(self) -> None:
        if not self.transport.is_closing():
            _LOG.warning(
                "a client has not read its answer for %g s; its connection is closed",
                self._limits.write_timeout_s,
            )
        self.transport.abort()

    def _probe(self, count: int) -> None:
        """Write what means nothing, to learn whether a client that half closed is still there."""
        cycle = self.cycle
        if self.transport.is_closing() or cycle.response_complete:
            return
        if not cycle.response_started and cycle.scope["http_version"] == "1.1":
            self.transport.write(_CONTINUE)
        elif cycle.chunked_encoding:
            # Streams are server-sent events, written in whole events: a comment fits between.
            self.transport.write(_COMMENT)
        delay_s = _PROBE_EVERY_S[min(count, len(_PROBE_EVERY_S) - 1)]
        self._probing = self.loop.call_later(delay_s, self._probe, count + 1)

    def _head_too_large(self) -> ApiError:
        return ApiError(
            f"The request line and headers are longer than {self._limits.max_head_bytes} bytes.",
            status=431,
            code="headers_too_large",
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        self._stop_waiting()
        self._is_refused = True
        if self._is_answering():
            self._close()
            return
        body = encode_json(error.body())
        headers = {
            **error.headers,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        lines = [f"{name}: {value}\r\n".encode() for name, value in headers.items()]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        limit = self._limits.max_connections
        if limit is not None and len(self.connections) > limit + _MAX_LINGERING:
            self._close()
            return
        # To close with unread data would reset the connection before the answer is read.
        self.transport.write_eof()
        self._await(_LINGER_S, self._close)

    def _warn(self, limit: int) -> None:
        now = time.monotonic()
        if now - LimitedProtocol._warned_s >= _WARN_EVERY_S:
            LimitedProtocol._warned_s = now
            _LOG.warning(
                "all %d connections are taken, further ones get status 503; see --max-connections",
                limit,
            )


async def _answer_plainly(
    app: ASGIApp, cycle: RequestResponseCycle, scope: Scope, receive: Receive, send: Send
) -> None:
    """Run an application for an HTTP/1.0 client: the end of the connection ends a stream."""
    is_endless = False

    async def send_plainly(message: Message) -> None:
        nonlocal is_endless
        if message["type"] == "http.response.start":
            is_endless = all(name != b"content-length" for name, _ in message["headers"])
            if is_endless:
                cycle.chunked_encoding = False
        elif is_endless:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    await app(scope, receive, send_plainly)
