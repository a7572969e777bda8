"""Connections within limits, on real sockets."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.connections import ConnectionLimits, LimitedProtocol

Answer = Callable[[], Response]
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"


@contextmanager
def serve(app: Any, **limits: Any) -> Iterator[int]:
    """Serve an application with limits; give the port."""
    http: Any = partial(LimitedProtocol, limits=ConnectionLimits(**limits))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, http=http, log_config=None, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            server.force_exit = True
            thread.join()


async def say_ok(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("ok")(scope, receive, send)


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    async def parts() -> AsyncGenerator[bytes, None]:
        for text in (b"data: a\n\n", b"data: b\n\n"):
            await asyncio.sleep(0.1)
            yield text

    await StreamingResponse(parts(), media_type="text/event-stream")(scope, receive, send)


async def answer_late(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(0.5)
    await PlainTextResponse("late")(scope, receive, send)


def connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.settimeout(20)
    return client


def read_all(client: socket.socket) -> bytes:
    """Return what comes until the server closes."""
    data = b""
    while piece := client.recv(65536):
        data += piece
    return data


def ask(port: int, request: bytes) -> bytes:
    with connect(port) as client:
        client.sendall(request)
        return read_all(client)


def read_error(data: bytes, status: int) -> str:
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert b"connection: close" in head.lower()
    return json.loads(body)["error"]["code"]


HEADS = {
    "one-header": GET + b"X: " + b"a" * 9000 + b"\r\n\r\n",
    "many-headers": GET + b"X: abcdefghij\r\n" * 700 + b"\r\n",
    "path": b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "unended": GET + b"X: " + b"a" * 9000,
    "huge": GET + b"X: " + b"a" * 3_000_000,
}


@pytest.mark.parametrize("request_bytes", HEADS.values(), ids=HEADS)
def test_long_head_is_refused(request_bytes: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with serve(say_ok, max_head_bytes=8192) as port:
        assert read_error(ask(port, request_bytes), 431) == "headers_too_large"
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_head_within_the_limit_is_served_many_times_on_one_connection() -> None:
    request = GET + b"X: " + b"a" * 8000 + b"\r\n\r\n"
    with serve(say_ok, max_head_bytes=8192) as port, connect(port) as client:
        for _ in range(20):
            client.sendall(request)
            assert client.recv(65536).endswith(b"ok")


def test_long_body_is_not_taken_for_a_head() -> None:
    body = b"a" * 300_000
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with serve(say_ok, max_head_bytes=8192) as port, connect(port) as client:
        for _ in range(3):
            client.sendall(request)
            assert client.recv(65536).endswith(b"ok")


def test_connection_that_says_nothing_is_closed() -> None:
    with serve(say_ok, head_timeout_s=0.2) as port, connect(port) as client:
        assert read_all(client) == b""


def test_head_that_does_not_end_is_answered_and_closed() -> None:
    with serve(say_ok, head_timeout_s=0.2) as port:
        assert read_error(ask(port, GET), 408) == "head_timeout"


def test_head_that_comes_by_the_byte_has_no_more_time() -> None:
    with serve(say_ok, head_timeout_s=0.3) as port, connect(port) as client:
        client.sendall(GET)
        client.settimeout(0.05)
        while True:
            client.sendall(b"x")
            try:
                data = client.recv(65536)
                break
            except TimeoutError:
                continue
        assert read_error(data, 408) == "head_timeout"


def test_body_that_nobody_reads_any_more_does_not_keep_the_connection() -> None:
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n"
    with serve(say_ok, body_timeout_s=0.3) as port:
        assert ask(port, request).endswith(b"ok")


def test_answer_outlasts_the_timeouts_of_the_request() -> None:
    timeouts = {"head_timeout_s": 0.1, "body_timeout_s": 0.1, "write_timeout_s": 0.1}
    with serve(answer_late, **timeouts) as port, connect(port) as client:
        client.sendall(GET + b"\r\nGET")
        assert client.recv(65536).endswith(b"late")


def test_connections_above_the_limit_are_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    LimitedProtocol._warned_s = -1e9
    with caplog.at_level(logging.WARNING, "proa.http"), serve(say_ok, max_connections=2) as port:
        with connect(port) as first, connect(port) as second:
            for client in (first, second):
                client.sendall(GET + b"\r\n")
                assert client.recv(65536).endswith(b"ok")
            assert read_error(ask(port, GET + b"\r\n"), 503) == "too_many_connections"
        with connect(port) as freed:
            freed.sendall(GET + b"\r\n")
            assert freed.recv(65536).endswith(b"ok")
    assert [record.getMessage() for record in caplog.records] == [
        "all 2 connections are taken, further ones get status 503; see --max-connections"
    ]


def test_client_that_half_closes_gets_its_answer() -> None:
    with serve(answer_late) as port, connect(port) as client:
        client.sendall(GET + b"\r\n")
        client.shutdown(socket.SHUT_WR)
        data = read_all(client)
    assert data.endswith(b"late")
    assert data.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"").startswith(b"HTTP/1.1 200 ")


def test_client_that_half_closes_gets_its_stream() -> None:
    with serve(stream) as port, connect(port) as client:
        client.sendall(GET + b"\r\n")
        client.shutdown(socket.SHUT_WR)
        data = read_all(client)
    assert b"data: a\n\n" in data
    assert b"data: b\n\n" in data
    assert data.endswith(b"0\r\n\r\n")


def test_stream_to_an_old_client_has_no_chunk_sizes() -> None:
    with serve(stream) as port:
        head, _, body = ask(port, b"GET / HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body == b"data: a\n\ndata: b\n\n"


def test_whole_answer_to_an_old_client_has_its_length() -> None:
    with serve(say_ok) as port:
        data = ask(port, b"GET / HTTP/1.0\r\n\r\n")
    assert b"content-length: 2\r\n" in data
    assert data.endswith(b"\r\n\r\nok")


def test_answer_that_is_not_read_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    ended = threading.Event()

    async def flood(scope: Scope, receive: Receive, send: Send) -> None:
        async def parts() -> AsyncGenerator[bytes, None]:
            try:
                while True:
                    await asyncio.sleep(0)
                    yield b"a" * 65536
            finally:
                ended.set()

        await StreamingResponse(parts())(scope, receive, send)

    with (
        caplog.at_level(logging.WARNING, "proa.http"),
        serve(flood, write_timeout_s=0.3) as port,
        connect(port) as client,
    ):
        client.sendall(GET + b"\r\n")
        assert ended.wait(20)
    assert "has not read its answer" in caplog.text


def test_what_is_not_http_is_refused_in_json() -> None:
    with serve(say_ok) as port:
        assert read_error(ask(port, b"\x16\x03\x01\r\n\r\n"), 400) == "bad_http"
