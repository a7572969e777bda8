"""Arms with what is attached, and attaching at run time."""

import asyncio
from contextlib import aclosing

import pytest

from serve.backends.protocol import (
    AdapterConflictError,
    AdapterLoadError,
    AdapterNotFoundError,
    Backend,
)
from tests.serve.backends.backend_client import ask, collect, make_arm, run, said

PROMPT = [1 + i * i % 97 for i in range(40)]
UNKNOWN = "no adapter is called 'unknown'"


def test_arms_that_share_a_prompt_say_what_each_says_alone(backend: Backend) -> None:
    arms = (make_arm("one"), make_arm(), make_arm("two", 0.5), make_arm("one", temperature=0.0))

    async def main() -> None:
        together = await collect(backend, ask(prompt=PROMPT, arms=arms))
        for index, one in enumerate(arms):
            alone = await collect(backend, ask(prompt=PROMPT, arms=(one,)))
            assert said(together, index) == said(alone)

    run(main())


def test_what_is_attached_changes_the_text(backend: Backend) -> None:
    async def main() -> None:
        arms = (make_arm(), make_arm("one"), make_arm("two"))
        outputs = await collect(backend, ask(prompt=PROMPT, arms=arms))
        assert len({tuple(said(outputs, index)) for index in range(3)}) == 3

    run(main())


def test_scale_of_zero_is_the_base(backend: Backend) -> None:
    async def main() -> None:
        outputs = await collect(
            backend, ask(prompt=PROMPT, arms=(make_arm("one", 0.0), make_arm()))
        )
        assert said(outputs, 0) == said(outputs, 1)

    run(main())


def test_attached_ones_are_listed_by_name(backend: Backend) -> None:
    infos = backend.adapters()
    assert [(info.name, info.num_running) for info in infos] == [("one", 0), ("two", 0)]


@pytest.mark.parametrize("folder", ["three", "small"], ids=["side network", "variant"])
def test_adapter_is_attached_used_and_detached_at_run_time(
    folder: str, backend: Backend, takes_variants: bool
) -> None:
    async def main() -> None:
        if folder == "small" and not takes_variants:
            with pytest.raises(AdapterLoadError, match="give it with --variant"):
                await backend.attach_adapter("third", folder)
            return
        info = await backend.attach_adapter("third", folder)
        assert info.name in [listed.name for listed in backend.adapters()]
        request = ask(prompt=PROMPT, arms=(make_arm("third"), make_arm("one"), make_arm()))
        first, again = await collect(backend, request), await collect(backend, request)
        assert said(first) == said(again)
        assert said(first) not in (said(first, 1), said(first, 2))
        await backend.detach_adapter("third")
        with pytest.raises(AdapterNotFoundError, match="no adapter is called 'third'"):
            await collect(backend, request)

    run(main())


def test_running_requests_go_on_while_adapters_come_and_go(backend: Backend) -> None:
    async def main() -> None:
        request = ask(
            prompt=PROMPT, max_tokens=100, arms=(make_arm("one", max_tokens=100), make_arm())
        )
        alone = await collect(backend, request)
        task = asyncio.create_task(collect(backend, request))
        for _ in range(3):
            await backend.attach_adapter("third", "three")
            await backend.detach_adapter("third")
        outputs = await task
        assert [said(outputs, i) for i in (0, 1)] == [said(alone, i) for i in (0, 1)]

    run(main())


def test_adapter_in_use_is_not_detached(backend: Backend) -> None:
    async def main() -> None:
        await backend.attach_adapter("third", "three")
        request = ask(prompt=PROMPT, arms=(make_arm("third", max_tokens=1500),))
        async with aclosing(backend.generate(request)) as steps:
            await anext(steps)
            with pytest.raises(AdapterConflictError, match="third"):
                await backend.detach_adapter("third")
        await backend.detach_adapter("third")

    run(main())


def test_name_that_is_taken_is_refused(backend: Backend) -> None:
    async def main() -> None:
        with pytest.raises(AdapterConflictError, match="one"):
            await backend.attach_adapter("one", "three")

    run(main())


def test_folder_that_is_not_there_is_refused(backend: Backend) -> None:
    async def main() -> None:
        with pytest.raises(AdapterLoadError, match="path must be a folder"):
            await backend.attach_adapter("third", "nowhere")

    run(main())


def test_unknown_adapter_is_refused(backend: Backend) -> None:
    async def main() -> None:
        with pytest.raises(AdapterNotFoundError, match=UNKNOWN):
            await collect(backend, ask(arms=(make_arm("one"), make_arm("unknown"))))
        with pytest.raises(AdapterNotFoundError, match=UNKNOWN):
            await backend.detach_adapter("unknown")
        assert [info.num_running for info in backend.adapters()] == [0, 0]

    run(main())
