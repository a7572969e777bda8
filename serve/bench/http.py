"""Run several token streams at once on a server and note when their tokens arrive."""

import asyncio
from collections.abc import Sequence
from itertools import count

from client.api import ApiClient
from client.errors import RequestError
from client.recording import Recording, record_stream
from serve.bench.streams import BenchmarkError, Decoding
from stats.timings import StreamTiming

SAMPLE_TEXT = """The quick brown fox jumps over the lazy dog while 1024 sailors mend their nets near
the old harbour. def add(left: int, right: int) -> int: return left + right. Seven canoes crossed
the lagoon; nobody counted the waves, yet every helmsman knew wind, reef and the names of stars."""


class HttpStreams:
    """Streams of a server with the OpenAI completions API; each is a connection of its own.

    Args:
        client: of the server.
        decoding: how tokens are chosen.
        model: model id, or None for the first that the server lists.
        key: sent as a bearer token unless empty.
    """

    def __init__(
        self, client: ApiClient, decoding: Decoding, *, model: str | None, key: str
    ) -> None:
        self._client = client
        self._decoding = decoding
        self._model = model
        self._key = key
        self._seeds = count()

    async def model(self) -> str:
        """Give the model id that is measured."""
        if self._model is None:
            entries = await self._client.entries("/v1/models", key=self._key)
            if not entries:
                raise BenchmarkError(f"the server at {self._client.url} lists no model")
            self._model = str(entries[0].get("id"))
        return self._model

    async def token_pool(self) -> Sequence[int]:
        """Give the token ids of a few sentences: valid whatever the server's vocabulary."""
        body = {"model": await self.model(), "prompt": SAMPLE_TEXT}
        answer = await self._client.request("POST", "/tokenize", key=self._key, body=body)
        tokens: list[int] = answer["tokens"]
        return tokens

    async def run(self, prompts: Sequence[list[int]], num_tokens: int) -> list[StreamTiming]:
        """Run one stream for each prompt, all at once, of exactly `num_tokens` tokens each.

        Raises:
            RequestError: the server refuses a stream or breaks it off.
            BenchmarkError: a stream has another number of tokens.
        """
        fields = {
            "model": await self.model(),
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._decoding.request_fields(),
        }
        bodies = [{**fields, "prompt": ids, "seed": next(self._seeds)} for ids in prompts]
        recordings = await asyncio.gather(
            *(record_stream(self._client, "/v1/completions", b, key=self._key) for b in bodies)
        )
        return [read_timing(recording, num_tokens) for recording in recordings]

    async def resident_bytes(self) -> int | None:
        """Give the server's resident memory from its metrics, or None where it tells none."""
        try:
            metrics = await self._client.text("/metrics", key=self._key)
        except RequestError:
            return None
        for line in metrics.splitlines():
            name, _, value = line.partition(" ")
            if name == "process_resident_memory_bytes":
                return int(float(value))
        return None


def read_timing(recording: Recording, num_tokens: int) -> StreamTiming:
    """Return when the tokens of a streamed completion came.

    Args:
        recording: of the stream.
        num_tokens: tokens that the usage chunk must report.

    Raises:
        BenchmarkError: another number of tokens.
        TimingError: no token came.
    """
    usages = [chunk["usage"] for _, chunk in recording.chunks if chunk.get("usage")]
    total = usages[-1].get("completion_tokens") if usages else None
    if total != num_tokens:
        raise BenchmarkError(f"the server reports {total} tokens of {num_tokens} in its usage")
    arrivals = [
        at for at, chunk in recording.chunks if any(choice["text"] for choice in chunk["choices"])
    ]
    share = num_tokens / max(1, len(arrivals))
    return StreamTiming(
        sent_s=recording.sent_s,
        arrivals_s=tuple(arrivals),
        token_counts=tuple((i + 1) * share for i in range(len(arrivals))),
    )
