"""Requests to a backend that serves variants."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from adapters.format import digest
from serve.backends.native import NativeBackend
from serve.backends.protocol import AdapterConflictError, AdapterNotFoundError
from serve.engine.sequence import NO_ATTACHMENT, Attachment, LiveRequest, ModelVariant
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
from tests.serve.engine.conftest import HistoryModel
from tests.serve.engine.scripted_adapters import Folders

MakeBackend = Callable[..., NativeBackend]
ExpectAll = Callable[[LiveRequest], list[Any]]
PROMPT = [1 + i for i in range(9)]


def test_arms_of_several_models_say_what_they_say_alone(
    make_backend: MakeBackend, folders: Folders, expect_all: ExpectAll
) -> None:
    registry = folders.registry()
    small = folders.write_variant("small")
    registry.attach_folder("small", small)
    registry.attach_folder("healed", folders.write("healed", chain=(digest(small),)))
    registry.attach_folder("plain", folders.write("plain"))
    backend = make_backend(adapters=registry)
    arms = (
        make_arm("small"), make_arm(), make_arm("healed"), make_arm("plain"),
        make_arm("healed", 0.0), make_arm("healed", 0.5),
    )  # fmt: skip
    variant = ModelVariant(HistoryModel(name="small"), digest(small))
    healed, plain = folders.side("healed on small"), folders.side("plain")
    kinds = [
        Attachment(variant, None), NO_ATTACHMENT, Attachment(variant, healed),
        Attachment(None, plain), Attachment(variant, healed), Attachment(variant, healed),
    ]  # fmt: skip
    pairs = list(zip(arms, kinds, strict=True))

    async def main() -> None:
        request = ask(prompt=PROMPT, arms=arms)
        outputs = await collect(backend, request)
        scripted = [on if arm.adapter_scale else Attachment(on.variant, None) for arm, on in pairs]
        expected = expect_all(LiveRequest(request, scripted))
        for index, one in enumerate(expected):
            assert said(outputs, index) == one.token_ids
        assert said(outputs, 4) == said(outputs, 0)
        assert backend.stats().cached_prompt_tokens == 8 * 4
        assert all_blocks_are_back(backend)
        assert [info.num_running for info in backend.adapters()] == [0, 0, 0]

    run(main())


def test_variant_in_use_stays_until_its_request_has_ended(
    make_backend: MakeBackend, folders: Folders
) -> None:
    registry = folders.registry()
    registry.attach_folder("small", folders.write_variant("small"))
    backend = make_backend(adapters=registry)

    async def main() -> None:
        async with registry.use("small") as attachment:
            assert attachment.variant is not None
            model: Any = attachment.variant.model
        model.gate = threading.Semaphore(0)
        task = asyncio.create_task(collect(backend, ask(prompt=PROMPT, arms=(make_arm("small"),))))
        await until(model.is_inside.is_set)
        with pytest.raises(AdapterConflictError, match="1 request uses the adapter 'small'"):
            await backend.detach_adapter("small")
        model.gate.release(100)
        assert len(await task) == 6
        await backend.detach_adapter("small")
        with pytest.raises(AdapterNotFoundError, match="no adapter is called 'small'"):
            await collect(backend, ask(arms=(make_arm("small"),)))

    run(main())


def test_speed_is_measured_once_nothing_else_is_to_do(
    make_backend: MakeBackend, model: Any, folders: Folders
) -> None:
    backend = make_backend(adapters=folders.registry())
    folders.write_variant("small")
    model.gate = threading.Semaphore(0)

    async def main() -> None:
        task = asyncio.create_task(collect(backend, ask(prompt=PROMPT, max_tokens=20)))
        await until(model.is_inside.is_set)
        assert (await backend.attach_adapter("small", "small")).speed is None
        (test,) = folders.speed_tests
        for _ in range(10):
            model.gate.release()
            await asyncio.sleep(0)
        await until(lambda: model.num_calls > 10)
        assert test.num_steps == 0
        model.gate.release(100)
        assert len(await task) == 20
        await until(lambda: backend.adapters()[0].speed == 1.25)
        assert test.num_steps == 3
        assert len(await collect(backend, ask(arms=(make_arm("small"),)))) == 6

    run(main())


def test_speed_test_that_fails_costs_nothing_else(
    make_backend: MakeBackend, folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend(adapters=folders.registry())
    folders.write_variant("small")

    def fail() -> bool:
        raise RuntimeError("secret")

    async def main() -> None:
        folders.speed_step = fail
        await backend.attach_adapter("small", "small")
        await until(lambda: "idle work failed: RuntimeError in fail" in caplog.text)
        assert "secret" not in caplog.text
        assert len(await collect(backend, ask(arms=(make_arm("small"),)))) == 6
        assert backend.adapters()[0].speed is None

    run(main())


def test_drain_does_not_wait_for_a_speed_test(make_backend: MakeBackend, folders: Folders) -> None:
    backend = make_backend(adapters=folders.registry())
    folders.write_variant("small")

    async def main() -> None:
        folders.speed_step = lambda: True  # never done
        await backend.attach_adapter("small", "small")
        # It would wait for as long as it may.
        await asyncio.wait_for(backend.drain(1000 * TIMEOUT_S), TIMEOUT_S)

    run(main())
