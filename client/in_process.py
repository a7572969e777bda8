"""An ASGI application in this process in place of a server; unlike httpx's own, it streams."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx

ADDRESS = "http://127.0.0.1"


class AsgiTransport(httpx.AsyncBaseTransport):
    """Answers requests by calling an application.

    Args:
        app: an ASGI application.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the response as soon as it begins; what the application raises goes through."""
        call = _Call(self._app, _scope(request), await request.aread())
        try:
            start = await call.take()
        except BaseException:
            await call.aclose()
            raise
        assert start is not None, "an application answers"
        return httpx.Response(start["status"], headers=start["headers"], stream=call)


class _Call(httpx.AsyncByteStream):
    """One call of the application, and the body of its response."""

    def __init__(self, app: Any, scope: dict[str, Any], content: bytes) -> None:
        self._sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._requests = [{"type": "http.request", "body": content, "more_body": False}]
        self._is_closed = asyncio.Event()
        self._task = asyncio.create_task(self._run(app, scope))

    async def _run(self, app: Any, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._sent.put)
        finally:
            await self._sent.put(None)

    async def _receive(self) -> dict[str, Any]:
        if self._requests:
            return self._requests.pop()
        await self._is_closed.wait()
        return {"type": "http.disconnect"}

    async def take(self) -> dict[str, Any] | None:
        """Return the next message of the application; None: it is done."""
        message = await self._sent.get()
        if message is None:
            await self._task
        return message

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self.take()) is not None:
            yield message.get("body", b"")

    async def aclose(self) -> None:
        """Tell the application that its client has gone, and end it."""
        self._is_closed.set()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def _scope(request: httpx.Request) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.partition(b"?")[0],
        "root_path": "",
        "query_string": request.url.query,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": (request.url.host, 0),
        "server": (request.url.host, 0),
        "state": {},
    }
