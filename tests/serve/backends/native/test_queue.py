import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from serve.backends.native import NativeBackend
from serve.backends.protocol import QueueFullError
from serve.requests import GenerationRequest, TokenOutput
from tests.serve.backends.backend_client import (
    all_blocks_are_back,
    ask,
    collect,
    run,
    until,
)

MakeBackend = Callable[..., NativeBackend]


def test_requests_in_flight_together_equal_requests_alone(
    make_backend: MakeBackend, expect: Callable[..., Any]
) -> None:
    backend = make_backend()

    async def main() -> None:
        requests = [
            ask(str(i), [i + 1] * (i + 1), seed=i, num_sequences=1 + i % 2) for i in range(8)
        ]
        answers = await asyncio.gather(*(collect(backend, request) for request in requests))
        for request, outputs in zip(requests, answers, strict=True):
            (arm,) = request.arms
            for index in range(arm.num_sequences):
                own = [output for output in outputs if output.sequence_index == index]
                expected = expect(request.prompt_token_ids, arm.params, index)
                assert [output.token_id for output in own] == expected.token_ids
                assert [output.finish_reason for output in own[:-1]] == [None] * 5
                assert own[-1].finish_reason == "length"
        assert backend.stats().generated_tokens == 72
        assert all_blocks_are_back(backend)

    run(main())


def test_outputs_carry_what_was_asked_for(make_backend: MakeBackend) -> None:
    backend = make_backend()

    async def main() -> None:
        first, *others = await collect(
            backend, ask(prompt=[1, 2, 3, 4, 5], prompt_logprobs=1, logprobs=2, is_traced=True)
        )
        assert first.prompt_logprobs is not None
        assert first.prompt_logprobs[0] is None
        assert [len(entry.top) for entry in first.prompt_logprobs[1:] if entry] == [1] * 4
        assert first.trace is not None
        assert first.trace.temperature == 1.0
        assert first.logprob is not None
        assert len(first.logprob.top) == 2
        assert all(output.prompt_logprobs is None for output in others)
        again, *_ = await collect(backend, ask(prompt=[1, 2, 3, 4, 5]))
        assert again.cached_prompt_tokens == 4
        assert (again.logprob, again.trace, again.prompt_logprobs) == (None, None, None)

    run(main())


def test_each_step_is_one_list_and_one_wake_up_of_the_loop(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        num_wake_ups = 0
        original = loop.call_soon_threadsafe

        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal num_wake_ups
            num_wake_ups += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", count)
        sizes: list[int] = []

        async def read(request: GenerationRequest) -> None:
            async with aclosing(backend.generate(request)) as steps:
                sizes.extend([len(outputs) async for outputs in steps])

        await asyncio.gather(read(ask("a", num_sequences=2)), read(ask("b", num_sequences=2)))
        assert sizes == [2] * 12
        assert num_wake_ups == backend.stats().steps < 12

    run(main())


def test_event_loop_is_free_while_a_step_runs(make_backend: MakeBackend, model: Any) -> None:
    model.gate = threading.Semaphore(0)
    backend = make_backend()

    async def main() -> None:
        task = asyncio.create_task(collect(backend, ask()))
        await until(model.is_inside.is_set)
        await collect_nothing(backend)
        assert backend.stats().num_running_sequences == 1
        model.gate.release(100)
        assert len(await task) == 6

    async def collect_nothing(backend: NativeBackend) -> None:
        other = asyncio.create_task(collect(backend, ask("b")))
        await asyncio.sleep(0.01)
        backend.abort_sequence("b", 0)
        other.cancel()
        with pytest.raises(asyncio.CancelledError):
            await other

    run(main())


@pytest.mark.parametrize("phase", ["queue", "prefill", "stream", "stream_closed"])
def test_leaving_early_frees_the_blocks_within_a_step(
    phase: str, make_backend: MakeBackend, model: Any
) -> None:
    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1)

    async def main() -> None:
        blocker = asyncio.create_task(collect(backend, ask("blocker", max_tokens=1)))
        await until(model.is_inside.is_set)
        if phase != "queue":
            model.gate.release()
            await blocker
        model.is_inside.clear()
        received: list[TokenOutput] = []

        async def read() -> None:
            request = ask(prompt=list(range(1, 41)), max_tokens=100, num_sequences=2)
            async with aclosing(backend.generate(request)) as steps:
                async for outputs in steps:
                    received.extend(outputs)
                    if phase == "stream_closed":
                        return

        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        if phase != "queue":
            await until(model.is_inside.is_set)
        if phase in ("stream", "stream_closed"):
            model.gate.release(5)
            await until(lambda: len(received) >= 1)
        if phase != "stream_closed":
            reader.cancel()
        await asyncio.wait([reader])
        num_calls = model.num_calls
        model.gate.release(2)
        await until(lambda: all_blocks_are_back(backend))
        assert model.num_calls <= num_calls + 1
        await asyncio.wait([blocker])

    run(main())


