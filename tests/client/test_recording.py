"""Streams recorded with their times, read after they ended."""

import asyncio
import json
import socket
import struct
from typing import Any

import pytest

from client.api import ApiClient
from client.errors import RequestError
from client.recording import Recording, read_chunks, record_stream
from tests.client.event_streams import HEAD, chunked

WHOLE = HEAD + chunked('{"a": 1}', '{"a": "\u2028\u00e9"}', "[DONE]")
CHUNKS = [{"a": 1}, {"a": "\u2028\u00e9"}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_chunks_are_the_same_however_the_bytes_came(size: int) -> None:
    cut = [WHOLE[i : i + size] for i in range(0, len(WHOLE), size)]
    found = list(read_chunks([(float(i), piece) for i, piece in enumerate(cut)]))
    assert [chunk for _, chunk in found] == CHUNKS
    first = WHOLE.index(b"}\n\n") + 2
    second = WHOLE.index(b"}\n\n", first) + 2
    assert [at for at, _ in found] == [end // size for end in (first, second)]


def test_plain_body_is_read_too() -> None:
    body = b'data: {"a": 1}\n\ndata: [DONE]\n\n'
    for head in (b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n"):
        assert list(read_chunks([(2.0, head), (3.0, body)])) == [(3.0, {"a": 1})]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"SSH-2.0-x\r\n", "does not answer in HTTP"),
        (b"", "before it was complete"),
        (HEAD + b"5\r\nda", "before it was complete"),
        (HEAD + b"zz\r\nda", "before it was complete"),
        (HEAD[:20], "before it was complete"),
        (HEAD + chunked('{"a": 1}'), "before it was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nda", "before it was complete"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nfull", "^No$"),
        (b'HTTP/1.1 503 No\r\n\r\n{"error": {"message": "full"}}', "^full$"),
        (HEAD + chunked('{"error": {"message": "gone"}}'), "^gone$"),
        (HEAD + chunked("no json"), "does not speak this API"),
    ],
    ids=["no-http", "nothing", "cut", "no-chunk", "cut-head", "no-done", "short", "status",
         "refusal", "error", "no-json"],
)  # fmt: skip
def test_what_is_no_whole_answer_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        list(read_chunks([(1.0, data)] if data else []))


async def record(answer: Any, **timeouts: float) -> tuple[Recording, bytes]:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        length = int(heads[0].lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        assert json.loads(await reader.readexactly(length)) == {"prompt": "\u00e9"}
        await answer(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        client = ApiClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", **timeouts)
        found = await record_stream(client, "/v1/completions", {"prompt": "\u00e9"}, key="k\n")
        return found, heads[0]


def test_stream_is_recorded_with_increasing_times() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        for part in (WHOLE[:70], WHOLE[70:]):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)

    recording, head = asyncio.run(record(answer))
    assert [chunk for _, chunk in recording.chunks] == CHUNKS
    times = [recording.sent_s, *(at for at, _ in recording.chunks)]
    assert times == sorted(times)
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"Bearer k\r\n" in head


def test_answer_is_whole_even_if_the_connection_breaks_after_it() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        writer.transport.abort()

    recording, _ = asyncio.run(record(answer))
    assert [chunk for _, chunk in recording.chunks] == CHUNKS


def test_server_that_falls_silent_is_told() -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE[:60])
        await asyncio.sleep(60)

    with pytest.raises(RequestError, match="does not answer in time"):
        asyncio.run(record(answer, silence_timeout_s=0.05))


def test_server_that_is_not_there_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RequestError, match=f"no server answers at http://127.0.0.1:{port}"):
        asyncio.run(record_stream(ApiClient(f"127.0.0.1:{port}"), "/x", {}))
