"""Leaving early, full queues, refusals and stopping."""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from serve.backends.protocol import Backend, BackendUnavailableError, QueueFullError
from serve.requests import GenerationRequest
from tests.serve.backends.backend_client import (
    TIMEOUT_S,
    all_blocks_are_back,
    ask,
    collect,
    ends,
    run,
    said,
    until,
)

MakeBackend = Callable[..., Backend]
LONG = 1500
"""Tokens that take a backend longer than a busy machine may hold up the event loop."""


def test_aborted_sequence_ends_and_its_sibling_goes_on(backend: Backend) -> None:
    request = ask(num_sequences=2, max_tokens=LONG)

    async def main() -> None:
        alone = await collect(backend, request)
        outputs = []
        async with aclosing(backend.generate(request)) as steps:
            async for step in steps:
                outputs += step
                for request_id, index in (("a", 0), ("a", 7), ("a", -1), ("unknown", 1)):
                    backend.abort_sequence(request_id, index)
        assert ends(outputs) == {0: "abort", 1: "length"}
        assert len(said(outputs, 0)) < LONG
        assert said(outputs, 1) == said(alone, 1)

    run(main())


@pytest.mark.parametrize("way", ["closed", "cancelled"])
def test_request_that_is_left_leaves_nothing_behind(way: str, backend: Backend) -> None:
    async def read(request: GenerationRequest) -> None:
        async with aclosing(backend.generate(request)) as steps:
            async for _ in steps:
                started.set()
                if way == "closed":
                    return

    started = asyncio.Event()

    async def main() -> None:
        task = asyncio.create_task(read(ask(max_tokens=LONG, num_sequences=3)))
        await started.wait()
        if way == "cancelled":
            task.cancel()
        await asyncio.wait([task])
        await until(lambda: all_blocks_are_back(backend))
        assert len(said(await collect(backend, ask()))) == 6

    run(main())


def test_full_queue_refuses_until_somebody_leaves_it(make_backend: MakeBackend) -> None:
    backend = make_backend(max_running_sequences=1, max_waiting_requests=2)

    async def main() -> None:
        async with aclosing(backend.generate(ask("running", max_tokens=LONG))) as steps:
            await anext(steps)
            waiting = [asyncio.create_task(collect(backend, ask(name))) for name in ("b", "c")]
            await until(lambda: backend.stats().num_waiting_requests == 2)
            with pytest.raises(QueueFullError, match="2 requests are waiting") as caught:
                await collect(backend, ask("d"))
            assert caught.value.retry_after_s >= 1
            waiting[0].cancel()
            await asyncio.wait(waiting[:1])
            assert backend.stats().num_waiting_requests == 1
            waiting.append(asyncio.create_task(collect(backend, ask("d"))))
            await until(lambda: backend.stats().num_waiting_requests == 2)
        for task in waiting[1:]:
            assert len(said(await task)) == 6
        await until(lambda: all_blocks_are_back(backend))

    run(main())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": [1, -1]}, "prompt token ids must be 0 to 259"),
        ({"prompt": [260]}, "prompt token ids must be 0 to 259"),
        ({"max_tokens": 2048}, r"at most 2048 tokens together, got 3 \+ 2048"),
        ({"arms": ()}, "a request must have at least one arm"),
        ({"num_sequences": 0}, "num_sequences must be at least 1, got 0"),
        ({"adapter_scale": 1.5}, "adapter_scale must be 0 to 1, got 1.5"),
        ({"adapter_scale": float("nan")}, "adapter_scale must be 0 to 1, got nan"),
        ({"seed": None}, "max_tokens and seed must be set"),
    ],
    ids=["id_negative", "id_too_big", "too_long", "no_arms", "no_sequences", "scale_above_one",
         "scale_nan", "no_seed"],
)  # fmt: skip
def test_request_that_could_never_run_is_refused(
    fields: dict[str, Any], message: str, backend: Backend
) -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match=message):
            await collect(backend, ask(**fields))

    run(main())


def test_request_id_in_use_is_refused(backend: Backend) -> None:
    async def main() -> None:
        async with aclosing(backend.generate(ask("same", max_tokens=LONG))) as steps:
            await anext(steps)
            with pytest.raises(ValueError, match="request_id 'same' is in use"):
                await collect(backend, ask("same"))
        assert len(said(await collect(backend, ask("same")))) == 6

    run(main())


def test_drain_lets_everything_finish_and_refuses_new_requests(make_backend: MakeBackend) -> None:
    backend = make_backend(max_running_sequences=1)

    async def main() -> None:
        tasks = [asyncio.create_task(collect(backend, ask(name))) for name in ("a", "b")]
        await asyncio.sleep(0)
        drain = asyncio.create_task(backend.drain(TIMEOUT_S))
        await until(lambda: backend.stats().is_draining)
        with pytest.raises(BackendUnavailableError, match="shutting down"):
            await collect(backend, ask("late"))
        await drain
        assert [ends(outputs) for outputs in await asyncio.gather(*tasks)] == [{0: "length"}] * 2
        await backend.drain(0.0)
        assert all_blocks_are_back(backend)

    run(main())


def test_drain_aborts_what_is_left_when_time_is_up(make_backend: MakeBackend) -> None:
    backend = make_backend()

    async def main() -> None:
        task = asyncio.create_task(collect(backend, ask(max_tokens=LONG, num_sequences=2)))
        await asyncio.sleep(0)
        await backend.drain(0.0)
        assert ends(await task) == {0: "abort", 1: "abort"}
        assert all_blocks_are_back(backend)

    run(main())