@pytest.mark.parametrize(
    "limits",
    [{"max_waiting_requests": 2}, {"max_waiting_tokens": 7}],
    ids=["requests", "tokens"],
)
def test_full_queue_refuses_and_says_when_to_come_back(
    limits: dict[str, int], make_backend: MakeBackend, model: Any
) -> None:
    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1, **limits)

    async def main() -> None:
        tasks = [asyncio.create_task(collect(backend, ask("running")))]
        await until(model.is_inside.is_set)
        await until(lambda: backend.stats().num_running_sequences == 1)
        assert backend.stats().num_waiting_requests == 0
        for name in ("b", "c"):
            tasks.append(asyncio.create_task(collect(backend, ask(name))))
        await until(lambda: backend.stats().num_waiting_requests == 2)
        with pytest.raises(QueueFullError, match="2 requests are waiting") as caught:
            await collect(backend, ask("d"))
        assert caught.value.retry_after_s >= 1
        model.gate.release(1000)
        assert [len(outputs) for outputs in await asyncio.gather(*tasks)] == [6, 6, 6]
        assert len(await collect(backend, ask("d"))) == 6

    run(main())


def test_prompt_over_the_waiting_limit_is_admitted_when_nothing_waits(
    make_backend: MakeBackend,
) -> None:
    backend = make_backend(max_waiting_tokens=2)

    async def main() -> None:
        assert len(await collect(backend, ask(prompt=[1] * 20))) == 6

    run(main())


def test_waiting_time_is_estimated_from_the_pace_of_admissions(
    make_backend: MakeBackend, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr("serve.engine.worker.time", SimpleNamespace(monotonic=lambda: now_s))
    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1, max_waiting_requests=3)

    async def main() -> None:
        nonlocal now_s
        tasks = [asyncio.create_task(collect(backend, ask("running")))]
        await until(model.is_inside.is_set)
        tasks += [asyncio.create_task(collect(backend, ask(str(i)))) for i in range(3)]
        await until(lambda: backend.stats().num_waiting_requests == 3)
        for elapsed_s, wait_s in ((0.0, 1), (1.4, 5), (20.0, 60), (1000.0, 120)):
            now_s = 1000.0 + elapsed_s
            with pytest.raises(QueueFullError) as caught:
                await collect(backend, ask("late"))
            assert caught.value.retry_after_s == wait_s
        model.gate.release(1000)
        await asyncio.gather(*tasks)

    run(main())


def test_requests_that_are_left_are_out_of_the_queue_while_a_step_runs(
    make_backend: MakeBackend, model: Any
) -> None:
    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1, max_waiting_requests=4)

    async def main() -> None:
        tasks = {"running": asyncio.create_task(collect(backend, ask("running")))}
        await until(model.is_inside.is_set)

        async def wait(*names: str) -> None:
            for name in names:
                tasks[name] = asyncio.create_task(collect(backend, ask(name)))
            await asyncio.sleep(0)

        await wait("known", "left")
        model.is_inside.clear()
        model.gate.release()
        await until(model.is_inside.is_set)  # by now the engine has them
        await wait("new", "also left")
        assert backend.stats().num_waiting_requests == 4
        with pytest.raises(QueueFullError, match="4 requests are waiting"):
            await collect(backend, ask("refused"))
        gone = [tasks.pop(name) for name in ("left", "also left")]
        for task in gone:
            task.cancel()
        await asyncio.wait(gone)
        assert backend.stats().num_waiting_requests == 2
        await wait("left", "late")
        assert backend.stats().num_waiting_requests == 4
        model.gate.release(1000)
        assert [len(outputs) for outputs in await asyncio.gather(*tasks.values())] == [6] * 5
        await until(lambda: all_blocks_are_back(backend))
        assert model.num_calls == 30

    run(main())


def test_waiting_time_leaves_out_those_who_left(
    make_backend: MakeBackend, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr("serve.engine.worker.time", SimpleNamespace(monotonic=lambda: now_s))
    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1, max_waiting_tokens=30)

    async def main() -> None:
        nonlocal now_s
        running = asyncio.create_task(collect(backend, ask("running")))
        await until(model.is_inside.is_set)
        waiting = [asyncio.create_task(collect(backend, ask(str(i)))) for i in range(9)]
        await until(lambda: backend.stats().num_waiting_requests == 9)
        for task in waiting[1:]:
            task.cancel()
        await asyncio.wait(waiting[1:])
        now_s = 1010.0
        with pytest.raises(QueueFullError, match="1 requests are waiting") as caught:
            await collect(backend, ask("late", prompt=[1] * 28))
        assert caught.value.retry_after_s == 10
        model.gate.release(1000)
        await asyncio.gather(running, waiting[0])

    run(main())
