"""Clients that leave, and streams that wait."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.api import ApiSettings, create_app
from text.tokenizer import Tokenizer

from .conftest import Client, FakeBackend, serve, wait_until

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
MANY = {"prompt": ["a", "b", "c"], "max_tokens": 50}
KINDS = {
    "whole": ("/v1/chat/completions", {**CHAT, "n": 2}),
    "streamed": ("/v1/chat/completions", {**CHAT, "stream": True}),
    "prompts": ("/v1/completions", MANY),
    "prompts-streamed": ("/v1/completions", {**MANY, "stream": True}),
}


class Connection:
    """One request on an ASGI application, with control over when the client leaves."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
        }
        self._body: bytes | None = json.dumps(body).encode()
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.is_broken = False

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if self.is_broken:
            raise OSError("broken pipe")
        self.sent.append(message)

    @property
    def data(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


@asynccontextmanager
async def connect(app: FastAPI, path: str, body: dict[str, Any]) -> AsyncIterator[Any]:
    connection = Connection(path, body)
    task = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
    try:
        yield connection, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
@pytest.mark.parametrize(("path", "body"), KINDS.values(), ids=KINDS)
def test_work_stops_when_the_client_leaves(
    app: FastAPI, backend: FakeBackend, path: str, body: dict[str, Any], phase: str
) -> None:
    backend.script = lambda request, index: [5] * 50

    async def run() -> None:
        backend.gate = asyncio.Semaphore(3 if phase == "decode" else 0)
        backend.queue_gate = asyncio.Event()
        if phase != "queue":
            backend.queue_gate.set()
        async with connect(app, path, body) as (connection, task):
            await wait_until(lambda: backend.num_open == len(body.get("prompt", "x")))
            if phase == "decode":
                await wait_until(lambda: backend.num_steps == 3)
            assert not task.done()
            connection.left.set()
            async with asyncio.timeout(5):
                await task
            assert backend.num_open == 0
            assert backend.num_steps == (3 if phase == "decode" else 0)

    asyncio.run(run())


def test_work_stops_when_sending_fails(app: FastAPI, backend: FakeBackend) -> None:
    backend.script = lambda request, index: [5] * 50

    async def run() -> None:
        backend.gate = asyncio.Semaphore(1)
        path, body = KINDS["streamed"]
        async with connect(app, path, body) as (connection, task):
            await wait_until(lambda: len(connection.sent) > 1)
            connection.is_broken = True
            backend.gate.release()
            async with asyncio.timeout(5):
                await task
            assert backend.num_open == 0

    asyncio.run(run())


def test_others_go_on_when_a_client_leaves(app: FastAPI, backend: FakeBackend) -> None:
    async def run() -> None:
        backend.gate = asyncio.Semaphore(0)
        path, body = KINDS["streamed"]
        async with (
            connect(app, path, body) as (first, task),
            connect(app, path, body) as (second, other),
        ):
            await wait_until(lambda: backend.num_open == 2)
            first.left.set()
            await task
            for _ in range(10):
                backend.gate.release()
            async with asyncio.timeout(5):
                await other
            assert second.data.endswith(b"data: [DONE]\n\n")

    asyncio.run(run())


def test_waiting_stream_gets_comments(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    settings = ApiSettings(model_id="smollm2", ping_interval_s=0.02)
    app = create_app(backend, tokenizer, settings=settings)

    async def run() -> None:
        backend.gate = asyncio.Semaphore(0)
        path, body = KINDS["streamed"]
        async with connect(app, path, body) as (connection, task):
            await wait_until(lambda: connection.data.count(b": ping\n\n") >= 2)
            assert connection.sent[0]["status"] == 200
            for _ in range(10):
                backend.gate.release()
            async with asyncio.timeout(5):
                await task
            events = [b for b in connection.data.split(b"\n\n") if not b.startswith(b":")]
            assert events[0].startswith(b"data: {")
            assert events[-2:] == [b"data: [DONE]", b""]

    asyncio.run(run())


def test_refusal_after_a_comment_is_an_event(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    settings = ApiSettings(model_id="smollm2", ping_interval_s=0.02)
    app = create_app(backend, tokenizer, settings=settings)

    async def run() -> None:
        backend.gate = asyncio.Semaphore(0)
        backend.failure = 0
        path, body = KINDS["streamed"]
        async with connect(app, path, body) as (connection, task):
            await wait_until(lambda: connection.data.count(b": ping\n\n") >= 1)
            backend.gate.release()
            await task
            event = connection.data.split(b"\n\n")[-2]
            assert "error" in json.loads(event.removeprefix(b"data: "))
            assert connection.sent[-1]["more_body"] is False

    asyncio.run(run())


def test_stream_writes_once_a_step(app: FastAPI, backend: FakeBackend) -> None:
    async def run() -> None:
        body = {**CHAT, "stream": True, "n": 4}
        async with connect(app, "/v1/chat/completions", body) as (connection, task):
            await task
            bodies = [m for m in connection.sent if m["type"] == "http.response.body"]
            assert len(bodies) == backend.num_steps + 2

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["whole", "streamed"])
def test_closed_socket_stops_the_work(app: FastAPI, backend: FakeBackend, kind: str) -> None:
    backend.script = lambda request, index: [5] * 200
    path, body = KINDS[kind]

    async def run(url: str) -> None:
        backend.gate = asyncio.Semaphore(0 if kind == "whole" else 2)
        async with httpx.AsyncClient() as client:
            if kind == "whole":
                with pytest.raises(httpx.ReadTimeout):
                    await client.post(url + path, json=body, timeout=0.3)
            else:
                async with client.stream("POST", url + path, json=body) as response:
                    async for _line in response.aiter_lines():
                        break
        await wait_until(lambda: backend.num_open == 0)

    with serve(app) as url:
        asyncio.run(run(url))
    assert len(backend.requests) == 1


def test_requests_run_side_by_side(app: FastAPI, backend: FakeBackend) -> None:
    assert Client(app).chat().status_code == 200

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            posts = [client.post("/v1/chat/completions", json=CHAT) for _ in range(20)]
            return await asyncio.gather(*posts)

    assert {response.status_code for response in asyncio.run(run())} == {200}
