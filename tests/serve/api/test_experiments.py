"""Experiments over the API: who gets which arm, what is noted, what clients say of it."""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from serve.api import ApiSettings, create_app
from serve.api.context import Experiments
from serve.experiments.exposures import ExposureStore
from serve.experiments.plan import PlanError, parse_experiments
from text.tokenizer import Tokenizer

from .conftest import Client, FakeBackend, check_error, make_adapter, read_events

PLAN = [
    {
        "name": "trial",
        "arms": [
            {"label": "plain", "model": "smollm2", "temperature": 0.25},
            {"label": "poet", "model": "smollm2:poet@adapt", "decoding": {"a": 0.9}},
        ],
    },
    {
        "name": "by-talk",
        "unit": "conversation",
        "arms": [{"label": "x", "model": "smollm2"}, {"label": "y", "model": "smollm2@adapt"}],
    },
    {
        "name": "pairs",
        "unit": "paired",
        "arms": [{"label": "x", "model": "smollm2"}, {"label": "y", "model": "smollm2@adapt"}],
    },
    {
        "name": "each",
        "unit": "request",
        "arms": [{"label": "x", "model": "smollm2"}, {"label": "y", "model": "smollm2@adapt"}],
    },
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ExposureStore]:
    opened = ExposureStore(tmp_path / "experiments.sqlite3", busy_timeout_s=0.01)
    yield opened
    opened.close()


def make_app(
    backend: FakeBackend, tokenizer: Tokenizer, store: ExposureStore, plan: Any = None
) -> FastAPI:
    backend.attached["poet"] = make_adapter("poet")
    parsed = parse_experiments(PLAN if plan is None else plan)
    experiments = Experiments(plan={e.name: e for e in parsed}, store=store)
    settings = ApiSettings(model_id="smollm2")
    return create_app(backend, tokenizer, settings=settings, experiments=experiments)


@pytest.fixture
def app(backend: FakeBackend, tokenizer: Tokenizer, store: ExposureStore) -> FastAPI:
    return make_app(backend, tokenizer, store)


def test_user_keeps_an_arm_whose_fields_hold(client: Client, backend: FakeBackend) -> None:
    labels = set()
    for user in range(12):
        answers = [
            client.chat(model="trial", user=f"user {user}", temperature=1.0, seed=5)
            for _ in range(2)
        ]
        arms = [answer.headers["x-proa-arm"] for answer in answers]
        assert arms[0] == arms[1]
        assert answers[0].headers["x-proa-experiment"] == "trial"
        labels.add(arms[0])
        (arm,) = backend.requests[-1].arms
        if arms[0] == "plain":
            assert (arm.adapter, arm.params.temperature) == (None, 0.25)
            assert answers[0].json()["model"] == "smollm2"
        else:
            assert (arm.adapter, arm.params.strategy.name) == ("poet", "adapt")
            assert arm.params.strategy.a == 0.9
            # What the arm does not say is the request's own.
            assert arm.params.temperature == 1.0
        assert arm.params.seed == 5
    assert labels == {"plain", "poet"}


def test_conversation_keeps_its_arm_while_it_goes_on(client: Client) -> None:
    for talk in range(6):
        messages = [{"role": "user", "content": f"hello {talk}"}]
        first = client.chat(model="by-talk", messages=messages)
        messages += [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "go on"}]
        second = client.chat(model="by-talk", messages=messages)
        assert first.headers["x-proa-arm"] == second.headers["x-proa-arm"]
    arms = {
        client.complete(model="by-talk", prompt=f"def f{n}").headers["x-proa-arm"]
        for n in range(20)
    }
    assert arms == {"x", "y"}


def test_requests_without_a_user_are_divided_one_by_one(client: Client) -> None:
    arms = {client.chat(model="each", user="me").headers["x-proa-arm"] for _ in range(30)}
    assert arms == {"x", "y"}
    arms = {client.chat(model="trial").headers["x-proa-arm"] for _ in range(30)}
    assert arms == {"plain", "poet"}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_answer_is_noted_before_the_client_has_it_all(
    client: Client, store: ExposureStore, is_streamed: bool
) -> None:
    response = client.chat(model="trial", user="me", stream=is_streamed)
    body = read_events(response)[0] if is_streamed else response.json()
    arm = response.headers["x-proa-arm"]
    assert store.find(body["id"]) == ("trial", [arm])
    totals = store.totals("trial")[arm]
    assert totals.exposures == 1
    assert totals.completion_tokens >= 2
    assert 0 <= totals.first_token_s <= totals.seconds < 60
    assert totals.failures == 0


