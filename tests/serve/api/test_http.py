"""HTTP itself: methods, paths, encodings, and what browsers ask before they ask."""

import gzip
import json
from typing import Any

import pytest
from fastapi import FastAPI

from serve.api import ApiSettings, create_app
from text.tokenizer import Tokenizer

from .conftest import Client, FakeBackend, check_error, read_events

KEY = "sk-correct-horse"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
ORIGIN = "https://app.example"
QUESTION = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.fixture
def shared(backend: FakeBackend, tokenizer: Tokenizer) -> Client:
    """A server with a key that pages of one origin may use."""
    settings = ApiSettings(model_id="smollm2", api_keys=(KEY,), allowed_origins=(ORIGIN,))
    return Client(create_app(backend, tokenizer, settings=settings))


def get_paths(app: FastAPI) -> list[str]:
    names = {"{model_id:path}": "smollm2", "{name}": "poet", "{id}": "cmp-0"}
    paths = [route.path for route in app.routes if "GET" in (route.methods or ())]
    for name, value in names.items():
        paths = [path.replace(name, value) for path in paths]
    assert len(paths) > 10
    return paths


def test_head_answers_as_get_does_without_the_body(app: FastAPI, client: Client) -> None:
    for path in get_paths(app):
        get, head = client.get(path), client.request("HEAD", path)
        assert head.status_code == get.status_code, path
        assert head.headers["content-type"] == get.headers["content-type"], path
        assert head.content == b"", path
    assert client.request("HEAD", "/livez").headers["content-length"] == "15"


def test_slash_at_the_end_means_nothing(client: Client) -> None:
    assert client.post("/v1/chat/completions/", BODY).status_code == 200
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()
    check_error(client.get("/nope/"), 404, code="not_found")


METHODS = {
    "/v1/adapters": "GET, HEAD, OPTIONS, POST",
    "/v1/adapters/poet": "DELETE, GET, HEAD, OPTIONS",
    "/v1/chat/completions": "OPTIONS, POST",
    "/livez": "GET, HEAD, OPTIONS",
}


@pytest.mark.parametrize(("path", "allowed"), METHODS.items(), ids=METHODS)
def test_allow_names_every_method_of_a_path(client: Client, path: str, allowed: str) -> None:
    response = client.request("PATCH", path)
    check_error(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == allowed
    options = client.request("OPTIONS", path)
    assert (options.status_code, options.headers["allow"]) == (204, allowed)


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "gzip, br", "\u00e9"])
def test_encoded_body_is_refused_by_the_name_of_the_header(client: Client, encoding: str) -> None:
    content = gzip.compress(json.dumps(BODY).encode())
    headers = {"Content-Encoding": encoding.encode()}
    response = client.post("/v1/chat/completions", content=content, headers=headers)
    message = check_error(response, 415, code="unsupported_content_encoding")
    assert "Content-Encoding" in message
    assert response.headers["accept-encoding"] == "identity"


def test_identity_is_no_encoding(client: Client) -> None:
    headers = {"Content-Encoding": "identity"}
    assert client.post("/v1/chat/completions", BODY, headers=headers).status_code == 200


def cors_headers(headers: Any) -> dict[str, str]:
    return {k: v for k, v in headers.items() if k.startswith("access-control")}


def test_preflight_of_an_allowed_origin_needs_no_key(shared: Client) -> None:
    response = shared.request("OPTIONS", "/v1/chat/completions", headers=QUESTION)
    assert (response.status_code, response.content) == (204, b"")
    assert cors_headers(response.headers) == {
        "access-control-allow-origin": ORIGIN,
        "access-control-allow-methods": "GET, HEAD, POST, DELETE",
        "access-control-allow-headers": "authorization,content-type,x-stainless-os",
        "access-control-expose-headers": "X-Request-Id, Retry-After",
        "access-control-max-age": "600",
    }
    assert response.headers["vary"] == "Origin"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("origin", ["https://evil.example", f"{ORIGIN}.evil.example", "null"])
