"""A streamed answer with the time at which each part came, for measuring a server.

A client on the server's own machine takes processor time from it. This one does next to nothing
while a stream runs, a third of what `ApiClient` does: bytes are stamped as they come, and read once
the stream has ended.
"""

import asyncio
import http.client
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from client.answers import DONE, EventParser, encode_body, parse_chunk, parse_error
from client.api import CONNECT_TIMEOUT_S, ApiClient, make_headers, unreachable
from client.errors import RequestError

Pieces = Sequence[tuple[float, bytes]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """A streamed answer, on one monotonic clock.

    Attributes:
        sent_s: when the request was sent.
        chunks: of the answer, each with the time it came.
    """

    sent_s: float
    chunks: list[tuple[float, dict[str, Any]]]


async def record_stream(
    client: ApiClient, path: str, body: dict[str, Any], *, key: str = ""
) -> Recording:
    """Run a stream to its end, on a connection of its own.

    Args:
        client: of the server.
        path: where to post.
        body: sent as JSON; asks for a stream.
        key: sent as a bearer token unless empty.

    Raises:
        RequestError: as for `ApiClient.stream`.
    """
    url = httpx.URL(client.url + path)
    is_tls = url.scheme == "https"
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            transport, recorder = await loop.create_connection(
                _Recorder, url.host, url.port or (443 if is_tls else 80), ssl=is_tls or None
            )
    except OSError as error:  # TimeoutError is one
        raise unreachable(client.url, error) from None
    try:
        sent_s = recorder.last_s = time.perf_counter()
        transport.write(_request(url, encode_body(body), key))
        await recorder.wait(client.silence_timeout_s)
    except TimeoutError:
        raise RequestError(f"the server at {client.url} does not answer in time") from None
    finally:
        transport.abort()
    return Recording(sent_s=sent_s, chunks=list(read_chunks(recorder.pieces)))


class _Recorder(asyncio.Protocol):
    """Keeps what comes, with the times."""

    def __init__(self) -> None:
        self.pieces: list[tuple[float, bytes]] = []
        self.last_s = 0.0
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.last_s = time.perf_counter()
        self.pieces.append((self.last_s, data))

    def connection_lost(self, error: Exception | None) -> None:
        # What came tells whether it was all.
        if not self._ended.done():
            self._ended.set_result(None)

    async def wait(self, silence_timeout_s: float) -> None:
        """Wait until the connection has ended.

        Raises:
            TimeoutError: nothing came for so many seconds.
        """
        while not self._ended.done():
            rest_s = self.last_s + silence_timeout_s - time.perf_counter()
            if rest_s <= 0:
                raise TimeoutError
            await asyncio.wait((self._ended,), timeout=rest_s)


def _request(url: httpx.URL, content: bytes, key: str) -> bytes:
    request = httpx.Request("POST", url, headers=make_headers(key), content=content)
    request.headers["Connection"] = "close"
    lines = [b"POST " + url.raw_path + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in request.headers.raw]
    return b"\r\n".join([*lines, b"", content])


def read_chunks(pieces: Pieces) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield the chunks of a streamed answer, each with the time it came.

    Args:
        pieces: the bytes of the HTTP response.

    Raises:
        RequestError: not HTTP, a refusal, an error inside the stream, or cut short.
    """
    source = _Source(pieces)
    response = http.client.HTTPResponse(source)  # type: ignore[arg-type]
    parser = EventParser()
    try:
        response.begin()
        if not 200 <= response.status < 300:
            raise parse_error(response.read(), response.status, response.reason)
        while piece := response.read1():
            for data in parser.feed(piece):
                if data == DONE:
                    return
                yield source.now_s, parse_chunk(data)
    except http.client.IncompleteRead:
        pass
    except http.client.HTTPException as error:
        if not isinstance(error, http.client.RemoteDisconnected):
            raise RequestError("the server does not answer in HTTP") from None
    raise RequestError("the server ended the answer before it was complete")


class _Source(io.RawIOBase):
    """Recorded bytes as `http.client` reads them from a socket, one piece at a time.

    Attributes:
        now_s: when the piece came that is being read.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.now_s = 0.0
        self._pieces = iter(pieces)
        self._rest = b""

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the file that is read; nothing is taken from a piece before the last is used."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self.now_s, self._rest = next(self._pieces, (self.now_s, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
