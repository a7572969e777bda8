"""Votes on comparisons: which arm is better, what is refused, and what outlives the server."""

import logging
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.api import ApiSettings, create_app
from serve.experiments.comparison import Comparison
from serve.experiments.store import MAX_ARMS_CHARS, VoteStore
from stats.proportions import wilson_interval
from text.tokenizer import Tokenizer

from .conftest import END, Client, FakeBackend, check_error, make_adapter, read_events
from .test_compare import compare

A = {"model": "smollm2", "label": "A"}
B = {"model": "smollm2:poet", "label": "B"}
C = {"model": "smollm2@adapt", "label": "C"}
UNKNOWN_ID = "cmp-" + "0" * 32
KEY = "sk-correct-horse"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "votes.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[VoteStore]:
    """A store that does not wait for a writer that is in the way."""
    opened = VoteStore(path, busy_timeout_s=0.01)
    yield opened
    opened.close()


@pytest.fixture
def app(
    backend: FakeBackend, tokenizer: Tokenizer, api_settings: ApiSettings, store: VoteStore
) -> FastAPI:
    for name in ("poet", "code"):
        backend.attached[name] = make_adapter(name)
    return create_app(backend, tokenizer, settings=api_settings, votes=store)


def ask(client: Client, *arms: Any, **fields: Any) -> str:
    """Return the id of an answered comparison."""
    response = compare(client, *arms, **fields)
    body = read_events(response)[-1] if fields.get("stream") else response.json()
    return str(body["id"])


def vote(client: Client, comparison_id: str, value: Any) -> httpx.Response:
    return client.post(f"/v1/compare/{comparison_id}/vote", {"vote": value})


def rows(client: Client) -> list[dict[str, Any]]:
    body = client.get("/v1/compare/votes").json()
    assert body.keys() == {"object", "data"}
    return list(body["data"])


STREAMED = pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])


@STREAMED
def test_vote_is_answered_with_the_winner_and_the_tally(client: Client, is_streamed: bool) -> None:
    comparison_id = ask(client, A, {**B, "adapter_scale": 0.5}, stream=is_streamed)
    answer = vote(client, comparison_id, 1).json()
    created = answer.pop("created")
    assert type(created) is int
    assert answer == {
        "id": comparison_id,
        "object": "comparison.vote",
        "vote": 1,
        "label": "B",
        "tally": [
            {
                "arms": [A, {**B, "adapter_scale": 0.5}],
                "wins": [0, 1],
                "ties": 0,
                "both_bad": 0,
                "votes": 1,
                "win_rate": 0.0,
                "interval": list(wilson_interval(0, 1)),
                "confidence": 0.95,
            }
        ],
    }


@pytest.mark.parametrize("field", [{"prompt": "the"}, {"prompt": [5]}], ids=["text", "token-ids"])
@STREAMED
def test_comparison_of_texts_can_be_voted_on(
    client: Client, field: dict[str, Any], is_streamed: bool
) -> None:
    assert vote(client, ask(client, A, B, stream=is_streamed, **field), 0).status_code == 200


@pytest.mark.parametrize(("word", "column"), [("tie", "ties"), ("both_bad", "both_bad")])
def test_word_has_no_winner(client: Client, word: str, column: str) -> None:
    answer = vote(client, ask(client, A, B), word).json()
    assert (answer["vote"], answer["label"], answer["tally"][0][column]) == (word, None, 1)


def test_both_bad_alone_gives_no_rate(client: Client) -> None:
    vote(client, ask(client, A, B), "both_bad")
    (row,) = rows(client)
    assert (row["votes"], row["win_rate"], row["interval"]) == (1, None, None)


def test_second_vote_replaces_the_first(client: Client) -> None:
    comparison_id = ask(client, A, B)
    vote(client, comparison_id, 0)
    (row,) = vote(client, comparison_id, 1).json()["tally"]
    assert row["wins"] == [0, 1]


def test_tally_of_a_vote_has_the_pairs_of_its_comparison_only(client: Client) -> None:
    vote(client, ask(client, A, C), 0)
    vote(client, ask(client, A, B, C), 2)
    (row,) = vote(client, ask(client, B, A), 1).json()["tally"]
    assert ([arm["label"] for arm in row["arms"]], row["wins"]) == (["A", "B"], [1, 0])


