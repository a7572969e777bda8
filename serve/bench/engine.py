"""Run several token streams at once on an engine in this process."""

import asyncio
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

from decoding import ParameterError, SamplingParams, parse_strategy
from serve.backends.protocol import Backend, BackendUnavailableError, QueueFullError
from serve.bench.streams import BenchmarkError, Decoding, PlanError
from serve.requests import Arm, GenerationRequest
from stats.timings import StreamTiming


class EngineStreams:
    """Streams of a backend in this process: the engine as the server runs it, without the API.

    Args:
        backend: what runs the streams.
        decoding: how tokens are chosen.
        adapter: name of the adapter or variant that is measured, or None for the base.
    """

    def __init__(self, backend: Backend, decoding: Decoding, adapter: str | None = None) -> None:
        self._backend = backend
        self._decoding = decoding
        self._adapter = adapter
        self._numbers = count()

    async def token_pool(self) -> Sequence[int]:
        """Give every token id of the model."""
        return range(self._backend.vocab_size)

    async def run(self, prompts: Sequence[list[int]], num_tokens: int) -> list[StreamTiming]:
        """Run one stream for each prompt, all at once, of exactly `num_tokens` tokens each.

        Raises:
            BenchmarkError: the backend refuses or breaks off a stream.
        """
        try:
            streams = (self._stream(ids, num_tokens) for ids in prompts)
            return list(await asyncio.gather(*streams))
        except (BackendUnavailableError, QueueFullError) as error:
            raise BenchmarkError(f"the engine refuses a stream: {error}") from error

    async def _stream(self, prompt: list[int], num_tokens: int) -> StreamTiming:
        number = next(self._numbers)
        params = stream_params(self._decoding, num_tokens=num_tokens, seed=number)
        request = GenerationRequest(
            request_id=f"bench-{id(self)}-{number}",
            prompt_token_ids=prompt,
            arms=(Arm(params=params, adapter=self._adapter),),
        )
        arrivals: list[float] = []
        counts: list[int] = []
        total = 0
        sent = time.perf_counter()
        async for outputs in self._backend.generate(request):
            now = time.perf_counter()
            new = sum(output.token_id is not None for output in outputs)
            if new:
                total += new
                arrivals.append(now)
                counts.append(total)
        if total != num_tokens:
            raise BenchmarkError(f"a stream ended after {total} of {num_tokens} tokens")
        return StreamTiming(sent_s=sent, arrivals_s=tuple(arrivals), token_counts=tuple(counts))


def stream_params(decoding: Decoding, *, num_tokens: int, seed: int) -> SamplingParams:
    """Build the parameters of a stream that ends at `num_tokens` and nowhere else.

    Raises:
        PlanError: the decoding has a strategy or a value that does not exist.
    """
    chosen: dict[str, Any] = {}
    try:
        if decoding.temperature is not None:
            chosen["temperature"] = decoding.temperature
        if decoding.strategy is not None:
            chosen["strategy"] = parse_strategy(decoding.strategy)
        if decoding.top_p is not None:
            chosen["top_p"] = decoding.top_p
        return SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=seed, **chosen)
    except ParameterError as error:
        raise PlanError(str(error)) from error
