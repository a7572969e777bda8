import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from serve.api import ApiSettings, create_app
from text.tokenizer import Tokenizer

from .conftest import CONTEXT, END, Client, FakeBackend, check_error, make_client

PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]
USER = {"role": "user", "content": "hi"}


def nested(depth: int) -> bytes:
    return b'{"metadata":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"


BODIES = {
    "empty": (b"", "not valid JSON"),
    "truncated": (b'{"messages": [', "not valid JSON"),
    "array": (b"[]", "must be a JSON object"),
    "string": (b'"x"', "must be a JSON object"),
    "number": (b"1", "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
    "latin-1": (b'{"user": "\xe9"}', "not UTF-8 at byte 10"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "bom": (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
    "nan": (b'{"temperature": NaN}', "NaN is no JSON number"),
    "infinity": (b'{"temperature": Infinity}', "Infinity is no JSON number"),
    "minus-infinity": (b'{"temperature": -Infinity}', "-Infinity is no JSON number"),
    "200-deep": (nested(200), "more than 32 levels"),
    "200-deep-lists": (b'{"prompt":' + b"[" * 200 + b"]" * 200 + b"}", "more than 32 levels"),
    "200000-deep": (nested(200_000), "more than 32768 lists and objects"),
    "20000-deep": (nested(20_000), "more than 32 levels"),
    "unclosed-20000-deep": (b"[" * 20_000, "more than 32 levels"),
    "twice": (b'{"user": "a", "user": "b"}', "key 'user' is given twice"),
    "many-keys": (json.dumps({str(i): i for i in range(5000)}).encode(), "more than 4096 keys"),
    "digits": (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
    "surrogate": (b'{"user": "\\ud800"}', "surrogate"),
    "upper-surrogate": (b'{"user": "\\uDC00x"}', "surrogate"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("data", "match"), BODIES.values(), ids=BODIES)
def test_broken_body_is_refused(client: Client, path: str, data: bytes, match: str) -> None:
    message = check_error(client.post(path, content=data), 400, code="invalid_json")
    assert match in message


def test_surrogate_pair_is_a_character(client: Client) -> None:
    data = b'{"content": "\\ud83d\\udef6"}'
    assert client.post("/tokenize", content=data).status_code == 200


CHAT_FIELDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "misspelt": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "unknown": ({"frobnicate": 1}, "frobnicate", "Unknown field 'frobnicate'"),
    "unknown-long": ({"x" * 9000: 1}, "x" * 61 + "...", "Unknown field"),
    "no-messages": ({"messages": []}, "messages", "must not be empty"),
    "messages-null": ({"messages": None}, "messages", "must be a valid list, got null"),
    "messages-text": ({"messages": "hi"}, "messages", "must be a valid list, got a string"),
    "message-text": ({"messages": ["hi"]}, "messages[0]", "must be"),
    "role": ({"messages": [{**USER, "role": "king"}]}, "messages[0].role", "must be 'system'"),
    "role-tool": ({"messages": [{**USER, "role": "tool"}]}, "messages[0].role", "tools are not"),
    "role-list": ({"messages": [{**USER, "role": []}]}, "messages[0].role", "must be 'system'"),
    "no-content": ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
    "content-null": (
        {"messages": [{"role": "assistant", "content": None}]},
        "messages[0].content",
        "must be a string or a list of text parts",
    ),
    "content-empty-list": (
        {"messages": [{"role": "user", "content": []}]},
        "messages[0].content",
        "must be a string or a list of text parts",
    ),
    "text-part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "messages[0].content",
        "must have parts with a type and a text",
    ),
    "message-field": ({"messages": [{**USER, "x": 1}]}, "messages[0].x", "Unknown field"),
    "tool-calls": (
        {"messages": [{**USER, "tool_calls": [{"id": "1"}]}]},
        "messages[0].tool_calls",
        "is not supported",
    ),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    "functions": ({"functions": [{"name": "f"}]}, "functions", "is not supported"),
    "tool-choice": ({"tool_choice": "required"}, "tool_choice", "is not supported"),
    "response-format": (
        {"response_format": {"type": "json_object"}},
        "response_format.type",
        "must be 'text'",
    ),
    "chat-template": ({"chat_template": "{{ 1 }}"}, "chat_template", "is not supported"),
    "template-kwargs": (
        {"chat_template_kwargs": {"tokenize": False}},
        "chat_template_kwargs",
        "is not supported",
    ),
    "modalities": ({"modalities": ["text", "audio"]}, "modalities", "is not supported"),
    "store": ({"store": True}, "store", "must be False"),
    "metadata": ({"metadata": {"a": 1}}, "metadata", "strings"),
    "n-zero": ({"n": 0}, "n", "from 1 to 128"),
    "n-huge": ({"n": 2**63}, "n", "from 1 to 128"),
    "temperature": ({"temperature": 2.5}, "temperature", "got 2.5"),
    "temperature-negative": ({"temperature": -1}, "temperature", "temperature must be"),
    "temperature-type": ({"temperature": "5"}, "temperature", "got a string"),
    "temperature-bool": ({"temperature": True}, "temperature", "got true"),
    "temperature-overflow": ({"temperature": 10**400}, "temperature", "a huge number"),
    "top-p": ({"top_p": 0}, "top_p", "top_p must be"),
    "top-k": ({"top_k": 2**40}, "top_k", "top_k must be"),
    "penalty": ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
    "seed": ({"seed": 2**63}, "seed", "seed must be"),
    "max-tokens-zero": ({"max_tokens": 0}, "max_tokens", "at least 1"),
    "max-tokens-bool": ({"max_tokens": True}, "max_tokens", "valid integer, got true"),
    "max-tokens-float": ({"max_tokens": 5.0}, "max_tokens", "valid integer"),
    "completion-tokens": ({"max_completion_tokens": -1}, "max_completion_tokens", "at least 1"),
    "min-tokens": ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "at most max_tokens"),
    "top-logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    "top-logprobs-alone": ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    "stop-empty": ({"stop": ""}, "stop", "stop must be"),
    "stop-many": ({"stop": ["a"] * 10_000}, "stop", "stop must be"),
    "stop-type": ({"stop": [5]}, "stop", "a string or a list of strings"),
    "stop-long": ({"stop": "a" * 5000}, "stop", "stop must be"),
    "stop-ids": ({"stop_token_ids": [10**6]}, "stop_token_ids", "the model's vocabulary"),
    "stop-ids-bool": ({"stop_token_ids": [True]}, "stop_token_ids", "a list of token ids"),
    "bias-key": ({"logit_bias": {"a": 1}}, "logit_bias", "token ids as keys"),
    "bias-key-sign": ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids as keys"),
    "bias-range": ({"logit_bias": {"5": 101}}, "logit_bias", "logit_bias must be"),
    "bias-value": ({"logit_bias": {"5": "1"}}, "logit_bias", "numbers as values"),
    "bias-vocabulary": ({"logit_bias": {"999999": 1}}, "logit_bias", "the model's vocabulary"),
    "stream-options": ({"stream_options": {}}, "stream_options", "needs stream"),
    "stream-options-field": (
        {"stream": True, "stream_options": {"x": 1}},
        "stream_options.x",
        "Unknown field",
    ),
    "stream-type": ({"stream": "yes"}, "stream", "must be a valid boolean"),
    "strategy": ({"decoding": {"strategy": "magic"}}, "decoding.strategy", "one of adapt"),
    "strategy-missing": ({"decoding": {}}, "decoding.strategy", "one of adapt"),
    "strategy-type": ({"decoding": "adapt"}, "decoding", "got a string"),
    "strategy-field": (
        {"decoding": {"strategy": "adapt", "c": 1}},
        "decoding.c",
        "its parameters: ",
    ),
    "strategy-value": (
        {"decoding": {"strategy": "adapt", "a": "hot"}},
        "decoding.a",
        "decoding.a must be",
    ),
    "model-type": ({"model": 5}, "model", "must be a valid string"),
}


@pytest.mark.parametrize(("fields", "param", "match"), CHAT_FIELDS.values(), ids=CHAT_FIELDS)
def test_bad_chat_field_is_refused_by_name(
    client: Client, backend: FakeBackend, fields: dict[str, Any], param: str, match: str
) -> None:
    assert match in check_error(client.chat(**fields), 400, param=param)
    assert backend.requests == []


def test_stop_tokens_that_leave_the_end_token_only_are_refused(
    client: Client, backend: FakeBackend
) -> None:
    stops = [i for i in range(backend.vocab_size) if i != END]
    answer = client.chat(stop_token_ids=stops, min_tokens=1, max_tokens=2)
    check_error(answer, 400, param="stop_token_ids")
    assert backend.requests == []


COMPLETION_FIELDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "prompt-empty": ({"prompt": ""}, "prompt", "must not be empty"),
    "prompt-empty-list": ({"prompt": []}, "prompt", "must not be empty"),
    "prompt-empty-text": ({"prompt": ["a", ""]}, "prompt", "must not be empty"),
    "prompt-empty-ids": ({"prompt": [[]]}, "prompt", "must not be empty"),
    "prompt-null": ({"prompt": None}, "prompt", "got null"),
    "prompt-bool": ({"prompt": [True]}, "prompt", "list of token id lists"),
    "prompt-float": ({"prompt": [1.0]}, "prompt", "list of token id lists"),
    "prompt-nested": ({"prompt": [[[1]]]}, "prompt", "list of token id lists"),
    "prompt-object": ({"prompt": {"a": 1}}, "prompt", "list of token id lists"),
    "id-negative": ({"prompt": [5, -1]}, "prompt", "got -1"),
    "id-vocabulary": ({"prompt": [[10**6]]}, "prompt", "got 1000000"),
    "id-huge": ({"prompt": [2**63]}, "prompt", "a huge number"),
    "prompts-times-n": ({"prompt": ["a"] * 20, "n": 100}, "n", "more than 1024 sequences"),
    "prompts": ({"prompt": ["a"] * 1025}, "prompt", "more than 1024 sequences"),
    "logprobs": ({"logprobs": 21}, "logprobs", "logprobs must be"),
    "logprobs-bool": ({"logprobs": True}, "logprobs", "must be a valid integer"),
    "max-tokens": ({"max_tokens": -1}, "max_tokens", "at least 0"),
    "best-of": ({"best_of": 2}, "best_of", "only where it equals n"),
    "messages": ({"messages": []}, "messages", "Unknown field"),
}


@pytest.mark.parametrize(
    ("fields", "param", "match"), COMPLETION_FIELDS.values(), ids=COMPLETION_FIELDS
)
def test_bad_completion_field_is_refused_by_name(
    client: Client, backend: FakeBackend, fields: dict[str, Any], param: str, match: str
) -> None:
    assert match in check_error(client.complete(**fields), 400, param=param)
    assert backend.requests == []


def test_missing_field_is_refused_by_name(client: Client) -> None:
    response = client.post("/v1/chat/completions", {"model": "smollm2"})
    message = check_error(response, 400, param="messages", code="missing_field")
    assert message == "messages is required."


@pytest.mark.parametrize("max_tokens", [CONTEXT, 2**31, 2**63, 10**300], ids=str)
def test_prompt_and_continuation_over_the_context_are_refused(
    client: Client, backend: FakeBackend, max_tokens: int
) -> None:
    for param in ("max_tokens", "max_completion_tokens"):
        response = client.chat(**{param: max_tokens})
        message = check_error(response, 400, param=param, code="context_length_exceeded")
        assert message.startswith("The context is 256 tokens, but the prompt has 20 tokens and ")
    assert backend.requests == []


def test_prompt_over_the_context_is_refused(client: Client, backend: FakeBackend) -> None:
    response = client.complete(prompt=[5] * CONTEXT)
    message = check_error(response, 400, param="prompt", code="context_length_exceeded")
    assert "the prompt has 256 tokens and 16 more are asked for" in message
    response = client.chat(messages=[{"role": "user", "content": "a b " * 500}])
    check_error(response, 400, param="messages", code="context_length_exceeded")
    response = client.complete(prompt=[5] * (CONTEXT - 10))
    check_error(response, 400, param="max_tokens", code="context_length_exceeded")
    assert backend.requests == []


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/completions", "prompt"),
        ("/tokenize", "prompt"),
        ("/tokenize", "content"),
        ("/tokenize", "messages"),
        ("/v1/chat/completions", "messages"),
    ],
)
def test_text_that_cannot_fit_the_context_is_not_encoded(
    client: Client, monkeypatch: pytest.MonkeyPatch, path: str, field: str
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the text was encoded")

    monkeypatch.setattr("text.tokenizer._encode", refuse)
    text = "a" * 1_000_000
    value = [{"role": "user", "content": text}] if field == "messages" else text
    response = client.post(path, {field: value})
    message = check_error(response, 400, param=field, code="context_length_exceeded")
    assert re.match(rf"The context is 256 tokens, but {field} has at least \d+;", message)


@pytest.mark.parametrize("name", ["gpt-4", "", "smollm2@", "smollm2@magic", "x@adapt", "@adapt"])
def test_unknown_model_is_not_found(client: Client, name: str) -> None:
    check_error(client.chat(model=name), 404, param="model", code="model_not_found")
    check_error(client.complete(model=name), 404, param="model", code="model_not_found")


IMAGES: dict[str, Any] = {
    "image": {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}},
    "data": {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}},
    "audio": {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
    "file": {"type": "file", "file": {"file_id": "file:///etc/passwd"}},
    "no-type": {"text": "a"},
    "not-an-object": "text",
}


