"""The interface's client: what it makes of a server's answers."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serve.ui.client import ApiClient, RequestError

Handler = Callable[[httpx.Request], httpx.Response]


def client_of(handler: Handler) -> ApiClient:
    return ApiClient("http://127.0.0.1:1", transport=httpx.MockTransport(handler))


def get(handler: Handler, key: str = "") -> Any:
    return asyncio.run(client_of(handler).request("GET", "/v1/models", key=key))


def stream(text: str, status: int = 200) -> list[Any]:
    async def collect() -> list[Any]:
        client = client_of(lambda _: httpx.Response(status, text=text))
        return [chunk async for chunk in client.stream("/v1/compare", {})]

    return asyncio.run(collect())


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("http://h:1/v1/", "http://h:1"),
        ("https://h/v1", "https://h"),
    ],
)
def test_address_is_completed(url: str, wanted: str) -> None:
    assert ApiClient(url).url == wanted


@pytest.mark.parametrize("url", ["", "ftp://h", "http://", "http://h:x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not an address"):
        ApiClient(url)


def test_key_is_sent_only_if_there_is_one() -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={})

    for key in ("", " secret ", "k\u00e9y"):
        get(answer, key)
    assert seen == [None, "Bearer secret", "Bearer k?y"]


def test_refusal_has_the_servers_words_and_status() -> None:
    body = {"error": {"message": "temperature must be at most 2", "param": "temperature"}}
    with pytest.raises(RequestError, match="temperature must be at most 2") as caught:
        get(lambda _: httpx.Response(400, json=body))
    assert caught.value.status == 400


def test_answer_of_something_else_is_an_error() -> None:
    with pytest.raises(RequestError, match="Bad Gateway"):
        get(lambda _: httpx.Response(502, text="<html>"))
    with pytest.raises(RequestError, match="OK"):
        get(lambda _: httpx.Response(200, text="<html>"))


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (httpx.ConnectError("x"), "No server answers at http://127.0.0.1:1"),
        (httpx.ReadTimeout("x"), "does not answer in time"),
        (httpx.RemoteProtocolError("x"), "stopped or restarted"),
    ],
    ids=["refused", "late", "broken"],
)
def test_lost_connection_is_told_in_words(error: Exception, match: str) -> None:
    def fail(_: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(RequestError, match=match):
        get(fail)


def test_stream_gives_chunks_until_done() -> None:
    text = 'data: {"a": 1}\n\n: ping\n\ndata: {"a": 2}\n\ndata: [DONE]\n\ndata: {"a": 3}\n\n'
    assert stream(text) == [{"a": 1}, {"a": 2}]


def test_stream_that_ends_early_is_an_error() -> None:
    with pytest.raises(RequestError, match="before it was complete"):
        stream('data: {"a": 1}\n\n')


def test_error_in_a_stream_is_raised() -> None:
    with pytest.raises(RequestError, match="engine broke"):
        stream('data: {"error": {"message": "the engine broke"}}\n\n')


def test_refused_stream_is_raised() -> None:
    with pytest.raises(RequestError, match="no such model"):
        stream('{"error": {"message": "no such model"}}', status=404)


@pytest.mark.parametrize("data", ["[1]", "no json"])
def test_stream_of_something_else_is_an_error(data: str) -> None:
    with pytest.raises(RequestError):
        stream(f"data: {data}\n\n")
