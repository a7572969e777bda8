"""Streams of a server."""

import asyncio
import json

import httpx
import pytest

from client.api import ApiClient
from client.errors import RequestError
from client.recording import Recording
from serve.bench.http import HttpStreams, read_timing
from serve.bench.streams import BenchmarkError, Decoding
from stats.timings import StreamTiming, TimingError
from tests.client.event_streams import HEAD, chunked


def recording(*chunks: str) -> Recording:
    timed = [(2.0 + i, json.loads(chunk)) for i, chunk in enumerate(chunks)]
    return Recording(sent_s=1.0, chunks=timed)


def text_chunk(text: str, finish_reason: str | None = None) -> str:
    return json.dumps({"choices": [{"text": text, "finish_reason": finish_reason}]})


def usage_chunk(tokens: int) -> str:
    return json.dumps({"choices": [], "usage": {"completion_tokens": tokens}})


def test_timing_spreads_the_usage_over_the_text() -> None:
    found = read_timing(recording(text_chunk("a"), text_chunk("bc", "length"), usage_chunk(4)), 4)
    assert found == StreamTiming(sent_s=1.0, arrivals_s=(2.0, 3.0), token_counts=(2.0, 4.0))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([text_chunk("a"), usage_chunk(1)], "reports 1 tokens of 2"),
        ([text_chunk("a")], "reports None tokens of 2"),
        ([text_chunk("a"), '{"choices": [], "usage": {}}'], "reports None tokens of 2"),
    ],
    ids=["other", "no-usage", "empty-usage"],
)
def test_timing_refuses_another_number_of_tokens(chunks: list[str], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        read_timing(recording(*chunks), 2)


def test_timing_refuses_a_stream_without_text() -> None:
    with pytest.raises(TimingError, match="ended without a token"):
        read_timing(recording(text_chunk(""), usage_chunk(2)), 2)


def test_http_streams_send_each_prompt_and_read_the_usage() -> None:
    requests: list[tuple[bytes, dict[str, object]]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        content = await reader.readexactly(length)
        requests.append((head, json.loads(content or b"{}")))
        line = head.split(b"\r\n")[0]
        if b"/v1/models" in line:
            body, kind = json.dumps({"data": [{"id": "m"}]}), "length"
        elif b"/tokenize" in line:
            body, kind = json.dumps({"tokens": [3, 4, 5]}), "length"
        else:
            body, kind = "", "chunked"
        if kind == "chunked":
            writer.write(HEAD + chunked(text_chunk("a"), text_chunk("b"), usage_chunk(2), "[DONE]"))
        else:
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    async def scenario() -> list[StreamTiming]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        decoding = Decoding(temperature=None, strategy={"strategy": "adapt"}, top_p=0.9)
        url = f"http://127.0.0.1:{port}/v1/"
        runner = HttpStreams(ApiClient(url), decoding, model=None, key="secret")
        assert list(await runner.token_pool()) == [3, 4, 5]
        async with server:
            return await runner.run([[3], [4, 5]], 2)

    timings = asyncio.run(scenario())
    assert [timing.token_counts[-1] for timing in timings] == [2.0, 2.0]
    heads, bodies = zip(*requests[-2:], strict=True)
    assert sorted(body["prompt"] for body in bodies) == [[3], [4, 5]]
    assert all(body["decoding"] == {"strategy": "adapt"} for body in bodies)
    assert all(body["top_p"] == 0.9 for body in bodies)
    assert all(body["ignore_eos"] and "temperature" not in body for body in bodies)
    assert all(b"POST /v1/completions " in h and b"Bearer secret" in h for h in heads)


def test_http_streams_report_a_server_that_is_not_there() -> None:
    runner = HttpStreams(ApiClient("http://127.0.0.1:1"), Decoding(), model="m", key="")
    with pytest.raises(RequestError, match="no server answers at http://127.0.0.1:1"):
        asyncio.run(runner.run([[1]], 2))


def streams_of(status: int, content: str) -> HttpStreams:
    transport = httpx.MockTransport(lambda _: httpx.Response(status, text=content))
    return HttpStreams(ApiClient("h", transport=transport), Decoding(), model=None, key="")


def test_server_without_a_model_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="http://h lists no model"):
        asyncio.run(streams_of(200, '{"data": []}').model())


@pytest.mark.parametrize(
    ("status", "text", "wanted"),
    [
        (200, "# HELP x\nprocess_resident_memory_bytes 1.5e+08\n", 150_000_000),
        (200, "other 1\n", None),
        (403, "no", None),
    ],
    ids=["told", "not-told", "refused"],
)
def test_resident_memory_is_what_the_metrics_tell(
    status: int, text: str, wanted: int | None
) -> None:
    assert asyncio.run(streams_of(status, text).resident_bytes()) == wanted
