"""Call an ASGI application in this process, as a client would over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from serve.cli.arguments import CommandError, UserError


async def stream_completion(
    app: Any, path: str, body: dict[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """Yield the chunks of a streamed completion.

    Args:
        app: an ASGI application.
        path: where to post, for example "/v1/completions".
        body: the request; `stream` is added.

    Raises:
        UserError: the request is refused with a 4xx status.
        CommandError: it fails with another status, or within the stream.
    """
    received: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    content = json.dumps({**body, "stream": True}).encode()
    requests = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()
        raise AssertionError("the client of this process never disconnects")

    async def send(message: Any) -> None:
        await received.put(message)

    async def call() -> None:
        try:
            await app(_scope(path, len(content)), receive, send)
        finally:
            await received.put(None)

    task = asyncio.create_task(call())
    try:
        status, rest = 0, b""
        while (message := await received.get()) is not None:
            if message["type"] == "http.response.start":
                status = message["status"]
                continue
            rest += message.get("body", b"")
            if status == 200:
                *events, rest = rest.split(b"\n\n")
                for event in events:
                    chunk = _parse_event(event)
                    if chunk is not None:
                        yield chunk
        await task
        if status != 200:
            error = json.loads(rest)["error"]["message"]
            raise UserError(error) if 400 <= status < 500 else CommandError(error)
    finally:
        task.cancel()


def _parse_event(event: bytes) -> dict[str, Any] | None:
    data = event.removeprefix(b"data:").strip()
    if not event.startswith(b"data:") or data == b"[DONE]":
        return None
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        raise CommandError(chunk["error"]["message"])
    return chunk


def _scope(path: str, length: int) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"content-length", str(length).encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }
