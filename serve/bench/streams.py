"""Token streams to measure: who runs them, on which prompts, and how tokens are chosen."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stats.timings import StreamTiming


class PlanError(ValueError):
    """What is to be measured cannot be."""


class BenchmarkError(RuntimeError):
    """A measurement failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How the streams choose their tokens.

    Attributes:
        temperature: sampling temperature, 0 for greedy; None: the default of the parameters.
        strategy: a request's `decoding` object; None: the default strategy.
        top_p: see `SamplingParams`; None: the default.
    """

    temperature: float | None = 0.0
    strategy: Mapping[str, Any] | None = None
    top_p: float | None = None

    def request_fields(self) -> dict[str, Any]:
        """Give the fields of a request to the API that ask for this."""
        fields = {
            "temperature": self.temperature,
            "decoding": self.strategy,
            "top_p": self.top_p,
        }
        return {name: value for name, value in fields.items() if value is not None}


class StreamRunner(Protocol):
    """What runs a set of streams: an engine in this process, or a server."""

    async def token_pool(self) -> Sequence[int]:
        """Give the token ids that prompts may be drawn from."""

    async def run(self, prompts: Sequence[list[int]], num_tokens: int) -> list[StreamTiming]:
        """Run one stream for each prompt, all at once, of exactly `num_tokens` tokens each."""


def random_prompts(
    pool: Sequence[int], num_prompts: int, num_tokens: int, rng: random.Random
) -> list[list[int]]:
    """Draw prompts that share no prefix but by chance, so that no prefix cache helps."""
    return [rng.choices(pool, k=num_tokens) for _ in range(num_prompts)]
