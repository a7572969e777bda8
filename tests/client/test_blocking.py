"""The client for code without an event loop."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from client.api import ApiClient
from client.blocking import BlockingClient
from client.errors import RequestError


class Stream(httpx.AsyncByteStream):
    """Sends events, then nothing for ever; `closed` is set once nobody listens."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'data: {"a": 1}\n\ndata: {"a": 2}\n\n'
        # A process that waits takes its signals.
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        self.closed.set()


def client_of(response: httpx.Response) -> BlockingClient:
    transport = httpx.MockTransport(lambda _: response)
    return BlockingClient(ApiClient("h", transport=transport), key="k")


def test_entries_text_and_chunks_are_the_servers() -> None:
    client = client_of(httpx.Response(200, json={"data": [{"id": "m"}]}))
    assert client.entries("/v1/models") == [{"id": "m"}]
    assert client.text("/metrics") == '{"data":[{"id":"m"}]}'
    client.close()
    client = client_of(httpx.Response(200, text='data: {"a": 1}\n\ndata: [DONE]\n\n'))
    assert list(client.stream("/v1/completions", {})) == [{"a": 1}]
    client.close()


def test_refusal_is_raised() -> None:
    client = client_of(httpx.Response(401, json={"error": {"message": "no such key"}}))
    with pytest.raises(RequestError, match="no such key"):
        list(client.stream("/v1/completions", {}))
    client.close()


def test_closing_a_stream_closes_its_connection() -> None:
    source = Stream()
    client = client_of(httpx.Response(200, stream=source))
    chunks = client.stream("/v1/completions", {})
    assert next(chunks) == {"a": 1}
    assert not source.closed.is_set()
    chunks.close()
    assert source.closed.is_set()
    client.close()


def test_ctrl_c_ends_a_stream_and_the_client_goes_on(
    request: pytest.FixtureRequest,
) -> None:
    # What a shell starts in the background ignores it.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, earlier))
    source = Stream()
    answers = iter([httpx.Response(200, stream=source), httpx.Response(200, json={"data": []})])
    transport = httpx.MockTransport(lambda _: next(answers))
    client = BlockingClient(ApiClient("h", transport=transport))
    chunks = client.stream("/v1/completions", {})
    assert [next(chunks), next(chunks)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(KeyboardInterrupt):
        next(chunks)
    assert source.closed.is_set()
    assert client.entries("/v1/models") == []
    client.close()


def test_interrupt_at_the_end_of_a_call_leaves_the_loop_usable() -> None:
    """It left a callback behind that stopped the loop while the connection was being closed."""
    closed = []

    class Interrupted:
        url = "http://127.0.0.1:1"

        async def stream(self, path: str, body: object, *, key: str) -> Any:
            try:
                yield {"n": 1}
                loop = asyncio.get_running_loop()
                loop.call_soon(loop.stop)
                raise KeyboardInterrupt
            finally:
                closed.append(path)

        async def close(self) -> None:
            closed.append("client")

    client = BlockingClient(Interrupted())  # type: ignore[arg-type]
    chunks = client.stream("/x", {})
    assert next(chunks) == {"n": 1}
    with pytest.raises(KeyboardInterrupt):
        next(chunks)
    chunks.close()
    client.close()
    assert closed == ["/x", "client"]
