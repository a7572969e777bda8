"""Run several token streams at once on a server and note when their tokens arrive.

The client shares the processor with the server it measures, so it does next to nothing while
streams run: bytes are stamped as they come and parsed once all streams have ended.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import httptools

from serve.cli.arguments import UserError
from serve.cli.bench_timing import BenchmarkError, Decoding, StreamTiming

READ_BYTES = 65536
SAMPLE_TEXT = """The quick brown fox jumps over the lazy dog while 1024 sailors mend their nets near
the old harbour. def add(left: int, right: int) -> int: return left + right. Seven canoes crossed
the lagoon; nobody counted the waves, yet every helmsman knew wind, reef and the names of stars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The bytes of one HTTP response.

    Attributes:
        sent_s: when the request was sent.
        pieces: what was read, each with the time it came.
    """

    sent_s: float
    pieces: list[tuple[float, bytes]]

    def body(self) -> list[tuple[float, bytes]]:
        """Give the pieces of the body, each with the time it came.

        Raises:
            BenchmarkError: not HTTP, cut short, or a status other than 200.
        """
        reader = _BodyReader()
        parser = httptools.HttpResponseParser(reader)
        try:
            for at, data in self.pieces:
                reader.now_s = at
                parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise BenchmarkError(f"the server does not answer in HTTP: {error}") from error
        text = b"".join(data for _, data in reader.body)
        if self.pieces and parser.get_status_code() != 200:
            message = text.decode(errors="replace")[:300]
            raise BenchmarkError(f"the server answered {parser.get_status_code()}: {message}")
        if not reader.is_complete:
            raise BenchmarkError("the server closed the connection before its answer was complete")
        return reader.body

    def json(self) -> Any:
        """Parse the whole body.

        Raises:
            BenchmarkError: as for `body`, or no JSON.
        """
        text = b"".join(data for _, data in self.body())
        try:
            return json.loads(text)
        except ValueError as error:
            raise BenchmarkError(f"the server does not answer in JSON: {error}") from error

    def timing(self, num_tokens: int) -> StreamTiming:
        """Read a streamed completion.

        Args:
            num_tokens: tokens the usage chunk must report.

        Raises:
            BenchmarkError: as for `body`, an error in the stream, or another number of tokens.
        """
        arrivals: list[float] = []
        usage: dict[str, int] | None = None
        buffer = b""
        for at, data in self.body():
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                chunk = json.loads(line[5:])
                if "error" in chunk:
                    raise BenchmarkError(f"the server reported an error: {chunk['error']}")
                usage = chunk.get("usage") or usage
                if any(choice["text"] for choice in chunk["choices"]):
                    arrivals.append(at)
        total = usage["completion_tokens"] if usage else None
        if total != num_tokens:
            raise BenchmarkError(f"the server reports {total} tokens of {num_tokens} in its usage")
        share = num_tokens / max(1, len(arrivals))
        return StreamTiming(
            sent_s=self.sent_s,
            arrivals_s=tuple(arrivals),
            token_counts=tuple((i + 1) * share for i in range(len(arrivals))),
        )


class _BodyReader:
    """Collects a response's body for httptools, whose callbacks these are."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.body: list[tuple[float, bytes]] = []
        self.is_complete = False

    def on_body(self, data: bytes) -> None:
        self.body.append((self.now_s, data))

    def on_message_complete(self) -> None:
        self.is_complete = True


class HttpStreams:
    """Streams of a server with the OpenAI completions API; each is a connection of its own.

    Args:
        url: address of the server, with or without the ending /v1.
        decoding: how tokens are chosen.
        model: model id, or None for the first that the server lists.
        api_key: sent as a bearer token, or None.

    Raises:
        UserError: the address is none.
    """

    def __init__(
        self, url: str, decoding: Decoding, *, model: str | None, api_key: str | None
    ) -> None:
        address = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(address)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--url: {url!r} is not an address such as http://127.0.0.1:8000")
        self.url = address
        self._is_tls = parts.scheme == "https"
        self._host = parts.hostname
        self._port = port or (443 if self._is_tls else 80)
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._decoding = decoding
        self._model = model
        self._api_key = api_key
        self._seeds = count()

    async def model(self) -> str:
        """Give the model id that is measured."""
        if self._model is None:
            listed = (await self.request("GET", "/v1/models")).json()
            self._model = str(listed["data"][0]["id"])
        return self._model

    async def token_pool(self) -> Sequence[int]:
        """Give the token ids of a few sentences: valid whatever the server's vocabulary."""
        body = {"model": await self.model(), "prompt": SAMPLE_TEXT}
        tokens: list[int] = (await self.request("POST", "/tokenize", body)).json()["tokens"]
        return tokens

    async def run(self, prompts: Sequence[list[int]], num_tokens: int) -> list[StreamTiming]:
        """Run one stream for each prompt, all at once, of exactly `num_tokens` tokens each."""
        fields = {
            "model": await self.model(),
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._decoding.request_fields(),
        }
        bodies = [{**fields, "prompt": ids, "seed": next(self._seeds)} for ids in prompts]
        replies = await asyncio.gather(
            *(self.request("POST", "/v1/completions", body) for body in bodies)
        )
        return [reply.timing(num_tokens) for reply in replies]

    async def resident_bytes(self) -> int | None:
        """Give the server's resident memory from its metrics, or None where it tells none."""
        try:
            pieces = (await self.request("GET", "/metrics")).body()
        except BenchmarkError:
            return None
        for line in b"".join(data for _, data in pieces).decode(errors="replace").splitlines():
            name, _, value = line.partition(" ")
            if name == "process_resident_memory_bytes":
                return int(float(value))
        return None

    async def request(self, method: str, path: str, body: object = None) -> Reply:
        """Send a request and read the response to its end.

        Raises:
            BenchmarkError: no connection.
        """
        content = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{method} {self._root}{path} HTTP/1.1",
            f"Host: {self._host}:{self._port}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
            "Connection: close",
        ]
        if self._api_key:
            head.append(f"Authorization: Bearer {self._api_key}")
        pieces: list[tuple[float, bytes]] = []
        try:
            reader, writer = await asyncio.open_connection(
                self._host, self._port, ssl=self._is_tls or None
            )
            sent = time.perf_counter()
            writer.write("\r\n".join([*head, "", ""]).encode("latin-1") + content)
            while data := await reader.read(READ_BYTES):
                pieces.append((time.perf_counter(), data))
            writer.close()
        except OSError as error:
            raise BenchmarkError(f"cannot talk to {self.url}: {error}") from error
        return Reply(sent_s=sent, pieces=pieces)
