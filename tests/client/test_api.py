"""The asynchronous client: what it sends, and what it makes of a server's answers."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from client.api import ApiClient
from client.errors import RequestError

Handler = Callable[[httpx.Request], httpx.Response]


def client_of(handler: Handler) -> ApiClient:
    return ApiClient("http://127.0.0.1:1", transport=httpx.MockTransport(handler))


def get(handler: Handler, key: str = "") -> Any:
    return asyncio.run(client_of(handler).request("GET", "/v1/models", key=key))


def stream(content: Any, status: int = 200) -> list[Any]:
    async def collect() -> list[Any]:
        client = client_of(lambda _: httpx.Response(status, content=content))
        return [chunk async for chunk in client.stream("/v1/compare", {})]

    return asyncio.run(collect())


def test_key_is_sent_only_if_there_is_one() -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={})

    for key in ("", " secret ", "k\u00e9y", "a\r\nX-Evil: b"):
        get(answer, key)
    assert seen == [None, "Bearer secret", "Bearer k?y", "Bearer a??X-Evil:?b"]


def test_body_is_sent_as_json() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["content-type"] == "application/json"
        return httpx.Response(200, content=request.content)

    body = {"prompt": "caf\u00e9 \udcff", "n": 2}
    client = client_of(answer)
    assert asyncio.run(client.request("POST", "/v1/completions", body=body)) == body


def test_refusal_has_the_servers_words_status_code_and_field() -> None:
    error = {"message": "temperature must be at most 2", "param": "temperature", "code": "x"}
    with pytest.raises(RequestError, match="temperature must be at most 2") as caught:
        get(lambda _: httpx.Response(400, json={"error": error}))
    found = caught.value
    assert (found.status, found.param, found.code) == (400, "temperature", "x")


def test_answer_of_something_else_is_an_error() -> None:
    with pytest.raises(RequestError, match="Bad Gateway"):
        get(lambda _: httpx.Response(502, text="<html>"))
    with pytest.raises(RequestError, match="does not speak this API"):
        get(lambda _: httpx.Response(200, text="<html>"))
    with pytest.raises(RequestError, match="does not speak this API"):
        get(lambda _: httpx.Response(200, content=b"\xff"))


@pytest.mark.parametrize("answer", [{}, [], {"data": 1}, {"data": [1]}])
def test_list_of_something_else_is_an_error(answer: object) -> None:
    client = client_of(lambda _: httpx.Response(200, json=answer))
    with pytest.raises(RequestError, match="/v1/models is no list"):
        asyncio.run(client.entries("/v1/models"))


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (httpx.ConnectError("x"), "no server answers at http://127.0.0.1:1; start one"),
        (httpx.ConnectError("[SSL: X] bad"), r"no server answers at .* \(\[SSL: X\] bad\)"),
        (httpx.ReadTimeout("x"), "does not answer in time"),
        (httpx.RemoteProtocolError("x"), "stopped or restarted"),
    ],
    ids=["refused", "certificate", "late", "broken"],
)
def test_lost_connection_is_told_in_words(error: Exception, match: str) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(RequestError, match=match):
        get(fail)


def test_error_of_the_library_is_not_quoted() -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.LocalProtocolError(f"Illegal header value {request.headers!r}")

    with pytest.raises(RequestError) as caught:
        get(fail, key="hush")
    assert "hush" not in str(caught.value)
    assert caught.value.__suppress_context__


def silent_client(**timeouts: float) -> tuple[ApiClient, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    return ApiClient(f"127.0.0.1:{listener.getsockname()[1]}", **timeouts), listener


def test_server_that_never_answers_is_told() -> None:
    client, listener = silent_client(answer_timeout_s=0.05)
    with listener, pytest.raises(RequestError, match="does not answer in time"):
        asyncio.run(client.request("GET", "/v1/models"))


def test_server_that_dribbles_is_told() -> None:
    async def dribble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        with suppress(OSError):
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.01)

    async def ask() -> None:
        async with await asyncio.start_server(dribble, "127.0.0.1", 0) as server:
            url = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            client = ApiClient(url, answer_timeout_s=0.1, silence_timeout_s=60)
            await client.request("GET", "/v1/models")

    with pytest.raises(RequestError, match="does not answer in time"):
        asyncio.run(ask())


def test_stream_that_falls_silent_is_told() -> None:
    client, listener = silent_client(silence_timeout_s=0.05)
    with listener, pytest.raises(RequestError, match="does not answer in time"):
        asyncio.run(anext(client.stream("/v1/completions", {})))


def test_stream_gives_chunks_until_done() -> None:
    text = 'data: {"a": 1}\n\n: ping\n\ndata: {"a": 2}\n\ndata: [DONE]\n\ndata: {"a": 3}\n\n'
    assert stream(text) == [{"a": 1}, {"a": 2}]


def test_stream_keeps_separators_of_lines_within_text() -> None:
    data = '{"a": "x\u2028y\u0085z\u00e9"}'.encode()

    async def cut() -> AsyncIterator[bytes]:
        for byte in b"data: " + data + b"\n\ndata: [DONE]\n\n":
            yield bytes([byte])

    assert stream(cut()) == [{"a": "x\u2028y\u0085z\u00e9"}]


def test_stream_that_ends_early_is_an_error() -> None:
    with pytest.raises(RequestError, match="before it was complete"):
        stream('data: {"a": 1}\n\n')


def test_error_in_a_stream_is_raised() -> None:
    with pytest.raises(RequestError, match="engine broke"):
        stream('data: {"error": {"message": "the engine broke"}}\n\n')


def test_refused_stream_is_raised() -> None:
    with pytest.raises(RequestError, match="no such model") as caught:
        stream('{"error": {"message": "no such model"}}', status=404)
    assert caught.value.status == 404


@pytest.mark.parametrize("data", ["[1]", "no json"])
def test_stream_of_something_else_is_an_error(data: str) -> None:
    with pytest.raises(RequestError):
        stream(f"data: {data}\n\n")
