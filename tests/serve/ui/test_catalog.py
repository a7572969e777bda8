"""What a page offers, of this server and of others that speak the OpenAI API."""

import asyncio
from typing import Any

import httpx
import pytest

from client.api import ApiClient
from client.errors import RequestError
from serve.ui.catalog import Catalog, load_catalog

MODEL = {"object": "model", "created": 1, "owned_by": "somebody"}


def load(answers: dict[str, tuple[int, Any]]) -> Catalog:
    def answer(request: httpx.Request) -> httpx.Response:
        status, value = answers[request.url.path]
        return httpx.Response(status, json=value)

    client = ApiClient("http://server", transport=httpx.MockTransport(answer))
    return asyncio.run(load_catalog(client, ""))


def test_adapters_are_offered_below_what_they_sit_on() -> None:
    models = [
        {**MODEL, "id": "m", "parent": None, "x_kind": "base"},
        {**MODEL, "id": "m@adapt", "parent": "m", "x_kind": "strategy"},
        {**MODEL, "id": "m:small", "parent": "m", "x_kind": "variant"},
        {**MODEL, "id": "m:poet", "parent": "m:small", "x_kind": "side_network"},
        {**MODEL, "id": "m:warm", "parent": "m", "x_kind": "temperature_head"},
        {**MODEL, "id": "m:rte", "parent": "m", "x_kind": "classifier"},
    ]
    strategies = [{"id": "adapt", "schema": {"type": "object"}, "is_default": True}]
    found = load(
        {
            "/v1/models": (200, {"data": models}),
            "/v1/decoding_strategies": (200, {"data": strategies}),
        }
    )
    # What classifies has nothing to chat with.
    assert found["models"] == {"m": ["m:warm"], "m:small": ["m:poet"]}
    assert (found["strategies"], found["default"]) == ({"adapt": {"type": "object"}}, "adapt")


def test_another_server_has_models_only() -> None:
    models = [{**MODEL, "id": "gpt-4"}, {**MODEL, "id": "llama"}]
    missing = (404, {"error": {"message": "Not found"}})
    found = load({"/v1/models": (200, {"data": models}), "/v1/decoding_strategies": missing})
    assert found == {"models": {"gpt-4": [], "llama": []}, "strategies": {}, "default": None}


def test_failure_is_not_taken_for_another_server() -> None:
    failure = (500, {"error": {"message": "a bug"}})
    with pytest.raises(RequestError, match="a bug"):
        load({"/v1/models": (200, {"data": []}), "/v1/decoding_strategies": failure})
