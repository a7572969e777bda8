"""Calling an ASGI application without a network."""

import asyncio
import json
from typing import Any

import pytest

from serve.cli.arguments import CommandError, UserError
from serve.cli.in_process import stream_completion


def make_app(status: int, *parts: bytes) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = await receive()
        assert json.loads(request["body"]) == {"prompt": "x", "stream": True}
        assert dict(scope["headers"])[b"content-length"] == str(len(request["body"])).encode()
        await send({"type": "http.response.start", "status": status, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return app


def collect(app: Any) -> list[dict[str, Any]]:
    async def read() -> list[dict[str, Any]]:
        return [c async for c in stream_completion(app, "/v1/completions", {"prompt": "x"})]

    return asyncio.run(read())


def test_chunks_are_found_across_messages() -> None:
    app = make_app(200, b'data: {"a"', b': 1}\n\n: ping\n\ndata: {"a": 2}\n\nda', b"ta: [DONE]\n\n")
    assert collect(app) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(("status", "kind"), [(400, UserError), (503, CommandError)])
def test_refusal_raises_its_message(status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="^no such field$"):
        collect(make_app(status, b'{"error": {"message": ', b'"no such field"}}'))


def test_error_within_the_stream_raises_its_message() -> None:
    with pytest.raises(CommandError, match="^broken$"):
        collect(make_app(200, b'data: {"a": 1}\n\n', b'data: {"error": {"message": "broken"}}\n\n'))


def test_failure_of_the_application_is_not_swallowed() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError, match="bug"):
        collect(app)