def test_completion_is_noted_too(client: Client, store: ExposureStore) -> None:
    response = client.complete(model="each", stream=True)
    (event, *_) = read_events(response)
    assert store.find(event["id"]) == ("each", [response.headers["x-proa-arm"]])


def test_other_requests_are_not_noted(client: Client, store: ExposureStore) -> None:
    response = client.chat()
    assert "x-proa-arm" not in response.headers
    assert store.find(response.json()["id"]) is None


def test_failure_is_noted(client: Client, backend: FakeBackend, store: ExposureStore) -> None:
    backend.failure, backend.failure_error = 1, RuntimeError("broken")
    response = client.chat(model="trial", user="me")
    assert response.status_code == 500
    end_s = time.monotonic() + 10
    while not store.totals("trial") and time.monotonic() < end_s:
        time.sleep(0.01)
    (totals,) = store.totals("trial").values()
    assert (totals.exposures, totals.failures) == (1, 1)


def test_feedback_counts_in_the_report(client: Client) -> None:
    for number in range(80):
        response = client.chat(model="trial", user=f"user {number}")
        body = {
            "id": response.json()["id"],
            "rating": 0.9 if response.headers["x-proa-arm"] == "poet" else 0.1,
            "accepted": True,
        }
        answer = client.post("/v1/feedback", body)
        assert answer.json() == {
            "id": body["id"], "object": "feedback", "experiment": "trial",
            "arm": response.headers["x-proa-arm"],
        }  # fmt: skip
    report = client.get("/v1/experiments/trial").json()
    assert report["object"] == "experiment.report"
    rating = report["outcomes"]["rating"]
    assert rating["differences"]["poet"]["verdict"] == "better"
    assert rating["differences"]["poet"]["value"] == pytest.approx(0.8)
    assert report["outcomes"]["accepted"]["differences"]["poet"]["verdict"] == "undecided"
    assert sum(arm["exposures"] for arm in report["arms"]) == 80


def test_paired_experiment_is_asked_through_compare(client: Client, store: ExposureStore) -> None:
    body = {"experiment": "pairs", "messages": [{"role": "user", "content": "hi"}], "seed": 1}
    for is_streamed in (False, True):
        response = client.post("/v1/compare", {**body, "stream": is_streamed})
        content = read_events(response)[0] if is_streamed else response.json()
        assert response.headers["x-proa-arm"] == "x, y"
        assert store.find(content["id"]) == ("pairs", ["x", "y"])
        if not is_streamed:
            assert [arm["label"] for arm in content["arms"]] == ["x", "y"]
        assert client.post("/v1/feedback", {"id": content["id"], "preferred": "y"}).json() == {
            "id": content["id"], "object": "feedback", "experiment": "pairs", "arm": None,
        }  # fmt: skip
    report = client.get("/v1/experiments/pairs").json()
    assert report["outcomes"]["preferred"]["arms"]["y"]["count"] == 2


def test_lists_name_experiments(client: Client) -> None:
    entries = client.get("/v1/experiments").json()["data"]
    assert [entry["id"] for entry in entries] == ["trial", "by-talk", "pairs", "each"]
    assert entries[0]["arms"][1] == {
        "label": "poet", "model": "smollm2:poet@adapt", "fields": {"decoding": {"a": 0.9}},
        "weight": 1.0,
    }  # fmt: skip
    models = {entry["id"]: entry["x_kind"] for entry in client.get("/v1/models").json()["data"]}
    assert models["trial"] == "experiment"
    assert client.get("/v1/models/trial").json()["x_kind"] == "experiment"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({}, "rating"),
        ({"rating": 1.5}, "rating"),
        ({"rating": -0.1}, "rating"),
        ({"rating": True}, "rating"),
        ({"rating": "good"}, "rating"),
        ({"accepted": 1}, "accepted"),
        ({"preferred": "plain"}, "preferred"),
        ({"stars": 5}, "stars"),
    ],
)
def test_bad_feedback_is_refused_by_name(client: Client, change: dict, param: str) -> None:
    answer_id = client.chat(model="trial", user="me").json()["id"]
    check_error(client.post("/v1/feedback", {"id": answer_id, **change}), 400, param=param)


def test_bad_feedback_on_a_comparison_is_refused_by_name(client: Client) -> None:
    body = {"experiment": "pairs", "prompt": "the fox"}
    answer_id = client.post("/v1/compare", body).json()["id"]
    for change in ({"rating": 1.0}, {"accepted": True}, {"preferred": "z"}):
        (param,) = change
        check_error(client.post("/v1/feedback", {"id": answer_id, **change}), 400, param=param)


