"""Ways to decode compared in turn, on one engine in this process."""

import os
import random
from collections.abc import Mapping
from typing import Any

from benchmarks.report import say
from serve.bench.streams import Decoding, random_prompts
from serve.config import build_config
from serve.event_loop import run_on_loop
from stats.timings import decode_rate


def decode_in_turn(
    given: Mapping[str, Any],
    decodings: Mapping[str, Decoding],
    *,
    num_streams: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
) -> dict[str, list[float]]:
    """Decode with each of them, round by round.

    The first round is the warm-up and does not count; every other one goes in the opposite order.

    Args:
        given: options of the server that are not the default, by name.
        decodings: how tokens are chosen, by name.
        num_streams: that decode at once.
        prompt_tokens: random ones, of each stream.
        new_tokens: of each stream.
        rounds: that count.

    Returns:
        Tokens per second of all streams together, for each round.
    """
    return run_on_loop(
        _decode_in_turn(given, decodings, num_streams, prompt_tokens, new_tokens, rounds)
    )


async def _decode_in_turn(
    given: Mapping[str, Any],
    decodings: Mapping[str, Decoding],
    num_streams: int,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
) -> dict[str, list[float]]:
    # Loads torch, which the other measurements leave to processes of their own.
    from serve.bench.engine import EngineStreams
    from serve.server import build_service, close_service

    service = build_service(build_config(given, environ=os.environ), report=say)
    try:
        runners = {name: EngineStreams(service.backend, how) for name, how in decodings.items()}
        rates: dict[str, list[float]] = {name: [] for name in runners}
        rng = random.Random(0)
        for number in range(1 + rounds):
            for name in sorted(runners, reverse=number % 2 == 0):
                pool = await runners[name].token_pool()
                prompts = random_prompts(pool, num_streams, prompt_tokens, rng)
                rate = decode_rate(await runners[name].run(prompts, new_tokens))
                if number:
                    rates[name].append(round(rate, 1))
    finally:
        await close_service(service)
    return rates