def test_preflight_of_another_origin_is_refused(shared: Client, origin: str) -> None:
    headers = {**QUESTION, "Origin": origin}
    response = shared.request("OPTIONS", "/v1/chat/completions", headers=headers)
    assert "--allowed-origin" in check_error(response, 403, code="origin_not_allowed")
    assert cors_headers(response.headers) == {}


def test_without_the_option_no_origin_may_read(client: Client) -> None:
    response = client.request("OPTIONS", "/v1/models", headers=QUESTION)
    check_error(response, 403, code="origin_not_allowed")
    headers = {"Origin": "http://localhost", "Host": "localhost"}
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == 200
    assert cors_headers(response.headers) == cors_headers(answer.headers) == {}


def test_allowed_origin_may_read_answers_streams_and_errors(
    shared: Client, backend: FakeBackend
) -> None:
    with_key = {"Authorization": f"Bearer {KEY}", "Origin": ORIGIN}
    path = "/v1/chat/completions"
    answer = shared.post(path, BODY, headers=with_key)
    stream = shared.post(path, {**BODY, "stream": True}, headers=with_key)
    assert read_events(stream)
    refused = shared.post(path, BODY, headers={"Origin": ORIGIN})
    wrong = shared.post(path, {"messages": 5}, headers=with_key)
    backend.error = RuntimeError("a bug")
    broken = shared.post(path, BODY, headers=with_key)
    responses = [answer, stream, refused, wrong, broken]
    assert [response.status_code for response in responses] == [200, 200, 401, 400, 500]
    for response in responses:
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["vary"] == "Origin"


def test_allowed_origin_is_served_without_keys(backend: FakeBackend, tokenizer: Tokenizer) -> None:
    settings = ApiSettings(model_id="smollm2", allowed_origins=(ORIGIN,))
    client = Client(create_app(backend, tokenizer, settings=settings))
    response = client.post("/tokenize", {"content": "a"}, headers={"Origin": ORIGIN})
    assert response.headers["access-control-allow-origin"] == ORIGIN


HEAVY = {
    "lists": b'{"prompt": [' + b"[]," * 100_000 + b"[]]}",
    "objects": b'{"messages": [' + b"{}," * 100_000 + b"{}]}",
    "values": b'{"tokens": [' + b"1," * 1_200_000 + b"1]}",
    "strings": b'{"prompt": [' + b'"[",' * 1_200_000 + b'""]}',
}


@pytest.mark.parametrize("body", HEAVY.values(), ids=HEAVY)
def test_body_of_too_many_parts_is_refused(client: Client, body: bytes) -> None:
    response = client.post("/v1/completions", content=body)
    assert "more than" in check_error(response, 400, code="invalid_json")


def test_brackets_and_commas_inside_text_do_not_count(client: Client) -> None:
    text = '[{,"\\' * 50_000
    response = client.post("/v1/completions", {"prompt": text})
    check_error(response, 400, param="prompt", code="context_length_exceeded")


def test_many_messages_are_refused_by_number(client: Client) -> None:
    messages = [{"role": "user", "content": ""}] * 20_000
    response = client.chat(messages=messages)
    assert "at most 16384" in check_error(response, 400, param="messages", code="invalid_type")


@pytest.mark.parametrize("path", ["/v1/models/%ED%A0%80", "/v1/adapters/%FF", "/%C3%28"])
def test_path_that_is_no_unicode_is_not_found(client: Client, path: str) -> None:
    param = "model" if "models" in path else None
    check_error(client.get(path), 404, param=param)


@pytest.mark.parametrize("field", ["model", "user", "service_tier"])
def test_half_a_surrogate_pair_is_refused_in_every_text(client: Client, field: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "a"}], "%s": "\\ud83d"}' % field.encode()
    response = client.post("/v1/chat/completions", content=body)
    assert "surrogate" in check_error(response, 400, code="invalid_json")
