"""The published schema, /openapi.json. Bodies are parsed by hand, so it is put together here."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.api.schema import (
    AdapterBody,
    ChatBody,
    CompareBody,
    CompletionBody,
    DetokenizeBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
    VoteBody,
)

_MODELS: tuple[type[BaseModel], ...] = (
    AdapterBody,
    ChatBody,
    CompareBody,
    CompletionBody,
    DetokenizeBody,
    LoadAdapterBody,
    TokenizeBody,
    UnloadAdapterBody,
    VoteBody,
)
_REFERENCE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return what a route adds to its OpenAPI entry for a body that it reads itself."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    content = {"application/json": {"schema": schema}}
    error = {"$ref": _REFERENCE.format(model="Error")}
    return {
        "requestBody": {"required": True, "content": content},
        "responses": {
            "default": {
                "description": "An error.",
                "content": {"application/json": {"schema": error}},
            }
        },
    }


def build_openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of the application."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    _, definitions = models_json_schema(
        [(model, "validation") for model in _MODELS], ref_template=_REFERENCE
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions["$defs"], Error=_ERROR)
    return document
