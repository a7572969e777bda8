"""POST /v1/compare: one prompt, several arms, one request to the backend."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from decoding import STRATEGIES, derive_seed
from serve.api import ApiSettings, create_app
from serve.backends.protocol import QueueFullError
from serve.requests import GenerationRequest
from text.tokenizer import Tokenizer

from .conftest import (
    CONTEXT,
    END,
    Client,
    FakeBackend,
    check_error,
    make_adapter,
    read_events,
    wait_until,
)
from .test_disconnect import connect

USER = [{"role": "user", "content": "hi"}]
TEXTS = ["hello fox", "the quick fox", "return 'hello '"]


@pytest.fixture(autouse=True)
def arms_answer(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    """Attach two adapters; arm i answers with text i."""
    for name in ("poet", "code"):
        backend.attached[name] = make_adapter(name)

    def script(request: GenerationRequest, index: int) -> list[int]:
        return [*tokenizer.encode(TEXTS[index % len(TEXTS)]), END]

    backend.script = script


def compare(client: Client, *arms: Any, **fields: Any) -> httpx.Response:
    body = {"arms": list(arms), **fields}
    if not fields.keys() & {"messages", "prompt"}:
        body["messages"] = USER
    return client.post("/v1/compare", body)


def test_arms_are_one_request_and_answered_in_order(client: Client, backend: FakeBackend) -> None:
    response = compare(
        client,
        {"model": "smollm2"},
        {"model": "smollm2:poet", "label": "B", "adapter_scale": 0.5},
        {"model": "smollm2:code@adapt", "max_tokens": 2},
        max_tokens=20,
        return_decoding_trace=True,
    )
    body = response.json()
    assert body.keys() == {"id", "object", "created", "arms", "usage"}
    assert body["object"] == "comparison"
    arms = body["arms"]
    assert [arm["index"] for arm in arms] == [0, 1, 2]
    assert [arm["label"] for arm in arms] == ["smollm2", "B", "smollm2:code@adapt"]
    assert [arm["model"] for arm in arms] == ["smollm2", "smollm2:poet", "smollm2:code@adapt"]
    assert [arm["message"]["content"] for arm in arms[:2]] == TEXTS[:2]
    assert TEXTS[2].startswith(arms[2]["message"]["content"])
    assert [arm["finish_reason"] for arm in arms] == ["stop", "stop", "length"]
    for arm in arms:
        num_tokens = arm["usage"]["completion_tokens"]
        assert len(arm["decoding_trace"]) == num_tokens
        assert arm["usage"]["prompt_tokens"] == body["usage"]["prompt_tokens"]
        assert arm["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    total = sum(arm["usage"]["completion_tokens"] for arm in arms)
    assert body["usage"]["completion_tokens"] == total
    (request,) = backend.requests
    assert request.prompt_is_template
    assert [(a.adapter, a.adapter_scale, a.num_sequences) for a in request.arms] == [
        (None, 1.0, 1),
        ("poet", 0.5, 1),
        ("code", 1.0, 1),
    ]
    assert [arm.params.max_tokens for arm in request.arms] == [20, 20, 2]
    assert [arm.params.strategy.name for arm in request.arms] == ["fixed", "fixed", "adapt"]


@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "token-ids"])
def test_prompt_is_text_or_token_ids(
    client: Client, backend: FakeBackend, tokenizer: Tokenizer, as_ids: bool
) -> None:
    prompt = tokenizer.encode("the fox") if as_ids else "the fox"
    body = compare(client, {"model": "smollm2"}, {"model": "smollm2:poet"}, prompt=prompt).json()
    assert [arm["text"] for arm in body["arms"]] == TEXTS[:2]
    assert all("message" not in arm and "decoding_trace" not in arm for arm in body["arms"])
    assert backend.requests[0].prompt_token_ids == tokenizer.encode("the fox")
    assert not backend.requests[0].prompt_is_template
    assert [arm.params.max_tokens for arm in backend.requests[0].arms] == [16, 16]


def test_length_of_a_chat_fills_the_context(client: Client, backend: FakeBackend) -> None:
    compare(client, {"model": "smollm2"})
    (request,) = backend.requests
    assert request.arms[0].params.max_tokens == CONTEXT - len(request.prompt_token_ids)


def test_arm_wins_over_the_shared_fields(client: Client, backend: FakeBackend) -> None:
    shared = {"temperature": 0.5, "top_p": 0.9, "stop": ["A"], "logit_bias": {"5": 1}}
    own = {"temperature": 0, "stop": "B", "ignore_eos": True, "max_tokens": 3}
    compare(client, {"model": "smollm2"}, {"model": "smollm2", **own}, max_tokens=9, **shared)
    first, second = (arm.params for arm in backend.requests[0].arms)
    assert (first.temperature, first.top_p, first.stop) == (0.5, 0.9, ("A",))
    assert (second.temperature, second.top_p, second.stop) == (0.0, 0.9, ("B",))
    assert (first.ignore_eos, second.ignore_eos) == (False, True)
    assert (first.max_tokens, second.max_tokens) == (9, 3)
    assert first.logit_bias == second.logit_bias == {5: 1}


def test_strategy_is_the_arms_own_or_the_shared_one(client: Client, backend: FakeBackend) -> None:
    arms = [
        {"model": "smollm2"},
        {"model": "smollm2@adapt"},
        {"model": "smollm2:poet@fixed"},
        {"model": "smollm2", "decoding": {"strategy": "dynatemp"}},
        {"model": "smollm2@adapt", "decoding": {"a": 0.9}},
    ]
    compare(client, *arms, decoding={"strategy": "adapt", "a": 1.0})
    found = [arm.params.strategy for arm in backend.requests[0].arms]
    adapt = STRATEGIES["adapt"]
    assert found[:2] == [adapt(a=1.0)] * 2  # type: ignore[call-arg]
    assert [strategy.name for strategy in found[2:4]] == ["fixed", "dynatemp"]
    assert found[4] == adapt(a=0.9)  # type: ignore[call-arg]


def test_shared_scale_is_for_the_arms_with_an_adapter(client: Client, backend: FakeBackend) -> None:
    arms = [{"model": "smollm2"}, {"model": "smollm2:poet"}]
    compare(client, *arms, {"model": "smollm2:poet", "adapter_scale": 0}, adapter_scale=0.5)
    assert [arm.adapter_scale for arm in backend.requests[0].arms] == [1.0, 0.5, 0.0]
    response = compare(client, {"model": "smollm2"}, adapter_scale=0.5)
    assert "needs a model id" in check_error(response, 400, param="adapter_scale")


def test_shared_scale_is_not_for_variants_alone(client: Client, backend: FakeBackend) -> None:
    backend.attached["small"] = make_adapter("small", kind="variant")
    backend.attached["healed"] = make_adapter("healed", on="small")
    small, healed = {"model": "smollm2:small"}, {"model": "smollm2:healed"}
    assert compare(client, small, healed, adapter_scale=0.5).status_code == 200
    (request,) = backend.requests
    assert [(arm.adapter, arm.adapter_scale) for arm in request.arms] == [
        ("small", 1.0), ("healed", 0.5)
    ]  # fmt: skip
    response = compare(client, small, adapter_scale=0.5)
    assert "needs a model id" in check_error(response, 400, param="adapter_scale")
    response = compare(client, healed, {**small, "adapter_scale": 0.5})
    assert "needs a model id" in check_error(response, 400, param="arms[1].adapter_scale")


def seeds_of(client: Client, backend: FakeBackend, *arms: Any, **fields: Any) -> list[int | None]:
    assert compare(client, *arms, **fields).status_code == 200
    return [arm.params.seed for arm in backend.requests[-1].arms]


def test_arms_draw_alike_unless_told_otherwise(client: Client, backend: FakeBackend) -> None:
    arm = {"model": "smollm2"}
    assert seeds_of(client, backend, arm, arm, seed=7) == [7, 7]
    assert seeds_of(client, backend, arm, arm, seed=7, common_random_numbers=True) == [7, 7]
    first, second = seeds_of(client, backend, arm, arm)
    assert first == second
    assert seeds_of(client, backend, arm, arm)[0] != first
    assert seeds_of(client, backend, arm, {**arm, "seed": 5}, seed=7) == [7, 5]
    assert seeds_of(
        client, backend, arm, arm, {**arm, "seed": 5}, seed=7, common_random_numbers=False
    ) == [derive_seed(7, 0), derive_seed(7, 1), 5]


def test_stop_texts_are_each_arms_own(client: Client, backend: FakeBackend) -> None:
    body = compare(
        client, {"model": "smollm2"}, {"model": "smollm2:poet", "stop": " quick"}, prompt="a"
    ).json()
    assert [arm["text"] for arm in body["arms"]] == [TEXTS[0], "the"]
    assert [arm["finish_reason"] for arm in body["arms"]] == ["stop", "stop"]
    assert backend.aborted == [(backend.requests[0].request_id, 1)]


@pytest.mark.parametrize("field", [{"messages": USER}, {"prompt": "the"}], ids=["chat", "text"])
def test_stream_has_chunks_of_each_arm_and_the_usage(client: Client, field: Any) -> None:
    arms = [{"model": "smollm2"}, {"model": "smollm2:poet"}, {"model": "smollm2@adapt"}]
    *chunks, last = read_events(compare(client, *arms, stream=True, **field))
    heads = {(chunk["id"], chunk["object"], chunk["created"]) for chunk in [*chunks, last]}
    assert len(heads) == 1
    assert heads.pop()[1] == "comparison.chunk"
    texts, reasons = ["", "", ""], ["", "", ""]
    for chunk in chunks:
        kind = "delta" if "messages" in field else "text"
        assert chunk.keys() == {"id", "object", "created", "arm", kind, "finish_reason"}
        piece = chunk["text"] if kind == "text" else chunk["delta"].get("content", "")
        texts[chunk["arm"]] += piece
        reasons[chunk["arm"]] += chunk["finish_reason"] or ""
    assert texts == TEXTS
    assert reasons == ["stop"] * 3
    assert last.keys() == {"id", "object", "created", "usage"}
    usages = last["usage"].pop("arms")
    assert len(usages) == 3
    assert last["usage"]["completion_tokens"] == sum(u["completion_tokens"] for u in usages)
    if "messages" in field:
        first = {chunk["arm"]: chunk for chunk in reversed(chunks)}
        assert all(first[arm]["delta"]["role"] == "assistant" for arm in range(3))


def test_stream_has_the_trace_if_asked_for(client: Client) -> None:
    arms = [{"model": "smollm2"}, {"model": "smollm2:poet"}]
    *chunks, last = read_events(compare(client, *arms, stream=True, return_decoding_trace=True))
    lengths = [
        sum(len(c.get("decoding_trace", [])) for c in chunks if c["arm"] == arm) for arm in (0, 1)
    ]
    assert lengths == [usage["completion_tokens"] for usage in last["usage"]["arms"]]


ARM = {"model": "smollm2"}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no-arms": ({"arms": []}, "arms", "at least 1"),
    "many-arms": ({"arms": [ARM] * 17}, "arms", "at most 16"),
    "arms-null": ({"arms": None}, "arms", "exactly one of arms and experiment"),
    "arm-text": ({"arms": ["smollm2"]}, "arms[0]", "must be"),
    "no-model": ({"arms": [{}]}, "arms[0].model", "is required"),
    "both": ({"prompt": "a"}, "prompt", "exactly one of messages and prompt"),
    "neither": ({"messages": None}, "messages", "exactly one of messages and prompt"),
    "no-messages": ({"messages": []}, "messages", "must not be empty"),
    "empty-prompt": ({"messages": None, "prompt": ""}, "prompt", "must not be empty"),
    "prompts": ({"messages": None, "prompt": ["a"]}, "prompt", "a string or a list of token ids"),
    "token-id": ({"messages": None, "prompt": [10**6]}, "prompt", "must have token ids from 0"),
    "label": ({"arms": [{**ARM, "label": "x" * 129}]}, "arms[0].label", "at most 128"),
    "n": ({"n": 2}, "n", "Unknown field 'n'"),
    "arm-n": ({"arms": [ARM, {**ARM, "n": 2}]}, "arms[1].n", "Unknown field"),
    "model": ({"model": "smollm2"}, "model", "Unknown field"),
    "tools": ({"tools": [{}]}, "tools", "is not supported"),
    "stream-options": ({"stream_options": {}}, "stream_options", "Unknown field"),
    "temperature": ({"temperature": 3}, "temperature", "temperature must be"),
    "arm-temperature": (
        {"arms": [ARM, {**ARM, "temperature": 3}], "temperature": 1},
        "arms[1].temperature",
        "arms[1]: temperature must be",
    ),
    "arm-decoding": (
        {"arms": [{**ARM, "decoding": {"strategy": "adapt", "c": 1}}]},
        "arms[0].decoding.c",
        "arms[0]: decoding.c is not a parameter",
    ),
    "arm-strategies": (
        {"arms": [{"model": "smollm2@adapt", "decoding": {"strategy": "fixed"}}]},
        "arms[0].decoding.strategy",
        "differs from the model id's '@adapt'",
    ),
    "arm-scale": (
        {"arms": [{**ARM, "adapter_scale": 1}]},
        "arms[0].adapter_scale",
        "needs a model id with a side network",
    ),
    "arm-scale-high": (
        {"arms": [{"model": "smollm2:poet", "adapter_scale": 2}]},
        "arms[0].adapter_scale",
        "must be a number from 0 to 1, got 2",
    ),
    "scale-high": (
        {"arms": [{"model": "smollm2:poet"}], "adapter_scale": 2},
        "adapter_scale",
        "must be a number from 0 to 1, got 2",
    ),
    "zero-tokens": ({"max_tokens": 0}, "max_tokens", "at least 1"),
    "many-tokens": (
        {"arms": [ARM, {**ARM, "max_tokens": 500}]},
        "arms[1].max_tokens",
        "The context is 256 tokens",
    ),
    "long-prompt": (
        {"messages": [{"role": "user", "content": "a " * 900}]},
        "messages",
        "The context is 256 tokens",
    ),
    "seeds": (
        {"arms": [ARM, {**ARM, "seed": 1}], "common_random_numbers": True},
        "arms[1].seed",
        "contradicts common_random_numbers",
    ),
    "seed": (
        {"arms": [{**ARM, "seed": 1}, ARM], "seed": 2**63, "common_random_numbers": False},
        "seed",
        "seed must be",
    ),
    "flag": ({"common_random_numbers": 1}, "common_random_numbers", "must be a valid boolean"),
}


@pytest.mark.parametrize(("fields", "param", "match"), REFUSED.values(), ids=REFUSED)
def test_comparison_that_makes_no_sense_is_refused(
    client: Client, backend: FakeBackend, fields: Any, param: str, match: str
) -> None:
    body = {"messages": USER, "arms": [ARM], **fields}
    message = check_error(client.post("/v1/compare", body), 400, param=param)
    assert match in message
    assert backend.requests == []


@pytest.mark.parametrize("model", ["gpt-4", "smollm2:none", "smollm3:poet", "smollm2@none"])
def test_arm_of_another_model_is_not_found(client: Client, model: str) -> None:
    response = compare(client, ARM, {"model": model})
    check_error(response, 404, param="arms[1].model", code="model_not_found")


def test_number_of_arms_obeys_the_servers_limit(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    settings = ApiSettings(model_id="smollm2", max_sequences_per_prompt=2)
    client = Client(create_app(backend, tokenizer, settings=settings))
    assert compare(client, ARM, ARM).status_code == 200
    assert "at most 2" in check_error(compare(client, ARM, ARM, ARM), 400, param="arms")


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_full_queue_is_unavailable(client: Client, backend: FakeBackend, is_streamed: bool) -> None:
    backend.error = QueueFullError("full", 7)
    check_error(compare(client, ARM, stream=is_streamed), 503, code="queue_full")


def test_failure_of_one_arm_ends_the_comparison(client: Client, backend: FakeBackend) -> None:
    backend.failure = 1
    check_error(compare(client, ARM, ARM), 500, code="internal_error")
    last = compare(client, ARM, ARM, stream=True).text.split("\n\n")[-2]
    assert set(json.loads(last.removeprefix("data: "))) == {"error"}
    assert backend.num_open == 0


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
def test_client_that_leaves_ends_all_arms(
    app: FastAPI, backend: FakeBackend, is_streamed: bool
) -> None:
    backend.script = lambda request, index: [5] * 50
    body = {"prompt": "a", "arms": [ARM, {"model": "smollm2:poet"}], "stream": is_streamed}

    async def run() -> None:
        backend.gate = asyncio.Semaphore(3)
        async with connect(app, "/v1/compare", body) as (connection, task):
            await wait_until(lambda: backend.num_steps == 3)
            connection.left.set()
            async with asyncio.timeout(5):
                await task
            assert backend.num_open == 0
            assert backend.num_steps == 3

    asyncio.run(run())


def test_metrics_count_each_arm(client: Client) -> None:
    compare(client, ARM, {"model": "smollm2:poet@adapt"}, {"model": "smollm2:poet@adapt"})
    lines = client.get("/metrics").text.splitlines()
    ends = [line for line in lines if line.startswith("proa_sequences_finished_total")]
    assert [line.split("strategy=")[1] for line in ends] == ['"fixed"} 1.0', '"adapt"} 2.0']
    tokens = [line for line in lines if line.startswith("proa_adapter_tokens_total")]
    assert [float(line.split()[1]) > 0 for line in tokens] == [False, True]


def test_schema_is_published(client: Client) -> None:
    document = client.get("/openapi.json").json()
    assert {"/v1/compare", "/v1/adapters", "/v1/adapters/{name}"} <= document["paths"].keys()
    schemas = document["components"]["schemas"]
    assert schemas["CompareBody"]["properties"]["arms"]["maxItems"] == 16
    assert schemas["ComparisonArm"]["required"] == ["model"]
    assert schemas["ChatBody"]["properties"]["adapter_scale"]["maximum"] == 1
    assert {"AdapterBody", "LoadAdapterBody", "UnloadAdapterBody"} <= schemas.keys()