def test_list_has_every_pair(client: Client) -> None:
    vote(client, ask(client, A, B, C), 0)
    vote(client, ask(client, C, B), "tie")
    found = [
        ("".join(arm["label"] for arm in row["arms"]), row["wins"], row["ties"])
        for row in rows(client)
    ]
    assert found == [("AB", [1, 0], 0), ("AC", [1, 0], 0), ("BC", [0, 0], 1)]


def test_list_is_empty_without_votes(client: Client) -> None:
    ask(client, A, B)
    assert rows(client) == []


def arms_of(client: Client, *arms: Any, **fields: Any) -> list[dict[str, Any]]:
    """Return the arms of a comparison as votes know them, in the order of their labels."""
    (row,) = vote(client, ask(client, *arms, **fields), 0).json()["tally"]
    return list(row["arms"])


def test_arms_have_the_fields_that_held_for_them(client: Client) -> None:
    found = arms_of(
        client,
        {**A, "temperature": 0, "top_p": 0.9},
        {**B, "max_tokens": 3},
        temperature=0.5,
        max_tokens=9,
        adapter_scale=0.25,
        stop="x",
    )
    assert found == [
        {**A, "temperature": 0, "top_p": 0.9, "max_tokens": 9, "stop": ["x"]},
        {**B, "temperature": 0.5, "max_tokens": 3, "adapter_scale": 0.25, "stop": ["x"]},
    ]


def test_arms_have_the_strategy_that_held_for_them(client: Client) -> None:
    decoding = {"strategy": "fixed"}
    assert arms_of(client, A, C, decoding=decoding) == [{**A, "decoding": decoding}, C]


@pytest.mark.parametrize(
    "fields", [{"seed": 7}, {"seed": 7, "common_random_numbers": False}], ids=["common", "own"]
)
def test_seed_does_not_count(client: Client, fields: dict[str, Any]) -> None:
    assert arms_of(client, A, B, **fields) == [A, B]
    assert arms_of(client, {**A, "seed": 5}, B) == [A, B]


def test_arm_without_a_label_is_called_by_its_model(client: Client) -> None:
    found = arms_of(client, {"model": "smollm2"}, {"model": "smollm2:poet"})
    assert [arm["label"] for arm in found] == ["smollm2", "smollm2:poet"]


def test_arms_that_differ_by_label_alone_are_two(client: Client) -> None:
    assert arms_of(client, A, {**A, "label": "Z"}) == [A, {**A, "label": "Z"}]


def test_equal_arms_have_no_row(client: Client) -> None:
    assert vote(client, ask(client, A, A), 0).json()["tally"] == []


ALLOWED = "vote must be the index of an arm, 'tie' or 'both_bad', got "
IN_RANGE = "vote must be the index of an arm, 0 to 1, or 'tie' or 'both_bad', got "
REFUSED: dict[str, tuple[Any, str, str]] = {
    "high": (2, IN_RANGE + "2.", "invalid_value"),
    "negative": (-1, IN_RANGE + "-1.", "invalid_value"),
    "huge": (10**40, IN_RANGE + "a huge number.", "invalid_value"),
    "true": (True, ALLOWED + "true.", "invalid_type"),
    "false": (False, ALLOWED + "false.", "invalid_type"),
    "null": (None, ALLOWED + "null.", "invalid_type"),
    "float": (1.0, ALLOWED + "1.0.", "invalid_type"),
    "fraction": (0.5, ALLOWED + "0.5.", "invalid_type"),
    "text": ("both", ALLOWED + "a string.", "invalid_type"),
    "digit": ("1", ALLOWED + "a string.", "invalid_type"),
    "case": ("Tie", ALLOWED + "a string.", "invalid_type"),
    "empty": ("", ALLOWED + "a string.", "invalid_type"),
    "list": ([1], ALLOWED + "a list.", "invalid_type"),
    "object": ({"tie": 1}, ALLOWED + "an object.", "invalid_type"),
}


@pytest.mark.parametrize(("value", "message", "code"), REFUSED.values(), ids=REFUSED)
def test_vote_for_nothing_is_refused(client: Client, value: Any, message: str, code: str) -> None:
    response = vote(client, ask(client, A, B), value)
    assert check_error(response, 400, param="vote", code=code) == message


def test_refused_vote_is_not_counted(client: Client) -> None:
    vote(client, ask(client, A, B), 2)
    assert rows(client) == []


def test_missing_vote_is_refused(client: Client) -> None:
    response = client.post(f"/v1/compare/{ask(client, A, B)}/vote", {})
    message = check_error(response, 400, param="vote", code="missing_field")
    assert message == "vote is required."


