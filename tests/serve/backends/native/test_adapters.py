import asyncio
import threading
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest

from serve.backends.native import NativeBackend
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterLoadError,
    AdapterNotFoundError,
    BackendUnavailableError,
)
from tests.serve.backends.backend_client import (
    TIMEOUT_S,
    all_blocks_are_back,
    ask,
    collect,
    make_arm,
    run,
    said,
    until,
)
from tests.serve.engine.scripted_adapters import Folders

MakeBackend = Callable[..., NativeBackend]
Expect = Callable[..., Any]
PROMPT = [1 + i for i in range(9)]


def test_arms_say_what_they_say_alone(
    make_backend: MakeBackend, folders: Folders, expect: Expect
) -> None:
    registry = folders.registry()
    for name in ("x", "y"):
        registry.attach_folder(name, folders.write(name))
    backend = make_backend(adapters=registry)
    arms = (make_arm("x"), make_arm(), make_arm("y", 0.5), make_arm("y", 0.0))

    async def main() -> None:
        outputs = await collect(backend, ask(prompt=PROMPT, arms=arms))
        for index, arm in enumerate(arms):
            side = folders.side(arm.adapter) if arm.adapter and arm.adapter_scale else None
            expected = expect(PROMPT, arm.params, 0, side, arm.adapter_scale)
            assert said(outputs, index) == expected.token_ids
        stats = backend.stats()
        assert (stats.num_side_cache_blocks, stats.num_free_side_cache_blocks) == (256, 256)
        assert (stats.cached_prompt_tokens, stats.base_cached_prompt_tokens) == (24, 24)
        assert all_blocks_are_back(backend)
        assert [info.num_running for info in backend.adapters()] == [0, 0]

    run(main())


def test_adapter_in_use_is_not_detached_and_its_request_ends_well(
    make_backend: MakeBackend, model: Any, folders: Folders, expect: Expect
) -> None:
    registry = folders.registry(max_bytes=0)
    registry.attach_folder("x", folders.write("x"))
    backend = make_backend(adapters=registry)
    model.gate = threading.Semaphore(0)

    async def main() -> None:
        task = asyncio.create_task(collect(backend, ask(prompt=PROMPT, arms=(make_arm("x"),))))
        await until(model.is_inside.is_set)
        with pytest.raises(AdapterConflictError, match="1 request uses the adapter 'x'"):
            await backend.detach_adapter("x")
        model.gate.release(100)
        outputs = await task
        expected = expect(PROMPT, make_arm().params, 0, folders.side("x"))
        assert said(outputs) == expected.token_ids
        await backend.detach_adapter("x")

    run(main())


@pytest.mark.parametrize("way", ["closed", "cancelled"])
def test_request_that_is_left_lets_its_adapter_go(
    way: str, make_backend: MakeBackend, model: Any, folders: Folders
) -> None:
    registry = folders.registry()
    registry.attach_folder("x", folders.write("x"))
    backend = make_backend(adapters=registry)
    model.gate = threading.Semaphore(2)

    async def read() -> None:
        async with aclosing(backend.generate(ask(arms=(make_arm("x"),)))) as steps:
            async for _ in steps:
                if way == "closed":
                    return

    async def main() -> None:
        task = asyncio.create_task(read())
        await until(lambda: model.num_calls >= 2 or task.done())
        if way == "cancelled":
            task.cancel()
        await asyncio.wait([task])
        await backend.detach_adapter("x")
        assert backend.adapters() == []
        model.gate.release(100)
        await until(lambda: all_blocks_are_back(backend))

    run(main())


def test_adapter_that_left_memory_comes_back_with_its_cache(
    make_backend: MakeBackend, folders: Folders
) -> None:
    registry = folders.registry(max_bytes=0)
    registry.attach_folder("x", folders.write("x"))
    backend = make_backend(adapters=registry)

    async def main() -> None:
        first = await collect(backend, ask(prompt=PROMPT, arms=(make_arm("x"),)))
        assert not backend.adapters()[0].is_loaded
        again = await collect(backend, ask(prompt=PROMPT, arms=(make_arm("x"),)))
        assert said(first) == said(again)
        assert again[0].cached_prompt_tokens == 8
        assert folders.loaded == ["x"] * 3

    run(main())


def test_adapter_that_cannot_come_back_costs_only_its_requests(
    make_backend: MakeBackend, folders: Folders
) -> None:
    registry = folders.registry(max_bytes=0)
    for name in ("x", "y"):
        registry.attach_folder(name, folders.write(name))
    backend = make_backend(adapters=registry)
    folders.write("y", "damaged")

    async def main() -> None:
        with pytest.raises(AdapterLoadError, match="adapter 'y'"):
            await collect(backend, ask(arms=(make_arm("x"), make_arm("y"))))
        assert [info.num_running for info in backend.adapters()] == [0, 0]
        assert len(await collect(backend, ask(arms=(make_arm("x"),)))) == 6

    run(main())


def test_request_that_is_refused_lets_its_adapter_go(
    make_backend: MakeBackend, folders: Folders
) -> None:
    registry = folders.registry()
    registry.attach_folder("x", folders.write("x"))
    backend = make_backend(adapters=registry)

    async def main() -> None:
        with pytest.raises(ValueError, match="tokens together"):
            await collect(backend, ask(arms=(make_arm("x", max_tokens=999),)))
        await backend.drain(TIMEOUT_S)
        with pytest.raises(BackendUnavailableError, match="shutting down"):
            await collect(backend, ask(arms=(make_arm("x"),)))
        assert backend.adapters()[0].num_running == 0

    run(main())


def test_backend_without_a_registry_has_no_adapters(make_backend: MakeBackend) -> None:
    backend = make_backend()

    async def main() -> None:
        assert backend.adapters() == []
        with pytest.raises(AdapterLoadError, match="takes no adapters"):
            await backend.attach_adapter("x", "x")
        with pytest.raises(AdapterNotFoundError, match="no adapter is called 'x'"):
            await backend.detach_adapter("x")
        with pytest.raises(AdapterNotFoundError, match="no adapter is called 'x'"):
            await collect(backend, ask(arms=(make_arm("x"),)))

    run(main())
