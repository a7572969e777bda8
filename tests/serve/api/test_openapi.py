"""The published schema says what is really sent: every route is asked, every answer compared."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.api import ApiSettings, create_app
from serve.api.context import Experiments
from serve.attachments.registry import NAME_PATTERN
from serve.experiments.exposures import ExposureStore
from serve.experiments.plan import parse_experiments
from serve.experiments.store import VoteStore
from text.tokenizer import Tokenizer

from .conftest import Client, FakeBackend, make_adapter, make_client, read_events

API = {"Authorization": "Bearer api"}
ADMIN = {"Authorization": "Bearer admin"}
USER = {"role": "user", "content": "hi"}
CHAT = {"messages": [USER]}
RICH = {"return_decoding_trace": True, "max_tokens": 2}
ARMS = [{"model": "smollm2"}, {"model": "smollm2:poet", "label": "B"}]
LIST = ("get", "/v1/adapters")
ATTACH = ("post", "/v1/adapters")
VOTE = ("post", "/v1/compare/{id}/vote")

# Method, path of the schema, what stands for its parameter, body, headers, status.
Ask = tuple[str, str, str, Any, dict[str, str], int]


def asks() -> Iterator[Ask]:
    def post(path: str, body: Any, status: int = 200, **options: Any) -> Ask:
        return "post", path, options.get("part", ""), body, options.get("headers", API), status

    def get(path: str, status: int = 200, part: str = "", headers: Any = None) -> Ask:
        return "get", path, part, None, API if headers is None else headers, status

    for path in ("/livez", "/readyz", "/health"):
        yield get(path, headers={})
    for path in (
        "/version", "/metrics", "/v1/models", "/v1/adapters", "/v1/decoding_strategies",
        "/v1/compare/votes",
    ):  # fmt: skip
        yield get(path)
        yield get(path, 401, headers={})
    yield get("/v1/models/{model_id}", part="smollm2:poet@adapt")
    yield get("/v1/models/{model_id}", 404, part="other")
    yield get("/v1/adapters/{name}", part="poet")
    yield get("/v1/adapters/{name}", 404, part="other")
    for stream in (False, True):
        yield post("/v1/chat/completions", {**CHAT, "stream": stream})
        rich = {**CHAT, **RICH, "logprobs": True, "top_logprobs": 2, "stream": stream, "n": 2}
        yield post("/v1/chat/completions", rich)
        text = {"prompt": ["the", "fox"], "stream": stream}
        yield post("/v1/completions", text)
        yield post("/v1/completions", {**text, **RICH, "echo": True, "logprobs": 2})
        yield post("/v1/compare", {**CHAT, **RICH, "arms": ARMS, "stream": stream})
        yield post("/v1/compare", {"prompt": "the", "arms": ARMS, "stream": stream})
    usage = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "a"})):
        yield post(path, {**body, "stream": True, "stream_options": usage})
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/compare", "/tokenize"):
        yield post(path, {"frob": 1}, 400)
        yield post(path, {"frob": 1}, 401, headers={})
        yield post(path, {"user": "a" * 99_999}, 413)
        yield post(path, {}, 415, headers={**API, "Content-Encoding": "gzip"})
    yield post("/v1/chat/completions", {**CHAT, "model": "other"}, 404)
    yield post("/v1/classify", {"model": "smollm2:rte", "input": ["the fox", "a"]})
    yield post("/v1/classify", {"model": "smollm2:poet", "input": "a"}, 400)
    yield post("/v1/classify", {"model": "smollm2:none", "input": "a"}, 404)
    yield "get", "/v1/experiments", "", None, API, 200
    yield "get", "/v1/experiments/{name}", "no", None, API, 404
    yield post("/v1/feedback", {"id": "x", "rating": 1.0}, 404)
    yield post("/v1/feedback", {"id": "x"}, 400)
    yield post("/tokenize", {"prompt": "the fox", "return_token_strs": True})
    yield post("/tokenize", {"content": "the fox", "with_pieces": True})
    yield post("/detokenize", {"tokens": [5, 6]})
    yield post("/detokenize", {"tokens": [-1]}, 400)
    yield post("/v1/adapters", {"name": "new", "path": "good"}, headers=ADMIN)
    yield post("/v1/adapters", {"name": "new", "path": "good"}, 409, headers=ADMIN)
    yield post("/v1/adapters", {"name": "bad", "path": "bad"}, 400, headers=ADMIN)
    yield post("/v1/adapters", {"name": "new", "path": "good"}, 403)
    yield "delete", "/v1/adapters/{name}", "new", None, ADMIN, 200
    yield "delete", "/v1/adapters/{name}", "new", None, ADMIN, 404
    yield "delete", "/v1/adapters/{name}", "new", None, API, 403
    lora = {"lora_name": "new", "lora_path": "good"}
    yield post("/v1/load_lora_adapter", lora, headers=ADMIN)
    yield post("/v1/load_lora_adapter", lora, 409, headers=ADMIN)
    yield post("/v1/unload_lora_adapter", {"lora_name": "new"}, headers=ADMIN)
    yield post("/v1/unload_lora_adapter", {"lora_name": "new"}, 404, headers=ADMIN)


@pytest.fixture
def whole_app(backend: FakeBackend, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[FastAPI]:
    """Everything switched on: keys, an adapter root, votes, experiments."""
    backend.attached["poet"] = make_adapter("poet")
    backend.attached["rte"] = make_adapter("rte", labels=("no", "yes"))
    settings = ApiSettings(
        model_id="smollm2", api_keys=("api",), admin_keys=("admin",), adapter_root="/adapters",
        max_body_bytes=50_000,
    )  # fmt: skip
    votes = VoteStore(tmp_path / "votes.sqlite3")
    store = ExposureStore(tmp_path / "experiments.sqlite3")
    arms = [{"label": "a", "model": "smollm2"}, {"label": "b", "model": "smollm2@adapt"}]
    plan = parse_experiments([{"name": "trial", "unit": "paired", "arms": arms}])
    experiments = Experiments(plan={item.name: item for item in plan}, store=store)
    yield create_app(backend, tokenizer, settings=settings, votes=votes, experiments=experiments)
    votes.close()
    store.close()


class Schemas:
    """A document's schemas, and whether values fit them."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    def follow(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            name = schema["$ref"].removeprefix("#/components/schemas/")
            schema = self.document["components"]["schemas"][name]
        return schema

    def misfits(self, value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
        """Return where a value does not fit."""
        schema = self.follow(schema)
        if "anyOf" in schema:
            found = [self.misfits(value, option, place) for option in schema["anyOf"]]
            return min(found, key=len)
        types = {
            "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
            "boolean": bool, "null": type(None),
        }  # fmt: skip
        kind: Any = types[schema["type"]] if "type" in schema else object
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return [f"{place}: {value!r} is no {schema.get('type')}"]
        if value != schema.get("const", value) or value not in schema.get("enum", [value]):
            return [f"{place}: {value!r} is none of those allowed"]
        if isinstance(value, list):
            items = schema.get("items", {})
            return [
                text
                for i, v in enumerate(value)
                for text in self.misfits(v, items, f"{place}[{i}]")
            ]
        if isinstance(value, dict):
            return self.misfits_of_object(value, schema, place)
        return []

    def misfits_of_object(self, value: dict[str, Any], schema: Any, place: str) -> list[str]:
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        found = [
            f"{place}.{name} is missing" for name in schema.get("required", ()) if name not in value
        ]
        for name, item in value.items():
            if name in known:
                found += self.misfits(item, known[name], f"{place}.{name}")
            elif more is False:
                found.append(f"{place}.{name} is not in the schema")
            elif isinstance(more, dict):
                found += self.misfits(item, more, f"{place}.{name}")
        return found


def check(schemas: Schemas, response: httpx.Response, operation: dict[str, Any]) -> list[str]:
    """Return what of a response its operation does not document."""
    status = str(response.status_code)
    if status not in operation["responses"]:
        return [f"status {status} is not documented"]
    content = operation["responses"][status]["content"]
    kind = response.headers["content-type"]
    name = next((name for name in content if kind.split(";")[0] == name.split(";")[0]), None)
    if name is None:
        return [f"{kind} is not documented"]
    if name == "text/event-stream":
        values = read_events(response)
    elif name == "application/json":
        values = [response.json()]
    else:
        return [] if name == kind else [f"{kind} is not {name}"]
    return [text for value in values for text in schemas.misfits(value, content[name]["schema"])]


def test_every_answer_is_as_documented(whole_app: FastAPI) -> None:
    async def ask_all() -> tuple[dict[str, Any], list[tuple[Ask, httpx.Response]]]:
        async with make_client(whole_app) as client:
            document = (await client.get("/openapi.json", headers=API)).json()
            got = []
            for ask in asks():
                method, path, part, body, headers, _ = ask
                url = re.sub(r"\{.*\}", part, path)
                options = {} if body is None else {"json": body}
                got.append((ask, await client.request(method, url, headers=headers, **options)))
            comparison = (
                await client.post("/v1/compare", headers=API, json={**CHAT, "arms": ARMS})
            ).json()["id"]
            for name, body, status in (
                (comparison, {"vote": 1}, 200), (comparison, {"vote": "tie"}, 200),
                (comparison, {"vote": 9}, 400), ("cmp-0", {"vote": 1}, 404),
            ):  # fmt: skip
                url = f"/v1/compare/{name}/vote"
                response = await client.post(url, headers=API, json=body)
                got.append(((*VOTE, name, body, API, status), response))
            for number in range(25):
                tried = await client.post(
                    "/v1/compare", headers=API, json={**CHAT, "experiment": "trial"}
                )
                body = {"id": tried.json()["id"], "preferred": "ab"[number % 2]}
                given = await client.post("/v1/feedback", headers=API, json=body)
                got.append((("post", "/v1/feedback", "", body, API, 200), given))
            votes = await client.get("/v1/compare/votes", headers=API)
            report = await client.get("/v1/experiments/trial", headers=API)
            assert report.json()["outcomes"]["preferred"]["series"]["b"]
            got.append((("get", "/v1/experiments/{name}", "trial", None, API, 200), report))
            got.append((("get", "/v1/compare/votes", "", None, API, 200), votes))
        return document, got

    document, got = asyncio.run(ask_all())
    schemas = Schemas(document)
    for ask, response in got:
        method, path, _, body, _, status = ask
        assert response.status_code == status, (ask, response.text)
        assert check(schemas, response, document["paths"][path][method]) == [], (path, body)
    asked = {(method, path) for (method, path, *_), r in got if r.status_code == 200}
    documented = {(m, p) for p, entries in document["paths"].items() for m in entries}
    assert asked == documented


def test_misfits_are_found() -> None:
    schema = {
        "type": "object", "required": ["a", "b"], "additionalProperties": False,
        "properties": {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "b": {"const": 1}},
    }  # fmt: skip
    schemas = Schemas({})
    assert schemas.misfits({"a": None, "b": 1}, schema) == []
    for value in ({"a": "1", "b": 1}, {"a": 1, "b": 2}, {"b": 1}, {"a": 1, "b": 1, "c": 1}, []):
        assert len(schemas.misfits(value, schema)) == 1


def test_every_route_is_documented(whole_app: FastAPI) -> None:
    document = whole_app.openapi()
    documented = {(m.upper(), p) for p, entries in document["paths"].items() for m in entries}
    routes = {
        (method, re.sub(r":path}", "}", route.path))
        for route in whole_app.routes
        for method in route.methods - {"HEAD"}
        if route.path != "/openapi.json"
    }
    assert documented == routes


def test_statuses_and_security_are_those_of_the_route(whole_app: FastAPI) -> None:
    document = whole_app.openapi()
    assert "422" not in json.dumps(document["paths"])
    for path, entries in document["paths"].items():
        for method, entry in entries.items():
            is_open = path in ("/livez", "/readyz", "/health")
            is_admin = (
                path.endswith("lora_adapter") or method == "delete" or (method, path) == ATTACH
            )
            assert ("401" in entry["responses"]) == (not is_open), path
            assert (entry["security"] == []) == is_open, path
            assert (entry["security"] == [{"adminKey": []}]) == is_admin, path
    assert set(document["components"]["securitySchemes"]) == {"apiKey", "adminKey"}


def test_bodies_have_the_limits_and_nulls_that_are_accepted(whole_app: FastAPI) -> None:
    schemas = whole_app.openapi()["components"]["schemas"]
    chat = schemas["ChatBody"]["properties"]
    assert (chat["n"]["minimum"], chat["n"]["maximum"]) == (1, 128)
    assert chat["messages"]["minItems"] == 1
    assert chat["top_logprobs"]["maximum"] == 20
    name = schemas["AdapterBody"]["properties"]["name"]["pattern"]
    assert name == f"^{NAME_PATTERN.pattern}$"
    client = Client(whole_app, headers=API)
    reader = Schemas({"components": {"schemas": schemas}})
    for field, schema in chat.items():
        is_accepted = client.chat(**{field: None}).status_code == 200
        is_documented = reader_takes_null(reader, schema)
        assert is_accepted == is_documented, field


def reader_takes_null(reader: Schemas, schema: dict[str, Any]) -> bool:
    schema = reader.follow(schema)
    if "anyOf" in schema:
        return any(reader_takes_null(reader, option) for option in schema["anyOf"])
    kinds = schema.get("type", [])
    return "null" in ([kinds] if isinstance(kinds, str) else kinds)