def test_other_field_is_refused(client: Client) -> None:
    response = client.post(f"/v1/compare/{ask(client, A, B)}/vote", {"vote": 0, "why": "x"})
    assert check_error(response, 400, param="why", code="unknown_field") == "Unknown field 'why'."


def test_body_that_is_no_json_is_refused(client: Client) -> None:
    response = client.post(f"/v1/compare/{ask(client, A, B)}/vote", content=b"{vote: 1}")
    assert "not valid JSON" in check_error(response, 400, code="invalid_json")


@pytest.mark.parametrize("value", [0, 1, "tie"])
def test_single_arm_cannot_be_voted_on(client: Client, value: Any) -> None:
    message = check_error(vote(client, ask(client, A), value), 400, code="single_arm")
    assert message == "A comparison with a single arm cannot be voted on."


@pytest.mark.parametrize(
    "comparison_id",
    [UNKNOWN_ID, "cmp-", "cmp-" + "0" * 33, "chatcmpl-" + "0" * 32, "cmp-" + "A" * 32, "nonsense",
     "cmp-%00", "%ED%A0%80", "x" * 5000],
    ids=["unknown", "short", "long", "other kind", "capitals", "text", "nul", "surrogate", "huge"],
)  # fmt: skip
def test_unknown_comparison_is_not_found(client: Client, comparison_id: str) -> None:
    message = check_error(vote(client, comparison_id, 0), 404, code="comparison_not_found")
    assert message == "There is no such comparison to vote on."


@STREAMED
def test_comparison_that_failed_cannot_be_voted_on(
    client: Client, backend: FakeBackend, store: VoteStore, is_streamed: bool
) -> None:
    backend.failure = 1
    compare(client, A, B, stream=is_streamed)
    (request,) = backend.requests
    assert store.find(request.request_id) is None


def test_comparison_of_huge_arms_is_answered_and_cannot_be_voted_on(client: Client) -> None:
    bias = {str(token_id): 1 for token_id in range(300)}
    arms = [{**A, "logit_bias": bias}] * 16
    assert 16 * len(str(bias)) > MAX_ARMS_CHARS
    check_error(vote(client, ask(client, *arms), 0), 404, code="comparison_not_found")


@pytest.mark.parametrize(
    ("method", "url"), [("POST", f"/v1/compare/{UNKNOWN_ID}/vote"), ("GET", "/v1/compare/votes")]
)
def test_server_without_a_store_says_so(
    backend: FakeBackend, tokenizer: Tokenizer, api_settings: ApiSettings, method: str, url: str
) -> None:
    client = Client(create_app(backend, tokenizer, settings=api_settings))
    assert compare(client, A, A).status_code == 200
    message = check_error(client.request(method, url, json={"vote": 0}), 404, code="votes_off")
    assert message == "This server keeps no votes."


def test_old_comparison_can_be_voted_on_after_a_restart(
    client: Client, backend: FakeBackend, tokenizer: Tokenizer, store: VoteStore, path: Path
) -> None:
    comparison_id = ask(client, A, B)
    store.close()
    reopened = VoteStore(path)
    settings = ApiSettings(model_id="other")
    restarted = Client(create_app(backend, tokenizer, settings=settings, votes=reopened))
    answer = vote(restarted, comparison_id, 1).json()
    reopened.close()
    assert answer["tally"][0]["arms"] == [A, B]


def test_votes_are_counted_on_after_a_restart(
    client: Client, backend: FakeBackend, tokenizer: Tokenizer, store: VoteStore, path: Path
) -> None:
    vote(client, ask(client, A, B), 1)
    store.close()
    reopened = VoteStore(path)
    settings = ApiSettings(model_id="smollm2")
    restarted = Client(create_app(backend, tokenizer, settings=settings, votes=reopened))
    vote(restarted, ask(restarted, A, B), 1)
    (row,) = rows(restarted)
    reopened.close()
    assert row["wins"] == [0, 2]