@pytest.mark.parametrize("part", IMAGES.values(), ids=IMAGES)
def test_other_parts_than_text_are_refused_without_a_network(
    client: Client, monkeypatch: pytest.MonkeyPatch, part: object
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("the server reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    content = [{"type": "text", "text": "look"}, part]
    response = client.chat(messages=[{"role": "user", "content": content}])
    assert "text parts only" in check_error(response, 400, param="messages[0].content")


def test_many_errors_make_a_short_answer(client: Client) -> None:
    fields = {f"field_{i}_{'x' * 200}": i for i in range(4000)}
    message = check_error(client.chat(**fields), 400, param="field_0_" + "x" * 53 + "...")
    assert message.endswith("and 3995 more errors.")
    response = client.chat(messages=[{"role": 5}] * 10_000)
    check_error(response, 400, param="messages[0].role")


def test_errors_do_not_repeat_prompts(client: Client) -> None:
    secret = "my secret prompt"
    for fields in ({"messages": [{"role": "user", "content": {"a": secret}}]}, {"n": secret}):
        response = client.chat(**fields)
        assert response.status_code == 400
        assert secret not in response.text


def test_unknown_fields_are_ignored_on_request(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    settings = ApiSettings(model_id="smollm2", unknown_fields="ignore")
    client = Client(create_app(backend, tokenizer, settings=settings))
    assert client.chat(frobnicate=1, messages=[{**USER, "x": 1}]).status_code == 200
    check_error(client.chat(temperature="5"), 400, param="temperature")
    check_error(client.chat(chat_template="x"), 400, param="chat_template")
    check_error(client.chat(tools=[{}]), 400, param="tools")


@pytest.fixture
def small(backend: FakeBackend, tokenizer: Tokenizer) -> Client:
    settings = ApiSettings(model_id="smollm2", max_body_bytes=1000, body_timeout_s=0.05)
    return Client(create_app(backend, tokenizer, settings=settings))


@pytest.mark.parametrize("path", PATHS)
def test_body_over_the_limit_is_too_large(small: Client, path: str) -> None:
    response = small.post(path, content=b" " * 1001)
    assert "longer than 1000 bytes" in check_error(response, 413, code="body_too_large")


def test_body_over_the_limit_is_refused_while_it_arrives(small: Client) -> None:
    num_sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(100):
            num_sent += 1
            yield b" " * 100

    async def send() -> httpx.Response:
        async with make_client(small.app) as client:
            return await client.post("/tokenize", content=pieces())

    response = asyncio.run(send())
    check_error(response, 413, code="body_too_large")
    assert num_sent <= 12


@pytest.mark.parametrize("length", ["99999999999999999999", "-1", "x"])
def test_strange_content_length_is_no_server_error(small: Client, length: str) -> None:
    response = small.post("/tokenize", content=b"{}", headers={"Content-Length": length})
    assert response.status_code in (400, 413)


def test_late_body_times_out(small: Client) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    async def send() -> httpx.Response:
        async with make_client(small.app) as client:
            return await client.post("/tokenize", content=pieces())

    check_error(asyncio.run(send()), 408, code="body_timeout")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "not_found"),
        ("POST", "/v1", 404, "not_found"),
        ("GET", "//v1//models", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_wrong_address_has_the_same_error_shape(
    client: Client, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, f"http://localhost{path}")
    check_error(response, status, code=code)
    if status == 405:
        assert response.headers["allow"]