def test_unknown_things_are_not_found(client: Client) -> None:
    feedback = client.post("/v1/feedback", {"id": "chatcmpl-0", "rating": 1.0})
    check_error(feedback, 404, param="id", code="answer_not_found")
    check_error(client.get("/v1/experiments/no"), 404, code="experiment_not_found")
    body = {"experiment": "no", "prompt": "x"}
    check_error(client.post("/v1/compare", body), 404, param="experiment")
    check_error(client.chat(model="no"), 404, param="model", code="model_not_found")


def test_experiment_is_asked_the_way_it_divides(client: Client) -> None:
    message = check_error(client.chat(model="pairs"), 400, param="model", code="invalid_value")
    assert "/v1/compare" in message
    body = {"experiment": "trial", "prompt": "x"}
    check_error(client.post("/v1/compare", body), 400, param="experiment")
    both = {"experiment": "pairs", "arms": [{"model": "smollm2"}], "prompt": "x"}
    check_error(client.post("/v1/compare", both), 400, param="experiment")
    check_error(client.post("/v1/compare", {"prompt": "x"}), 400, param="arms")


def test_server_without_experiments_says_so(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    client = Client(create_app(backend, tokenizer, settings=ApiSettings(model_id="smollm2")))
    assert client.get("/v1/experiments").json() == {"object": "list", "data": []}
    feedback = client.post("/v1/feedback", {"id": "x", "rating": 1.0})
    check_error(feedback, 404, code="experiments_off")


def test_file_that_fails_costs_no_answer(
    client: Client, store: ExposureStore, caplog: pytest.LogCaptureFixture
) -> None:
    answer_id = client.chat(model="trial", user="me").json()["id"]
    store.close()
    with caplog.at_level(logging.ERROR, logger="proa.api"):
        assert client.chat(model="trial", user="me").status_code == 200
    assert "an exposure cannot be kept" in caplog.text
    feedback = client.post("/v1/feedback", {"id": answer_id, "rating": 1.0})
    check_error(feedback, 503, code="experiments_unavailable")
    check_error(client.get("/v1/experiments/trial"), 503, code="experiments_unavailable")


def arm(**fields: Any) -> list[dict[str, Any]]:
    arms = [{"label": "a", "model": "smollm2"}, {"label": "b", "model": "smollm2", **fields}]
    return [{"name": "trial", "arms": arms}]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([{**PLAN[1], "name": "smollm2"}], "experiment 'smollm2' is named like the model"),
        (arm(model="other"), "experiment 'trial', arm 'b': model: There is no such model"),
        (arm(model="smollm2:bard"), "arm 'b': model: There is no such adapter; attached: poet"),
        (arm(temperature=5), "arm 'b': temperature: temperature must be"),
        (arm(temperature="hot"), "arm 'b': temperature: "),
        (arm(heat=1), "arm 'b': heat: "),
        (arm(seed=1), "arm 'b': seed: one seed for all"),
        (arm(decoding={"strategy": "no"}), "arm 'b': decoding.strategy: "),
        (arm(decoding={"strategy": "adapt", "a": 9}), "arm 'b': decoding.a: "),
        (arm(adapter_scale=0.5), "arm 'b': adapter_scale: "),
    ],
)
def test_arm_that_the_server_cannot_serve_is_refused_at_the_start(
    backend: FakeBackend, tokenizer: Tokenizer, store: ExposureStore, plan: Any, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        make_app(backend, tokenizer, store, plan)


def test_client_that_leaves_is_noted_as_a_failure(
    app: FastAPI, backend: FakeBackend, store: ExposureStore
) -> None:
    backend.gate = asyncio.Semaphore(0)

    async def run() -> None:
        sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        gone = asyncio.Event()
        content = b'{"model": "trial", "user": "me", "stream": true, "messages": ' + (
            b'[{"role": "user", "content": "hi"}]}'
        )
        incoming = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": "/v1/chat/completions", "root_path": "",
            "raw_path": b"/v1/chat/completions", "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"),
                        (b"content-length", str(len(content)).encode())],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {},
        }  # fmt: skip
        task = asyncio.create_task(app(scope, receive, sent.put))
        assert backend.gate is not None
        backend.gate.release()
        while not backend.num_steps:
            await asyncio.sleep(0.01)
        gone.set()
        await task
        end_s = time.monotonic() + 10
        while not store.totals("trial") and time.monotonic() < end_s:
            await asyncio.sleep(0.01)

    asyncio.run(run())
    (totals,) = store.totals("trial").values()
    assert (totals.exposures, totals.failures) == (1, 1)