@pytest.fixture
def block(store: VoteStore, path: Path) -> Iterator[sqlite3.Connection]:
    """A connection whose transaction keeps the store from writing."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN IMMEDIATE")
    yield db
    db.close()


@STREAMED
def test_comparison_is_answered_although_the_disk_fails(
    client: Client,
    block: sqlite3.Connection,
    caplog: pytest.LogCaptureFixture,
    path: Path,
    is_streamed: bool,
) -> None:
    ask(client, A, B, prompt="the quick", stream=is_streamed)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, f"a comparison cannot be kept for votes: cannot use {path}: database is "
         "locked"),
    ]  # fmt: skip


def test_vote_is_unavailable_while_the_disk_fails(
    client: Client, block: sqlite3.Connection, path: Path
) -> None:
    response = vote(client, ask(client, A, B), 0)
    message = check_error(response, 503, code="votes_unavailable")
    assert message == "The server cannot read or write its file of votes; its log says why."
    assert str(path) not in response.text


def test_comparison_answered_while_the_disk_failed_can_be_voted_on_later(
    client: Client, block: sqlite3.Connection
) -> None:
    comparison_id = ask(client, A, B)
    block.execute("ROLLBACK")
    assert vote(client, comparison_id, 0).status_code == 200


def test_list_is_unavailable_when_the_file_cannot_be_read(
    client: Client, store: VoteStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.close()
    check_error(client.get("/v1/compare/votes"), 503, code="votes_unavailable")
    assert "closed database" in caplog.text


def test_disk_is_waited_for_in_other_threads(
    client: Client, store: VoteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's event loop runs in the main thread."""
    threads: dict[str, threading.Thread] = {}

    def watch(name: str) -> None:
        method = getattr(VoteStore, name)

        def call(*args: Any, **options: Any) -> Any:
            threads[name] = threading.current_thread()
            return method(*args, **options)

        monkeypatch.setattr(VoteStore, name, call)

    for name in ("remember", "find", "vote", "ballots"):
        watch(name)
    vote(client, ask(client, A, B), 0)
    assert threads.keys() == {"remember", "find", "vote", "ballots"}
    assert threading.main_thread() not in threads.values()


@STREAMED
def test_comparison_is_kept_before_the_client_hears_of_the_end(
    app: FastAPI, store: VoteStore, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    """The order of what is kept and of what is sent."""
    happened: list[str] = []
    remember = VoteStore.remember

    def watch_remember(self: VoteStore, comparison: Comparison) -> None:
        remember(self, comparison)
        happened.append("kept")

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def watch_send(message: Any) -> None:
            data = message.get("body", b"")
            happened.append("told" if b"[DONE]" in data or b'"arms"' in data else "sent")
            await send(message)

        await app(scope, receive, watch_send)

    monkeypatch.setattr(VoteStore, "remember", watch_remember)
    compare(Client(watched), A, B, stream=is_streamed)  # type: ignore[arg-type]
    assert [event for event in happened if event != "sent"] == ["kept", "told"]


def test_file_has_no_prompts_answers_and_keys(
    backend: FakeBackend, tokenizer: Tokenizer, store: VoteStore, path: Path
) -> None:
    backend.attached["poet"] = make_adapter("poet")
    backend.script = lambda request, index: [*tokenizer.encode("my answer"), END]
    settings = ApiSettings(model_id="smollm2", api_keys=(KEY,))
    app = create_app(backend, tokenizer, settings=settings, votes=store)
    client = Client(app, headers={"Authorization": f"Bearer {KEY}"})
    messages = [{"role": "user", "content": "my question"}]
    for fields in ({"messages": messages}, {"prompt": "my question"}):
        vote(client, ask(client, A, B, **fields), 0)
    written = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"smollm2:poet" in written
    assert [text for text in (b"question", b"answer", KEY.encode()) if text in written] == []


def test_key_opens_votes(backend: FakeBackend, tokenizer: Tokenizer, store: VoteStore) -> None:
    settings = ApiSettings(model_id="smollm2", api_keys=(KEY,))
    app = create_app(backend, tokenizer, settings=settings, votes=store)
    client = Client(app, headers={"Authorization": f"Bearer {KEY}"})
    assert vote(client, ask(client, A, {**A, "label": "B"}), 0).status_code == 200


def test_schema_of_a_vote_is_published(client: Client) -> None:
    document = client.get("/openapi.json").json()
    assert {"/v1/compare/{id}/vote", "/v1/compare/votes"} <= document["paths"].keys()
    (parameter,) = document["paths"]["/v1/compare/{id}/vote"]["post"]["parameters"]
    assert (parameter["name"], parameter["in"]) == ("id", "path")
    schema = document["components"]["schemas"]["VoteBody"]
    assert schema["required"] == ["vote"]
    assert schema["properties"]["vote"]["anyOf"] == [
        {"type": "integer", "minimum": 0},
        {"enum": ["tie", "both_bad"]},
    ]
