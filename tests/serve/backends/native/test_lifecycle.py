import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from serve.backends.native import NativeBackend
from serve.backends.protocol import (
    BackendUnavailableError,
)
from serve.engine.sequence import LiveRequest, Sequence
from tests.serve.backends.backend_client import (
    TIMEOUT_S,
    all_blocks_are_back,
    ask,
    collect,
    run,
    until,
)

MakeBackend = Callable[..., NativeBackend]


def test_drain_lets_everything_finish_and_refuses_new_requests(
    make_backend: MakeBackend, model: Any
) -> None:
    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1)

    async def main() -> None:
        tasks = [asyncio.create_task(collect(backend, ask(str(i)))) for i in range(3)]
        await until(model.is_inside.is_set)
        drain = asyncio.create_task(backend.drain(TIMEOUT_S))
        await until(lambda: backend.stats().is_draining)
        with pytest.raises(BackendUnavailableError, match="shutting down"):
            await collect(backend, ask("late"))
        assert not drain.done()
        model.gate.release(1000)
        await drain
        assert [len(outputs) for outputs in await asyncio.gather(*tasks)] == [6, 6, 6]
        await backend.drain(0.0)

    run(main())


def test_drain_aborts_what_is_left_when_time_is_up(make_backend: MakeBackend, model: Any) -> None:
    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1)

    async def main() -> None:
        tasks = [
            asyncio.create_task(collect(backend, ask(str(i), max_tokens=200))) for i in range(3)
        ]
        await until(model.is_inside.is_set)
        drain = asyncio.create_task(backend.drain(0.0))
        await asyncio.sleep(0.02)
        model.gate.release(2)
        await drain
        for outputs in await asyncio.gather(*tasks):
            assert outputs[-1].finish_reason == "abort"
        assert all_blocks_are_back(backend)

    run(main())


def test_drain_of_an_idle_backend_returns_at_once(make_backend: MakeBackend) -> None:
    backend = make_backend()
    run(backend.drain(TIMEOUT_S))
    assert backend.stats().is_draining


def test_forward_fault_reaches_the_reader_and_others_go_on(
    make_backend: MakeBackend, model: Any
) -> None:
    backend = make_backend()
    model.fails = lambda call: call == 3

    async def main() -> None:
        outputs = await collect(backend, ask(num_sequences=2))
        assert [o.finish_reason for o in outputs[-2:]] == ["error", "error"]
        assert len(await collect(backend, ask())) == 6
        assert backend.stats().error is None

    run(main())


def test_broken_backend_refuses_requests(make_backend: MakeBackend, model: Any) -> None:
    backend = make_backend()
    model.fails = lambda call: True

    async def main() -> None:
        for _ in range(3):
            (output,) = await collect(backend, ask())
            assert output.finish_reason == "error"
        assert backend.stats().error == "forward failed 3 times in a row: RuntimeError"
        with pytest.raises(BackendUnavailableError, match="forward failed 3 times"):
            await collect(backend, ask())
        await backend.drain(TIMEOUT_S)

    run(main())


def test_fault_of_the_engine_itself_ends_every_request(
    make_backend: MakeBackend, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1)

    async def main() -> None:
        tasks = [asyncio.create_task(collect(backend, ask(str(i)))) for i in range(3)]
        await until(model.is_inside.is_set)
        monkeypatch.setattr("serve.engine.scheduler.Scheduler.schedule", lambda self: [])
        model.gate.release(1000)
        for outputs in await asyncio.gather(*tasks):
            assert outputs[-1].finish_reason == "error"
        with pytest.raises(BackendUnavailableError, match="the engine failed: AssertionError"):
            await collect(backend, ask())
        await backend.drain(TIMEOUT_S)

    run(main())


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_whatever_ends_the_thread_ends_every_request(
    error: type[BaseException],
    make_backend: MakeBackend,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(batch: Any, cache: Any) -> Any:
        forward(batch, cache)
        raise error

    forward = model.forward
    monkeypatch.setattr(model, "forward", fail)
    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1)

    async def main() -> None:
        tasks = [asyncio.create_task(collect(backend, ask(str(i)))) for i in range(3)]
        await until(model.is_inside.is_set)
        model.gate.release(1000)
        for outputs in await asyncio.gather(*tasks):
            assert [output.finish_reason for output in outputs] == ["error"]
        assert backend.stats().error == f"the engine failed: {error.__name__}"
        with pytest.raises(BackendUnavailableError, match="the engine failed"):
            await collect(backend, ask())

    run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["abandon", "abort_all"])
def test_thread_that_dies_of_its_own_fault_is_noticed(
    method: str, make_backend: MakeBackend, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise SystemExit

    model.gate = threading.Semaphore(0)
    backend = make_backend(max_running_sequences=1)

    async def main() -> None:
        tasks = [asyncio.create_task(collect(backend, ask(str(i)))) for i in range(3)]
        await until(model.is_inside.is_set)
        for name in (f"engine.Engine.{method}", "scheduler.Scheduler.schedule"):
            monkeypatch.setattr(f"serve.engine.{name}", fail)
        model.gate.release(1000)
        for outputs in await asyncio.gather(*tasks):
            assert outputs[-1].finish_reason in ("abort", "error")
        await until(lambda: backend.stats().error is not None)
        with pytest.raises(BackendUnavailableError, match="the engine"):
            await collect(backend, ask())
        await backend.drain(TIMEOUT_S)

    run(main())


def test_backend_serves_one_event_loop_after_another(make_backend: MakeBackend) -> None:
    backend = make_backend()

    async def main() -> None:
        assert len(await collect(backend, ask())) == 6

    run(main())
    run(main())


def test_event_loop_that_dies_under_its_requests_frees_them(
    make_backend: MakeBackend, model: Any
) -> None:
    model.gate = threading.Semaphore(0)
    backend = make_backend()
    loop = asyncio.new_event_loop()
    steps = backend.generate(ask(max_tokens=200))
    task = loop.create_task(anext(steps))  # type: ignore[arg-type]
    loop.run_until_complete(until(model.is_inside.is_set))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    model.gate.release(1000)

    run(until(lambda: all_blocks_are_back(backend)))
    assert model.num_calls < 10


def test_request_that_has_ended_is_freed_at_once(make_backend: MakeBackend) -> None:
    backend = make_backend()

    def count() -> int:
        return sum(type(thing) in (LiveRequest, Sequence) for thing in gc.get_objects())

    async def main() -> None:
        for number in range(3):
            await collect(backend, ask(str(number), num_sequences=2))
        await until(lambda: count() == 0)

    gc.collect()
    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()


def test_stats_count_the_work(make_backend: MakeBackend) -> None:
    backend = make_backend()

    async def main() -> None:
        await collect(backend, ask(prompt=[1, 2, 3, 4, 5], num_sequences=2))
        stats = backend.stats()
        assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (10, 4)
        assert (stats.generated_tokens, stats.steps, stats.preemptions) == (12, 7, 0)
        assert (stats.num_cache_blocks, stats.num_free_cache_blocks) == (64, 64)
        assert (stats.is_draining, stats.error) == (False, None)

    run(main())


def test_closed_backend_refuses_requests(make_backend: MakeBackend) -> None:
    backend = make_backend()
    backend.close()

    async def main() -> None:
        with pytest.raises(BackendUnavailableError, match="shutting down"):
            await collect(backend, ask())

    run(main())
