"""What the tests of backends ask of one."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any

from decoding import SamplingParams
from serve.backends.protocol import Backend
from serve.requests import Arm, GenerationRequest, TokenOutput

TIMEOUT_S = 30


def ask(request_id: str = "a", prompt: list[int] | None = None, **fields: Any) -> GenerationRequest:
    params = {"seed": 3, "max_tokens": 6, "ignore_eos": True}
    arm = {}
    for name in tuple(fields):
        if name in SamplingParams.__dataclass_fields__:
            params[name] = fields.pop(name)
        elif name in Arm.__dataclass_fields__:
            arm[name] = fields.pop(name)
    fields.setdefault("arms", (Arm(params=SamplingParams(**params), **arm),))
    return GenerationRequest(request_id=request_id, prompt_token_ids=prompt or [1, 2, 3], **fields)


def make_arm(adapter: str | None = None, scale: float = 1.0, **fields: Any) -> Arm:
    params = SamplingParams(**({"seed": 5, "max_tokens": 6, "ignore_eos": True} | fields))
    return Arm(params=params, adapter=adapter, adapter_scale=scale)


async def collect(backend: Backend, request: GenerationRequest) -> list[TokenOutput]:
    async with aclosing(backend.generate(request)) as steps:
        return [output async for outputs in steps for output in outputs]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.001)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


def all_blocks_are_back(backend: Backend) -> bool:
    stats = backend.stats()
    return (
        stats.num_free_cache_blocks == stats.num_cache_blocks
        and stats.num_free_side_cache_blocks == stats.num_side_cache_blocks
        and stats.num_running_sequences == stats.num_waiting_requests == 0
    )


def said(outputs: list[TokenOutput], index: int = 0) -> list[int]:
    """Return the tokens of one sequence."""
    return [o.token_id for o in outputs if o.sequence_index == index and o.token_id is not None]


def ends(outputs: list[TokenOutput]) -> dict[int, str]:
    """Return why each sequence has ended; it ends once, with its last output."""
    found: dict[int, str] = {}
    for output in outputs:
        assert output.sequence_index not in found
        if output.finish_reason is not None:
            found[output.sequence_index] = output.finish_reason
    return found
