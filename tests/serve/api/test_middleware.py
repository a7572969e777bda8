"""Bodies are taken in before anything works on them, on every path and within limits."""

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from serve.api import ApiSettings
from serve.api.middleware import BodyMiddleware


async def say_length(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


class Sender:
    """A request whose body comes piece by piece, and its answer."""

    def __init__(self, path: str, *pieces: bytes, is_ended: bool = True) -> None:
        self.scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"",
        }  # fmt: skip
        self._pieces = list(pieces)
        self._is_ended = is_ended
        self.messages: list[Message] = []

    async def receive(self) -> Message:
        if self._pieces:
            piece = self._pieces.pop(0)
            is_last = not self._pieces and self._is_ended
            return {"type": "http.request", "body": piece, "more_body": not is_last}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def answer(self) -> tuple[int, bytes]:
        return self.messages[0]["status"], self.messages[1]["body"]


def make(**settings: Any) -> BodyMiddleware:
    return BodyMiddleware(say_length, ApiSettings(model_id="m", **settings))


async def run(middleware: BodyMiddleware, sender: Sender) -> tuple[int, bytes]:
    await middleware(sender.scope, sender.receive, sender.send)
    return sender.answer


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/ui/gradio_api/queue/join", "/ui/x"])
def test_body_limit_holds_on_every_path(path: str) -> None:
    middleware = make(max_body_bytes=1024)
    whole = asyncio.run(run(middleware, Sender(path, b"a" * 1000, b"a" * 24)))
    assert whole == (200, b"1024")
    status, body = asyncio.run(run(middleware, Sender(path, b"a" * 1000, b"a" * 25)))
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/ui/gradio_api/queue/join"])
def test_body_timeout_holds_on_every_path(path: str) -> None:
    slow = Sender(path, b"a", is_ended=False)
    status, body = asyncio.run(run(make(body_timeout_s=0.05), slow))
    assert (status, json.loads(body)["error"]["code"]) == (408, "body_timeout")


@pytest.mark.parametrize("path", ["/ui/gradio_api/queue/join", "/health"])
def test_bodies_without_a_key_are_bounded_together(path: str) -> None:
    async def send_all() -> None:
        middleware = make(max_body_bytes=1024, max_keyless_bodies=2)
        held = [Sender(path, b"a" * 1000, is_ended=False) for _ in range(2)]
        tasks = [asyncio.create_task(run(middleware, sender)) for sender in held]
        await asyncio.sleep(0)
        assert (await run(middleware, Sender(path, b"a" * 1000)))[0] == 503
        assert (await run(middleware, Sender("/v1/models", b"a" * 1000)))[0] == 200
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await run(middleware, Sender(path, b"a" * 1000)) == (200, b"1000")

    asyncio.run(send_all())
