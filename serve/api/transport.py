"""Responses that stop working when the client goes: one JSON value, or server-sent events."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.errors import encode_json, to_api_error

_PING = b": ping\n\n"

Result = TypeVar("Result")


class ClientGoneError(Exception):
    """The client closed the connection."""


async def run_while_connected(
    receive: Receive,
    work: Coroutine[Any, Any, Result],
    *,
    on_idle: Callable[[], Awaitable[float]] | None = None,
) -> Result:
    """Run `work`, and cancel it when the client goes.

    Args:
        receive: the ASGI channel; the body has been read from it.
        work: what to run.
        on_idle: called at once and then after as many seconds as it returns.

    Raises:
        ClientGoneError: the client went first.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        while True:
            timeout = None if on_idle is None else await on_idle()
            done, _ = await asyncio.wait(
                (worker, watcher), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if worker in done:
                return worker.result()
            if watcher in done:
                raise ClientGoneError
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JsonWhenDone(Response):
    """Send JSON once it has been computed.

    Args:
        work: computes it.
    """

    media_type = "application/json"

    def __init__(self, work: Coroutine[Any, Any, bytes]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await run_while_connected(receive, self._work)
        except ClientGoneError:
            return
        response = Response(body, media_type=self.media_type)
        with suppress(OSError):
            await response(scope, receive, send)


class EventStream(Response):
    """Send frames of server-sent events as they come.

    The status waits for the first frame, so that a request that is not admitted gets its own. An
    error after that is an event; then the stream closes, without `[DONE]`.

    Args:
        frames: whole events, one item for each write.
        ping_interval_s: seconds without data after which a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], *, ping_interval_s: float) -> None:
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            media_type=self.media_type,
        )
        del self.headers["content-length"]
        self._frames = frames
        self._ping_interval_s = ping_interval_s
        self._is_open = False
        self._last_send_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._last_send_s = time.monotonic()

        async def ping() -> float:
            if time.monotonic() - self._last_send_s >= self._ping_interval_s:
                await self._write(send, _PING)
            return max(0.001, self._last_send_s + self._ping_interval_s - time.monotonic())

        try:
            await run_while_connected(receive, self._pump(send), on_idle=ping)
        except ClientGoneError:
            return
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        try:
            async with aclosing(self._frames) as frames:
                async for frame in frames:
                    await self._write(send, frame)
        except ClientGoneError:
            raise
        except Exception as error:
            if not self._is_open:
                raise
            await self._write(send, make_event(encode_json(to_api_error(error).body())))

    async def _write(self, send: Send, data: bytes) -> None:
        self._last_send_s = time.monotonic()
        try:
            if not self._is_open:
                self._is_open = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": self.status_code,
                        "headers": self.raw_headers,
                    }
                )
            await send({"type": "http.response.body", "body": data, "more_body": True})
        except OSError as error:
            raise ClientGoneError from error


def make_event(data: bytes) -> bytes:
    """Return one server-sent event."""
    return b"data: " + data + b"\n\n"
