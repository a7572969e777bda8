"""Arms asked over the API: retries, refusals, how many at once."""

import asyncio
from collections.abc import Callable

import pytest

from evaluation.errors import RunError
from evaluation.server import Arm, open_servers, run_each
from tests.evaluation.conftest import FakeServer

ARM = Arm(label="a", model="base", fields={"temperature": 0.5}, key="secret")
Make = Callable[..., FakeServer]


def ask(server: FakeServer, *, patience_s: float = 1.0) -> object:
    async def run() -> object:
        async with open_servers(patience_s=patience_s, make_client=server.connect) as servers:
            return await servers.ask(ARM, "/v1/completions", {"prompt": "x"})

    return asyncio.run(run())


def test_request_has_the_arm_s_model_fields_and_key(make_server: Make) -> None:
    server = make_server(lambda body: {"said": body})
    assert ask(server) == {
        "said": {"path": "/v1/completions", "model": "base", "prompt": "x", "temperature": 0.5}
    }
    assert server.keys == ["Bearer secret"]


@pytest.mark.parametrize("status", [0, 408, 429, 500, 502, 503, 504])
def test_server_that_comes_back_is_asked_again(make_server: Make, status: int) -> None:
    server = make_server(lambda _: {"ok": True})
    server.failures = [(status, "not now")] * 3
    assert ask(server) == {"ok": True}
    assert len(server.bodies) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_refusal_ends_at_once_with_its_message(make_server: Make, status: int) -> None:
    server = make_server(lambda _: {})
    server.failures = [(status, "temperature must be at most 2")]
    with pytest.raises(RunError, match="temperature must be at most 2"):
        ask(server)
    assert len(server.bodies) == 1


def test_dead_server_is_given_up_after_a_while(make_server: Make) -> None:
    server = make_server(lambda _: {})
    server.failures = [(0, "")] * 1000
    with pytest.raises(RunError, match=r"gave up after 0 s. What is done is kept: the same comm"):
        ask(server, patience_s=0.05)
    assert len(server.bodies) > 1


def test_key_is_in_no_description() -> None:
    assert "secret" not in str(ARM.describe()) + repr(ARM)


def test_unknown_model_is_named_with_those_that_are_known(make_server: Make) -> None:
    server = make_server(lambda _: {})
    server.models = ["base", "base:poet"]
    arm = Arm(label="b", model="base:bard")

    async def run() -> None:
        await server.servers().check([ARM, arm])

    with pytest.raises(RunError, match="arm 'b': .* no model 'base:bard'; it has base, base:poet"):
        asyncio.run(run())


def test_so_many_run_at_once_and_each_once() -> None:
    done: list[int] = []
    running = most = 0

    async def work(item: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        done.append(item)

    asyncio.run(run_each(range(20), work, concurrency=3))
    assert sorted(done) == list(range(20))
    assert most == 3


def test_first_failure_cancels_the_others_and_is_raised_as_it_is() -> None:
    cancelled: list[int] = []

    async def work(item: int) -> None:
        if item == 2:
            raise RunError("two")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    with pytest.raises(RunError, match="two"):
        asyncio.run(run_each(range(5), work, concurrency=3))
    assert sorted(cancelled) == [0, 1]


def test_many_arms_are_asked_in_as_few_comparisons_as_the_server_takes(make_server: Make) -> None:
    def answer(body: dict[str, object]) -> dict[str, object]:
        entries = body["arms"]
        assert isinstance(entries, list)
        return {
            "arms": [
                {"index": i, "text": entry["label"], "usage": {}}
                for i, entry in reversed(list(enumerate(entries)))
            ]
        }

    server = make_server(answer)
    server.most_arms = 4
    arms = [Arm(label=str(i), model="base", fields={}) for i in range(10)]

    async def run() -> list[dict[str, object]]:
        async with open_servers(patience_s=1.0, make_client=server.connect) as servers:
            return await servers.ask_each(arms, "/v1/completions", {"prompt": "x", "seed": 3})

    found = asyncio.run(run())
    assert [of["choices"][0]["text"] for of in found] == [arm.label for arm in arms]  # type: ignore[index]
    asked = server.bodies
    assert sorted(len(body["arms"]) for body in asked) == [2, 4, 4]
    assert {(body["path"], body["seed"]) for body in asked} == {("/v1/compare", 3)}
