"""Streams of an engine in this process."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from decoding import SamplingParams
from serve.backends.protocol import QueueFullError
from serve.bench.engine import EngineStreams, stream_params
from serve.bench.streams import BenchmarkError, Decoding, PlanError
from serve.requests import GenerationRequest, TokenOutput


def test_streams_are_greedy_unless_told_otherwise() -> None:
    params = stream_params(Decoding(), num_tokens=7, seed=1)
    assert params == SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True, seed=1)


def test_streams_are_sampled_as_told() -> None:
    params = stream_params(Decoding(temperature=0.8, top_p=0.95), num_tokens=7, seed=1)
    assert (params.temperature, params.top_p) == (0.8, 0.95)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(temperature=-1.0),
        Decoding(strategy={"strategy": "warm"}),
        Decoding(temperature=1.0, top_p=7.0),
    ],
    ids=["temperature", "strategy", "top_p"],
)
def test_decoding_that_does_not_exist_is_refused(decoding: Decoding) -> None:
    with pytest.raises(PlanError, match="temperature|decoding.strategy must be one of|top_p"):
        stream_params(decoding, num_tokens=7, seed=1)


class ScriptedBackend:
    """Answers every request with the same outputs, or refuses it."""

    vocab_size = 64

    def __init__(self, outputs: list[TokenOutput], *, is_full: bool = False) -> None:
        self._outputs = outputs
        self._is_full = is_full

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenOutput], None]:
        if self._is_full:
            raise QueueFullError("the queue is full", 1)
        for output in self._outputs:
            yield [output]


@pytest.mark.parametrize(
    ("is_full", "message"),
    [(False, "a stream ended after 1 of 2 tokens"), (True, "the engine refuses a stream")],
    ids=["short", "full"],
)
def test_engine_streams_report_a_stream_that_breaks_off(is_full: bool, message: str) -> None:
    outputs = [
        TokenOutput(sequence_index=0, token_id=1),
        TokenOutput(sequence_index=0, token_id=None, finish_reason="abort"),
    ]
    runner = EngineStreams(ScriptedBackend(outputs, is_full=is_full), Decoding())
    with pytest.raises(BenchmarkError, match=message):
        asyncio.run(runner.run([[1, 2]], 2))
