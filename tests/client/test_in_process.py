"""Calling an ASGI application without a network."""

import asyncio
import json
from typing import Any

import pytest

from client.api import ApiClient
from client.errors import RequestError
from client.in_process import ADDRESS, AsgiTransport


def make_app(status: int, *parts: bytes) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = await receive()
        assert json.loads(request["body"]) == {"prompt": "x", "stream": True}
        headers = dict(scope["headers"])
        assert headers[b"content-length"] == str(len(request["body"])).encode()
        assert headers[b"authorization"] == b"Bearer k"
        assert (scope["method"], scope["path"]) == ("POST", "/v1/completions")
        await send({"type": "http.response.start", "status": status, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def collect(app: Any) -> list[dict[str, Any]]:
    client = ApiClient(ADDRESS, transport=AsgiTransport(app))

    async def read() -> list[dict[str, Any]]:
        chunks = client.stream("/v1/completions", {"prompt": "x", "stream": True}, key="k")
        return [chunk async for chunk in chunks]

    return asyncio.run(read())


def test_chunks_are_found_across_messages() -> None:
    app = make_app(200, b'data: {"a"', b': 1}\n\n: ping\n\ndata: {"a": 2}\n\nda', b"ta: [DONE]\n\n")
    assert collect(app) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("status", [400, 503])
def test_refusal_raises_its_message(status: int) -> None:
    with pytest.raises(RequestError, match="^no such field$") as caught:
        collect(make_app(status, b'{"error": {"message": ', b'"no such field"}}'))
    assert caught.value.status == status


def test_error_within_the_stream_raises_its_message() -> None:
    with pytest.raises(RequestError, match="^broken$"):
        collect(make_app(200, b'data: {"a": 1}\n\n', b'data: {"error": {"message": "broken"}}\n\n'))


@pytest.mark.parametrize("has_begun", [False, True])
def test_failure_of_the_application_is_not_swallowed(has_begun: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        collect(app)


def test_chunks_come_while_the_application_runs_and_closing_ends_it() -> None:
    ended: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = b'data: {"a": 1}\n\n'
        try:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    async def take_one() -> dict[str, Any]:
        chunks = ApiClient(ADDRESS, transport=AsgiTransport(app)).stream("/x", {})
        chunk = await anext(chunks)
        await chunks.aclose()
        return chunk

    assert asyncio.run(take_one()) == {"a": 1}
    assert ended == ["ended"]
