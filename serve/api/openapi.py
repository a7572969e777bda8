"""The published schema, /openapi.json; written by hand, as bodies and answers are."""

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import serve.api.answer_schema as answers
import serve.api.schema as bodies
from serve.api.settings import ApiSettings

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TEXT_TYPE = "text/plain; charset=utf-8"
_REFERENCE = "#/components/schemas/{model}"
_ERRORS = {
    400: "The request is wrong; `param` names the field.",
    401: "No key, or a wrong one.",
    403: "Not from here, not for this host or origin, or not without the admin key.",
    404: "There is no such thing.",
    408: "The body is late.",
    409: "The name is taken, or requests or side networks use it.",
    413: "The body is too long.",
    415: "The body has a Content-Encoding.",
    500: "A bug.",
    503: "The queue is full, the server stops, or a file fails; see Retry-After.",
}
# Any request may have a body, and the limits hold for it.
_OF_ANY = (403, 408, 413, 415, 500)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Operation:
    """What a route takes and sends.

    Attributes:
        answer: what it sends with status 200; text: its media type.
        body: what it takes, or None.
        chunk: an event, where it streams if asked to.
        errors: statuses besides those of any request.
        key: whose key opens it.
    """

    answer: type[BaseModel] | str
    body: type[BaseModel] | None = None
    chunk: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    key: str | None = "api"


_OPERATIONS = {
    ("post", "/v1/chat/completions"): _Operation(
        answer=answers.ChatAnswer,
        body=bodies.ChatBody,
        chunk=answers.ChatChunk,
        errors=(400, 404, 503),
    ),
    ("post", "/v1/completions"): _Operation(
        answer=answers.TextAnswer,
        body=bodies.CompletionBody,
        chunk=answers.TextChunk,
        errors=(400, 404, 503),
    ),
    ("post", "/v1/classify"): _Operation(
        answer=answers.ClassifyAnswer, body=bodies.ClassifyBody, errors=(400, 404, 503)
    ),
    ("post", "/v1/compare"): _Operation(
        answer=answers.ComparisonAnswer,
        body=bodies.CompareBody,
        chunk=answers.ComparisonChunk,
        errors=(400, 404, 503),
    ),
    ("post", "/v1/compare/{id}/vote"): _Operation(
        answer=answers.VoteAnswer, body=bodies.VoteBody, errors=(400, 404, 503)
    ),
    ("get", "/v1/compare/votes"): _Operation(answer=answers.PairTallyList, errors=(404, 503)),
    ("get", "/v1/experiments"): _Operation(answer=answers.ExperimentList),
    ("get", "/v1/experiments/{name}"): _Operation(
        answer=answers.ExperimentReport, errors=(404, 503)
    ),
    ("post", "/v1/feedback"): _Operation(
        answer=answers.FeedbackAnswer, body=bodies.FeedbackBody, errors=(400, 404, 503)
    ),
    ("get", "/v1/models"): _Operation(answer=answers.ModelList),
    ("get", "/v1/models/{model_id}"): _Operation(answer=answers.ModelEntry, errors=(404,)),
    ("get", "/v1/adapters"): _Operation(answer=answers.AdapterList),
    ("get", "/v1/adapters/{name}"): _Operation(answer=answers.AdapterEntry, errors=(404,)),
    ("post", "/v1/adapters"): _Operation(
        answer=answers.AdapterEntry, body=bodies.AdapterBody, errors=(400, 409, 503), key="admin"
    ),
    ("delete", "/v1/adapters/{name}"): _Operation(
        answer=answers.AdapterDeleted, errors=(404, 409, 503), key="admin"
    ),
    ("post", "/v1/load_lora_adapter"): _Operation(
        answer=_TEXT_TYPE, body=bodies.LoadAdapterBody, errors=(400, 409, 503), key="admin"
    ),
    ("post", "/v1/unload_lora_adapter"): _Operation(
        answer=_TEXT_TYPE, body=bodies.UnloadAdapterBody, errors=(400, 404, 409, 503), key="admin"
    ),
    ("get", "/v1/decoding_strategies"): _Operation(answer=answers.StrategyList),
    ("post", "/tokenize"): _Operation(
        answer=answers.TokenizeAnswer, body=bodies.TokenizeBody, errors=(400, 404)
    ),
    ("post", "/detokenize"): _Operation(
        answer=answers.DetokenizeAnswer, body=bodies.DetokenizeBody, errors=(400, 404)
    ),
    ("get", "/livez"): _Operation(answer=answers.Status, key=None),
    ("get", "/readyz"): _Operation(answer=answers.Status, errors=(503,), key=None),
    ("get", "/health"): _Operation(answer=answers.Status, errors=(503,), key=None),
    ("get", "/version"): _Operation(answer=answers.Version),
    ("get", "/metrics"): _Operation(answer=METRICS_TYPE),
}
_SECURITY: dict[str | None, list[dict[str, list[str]]]] = {
    None: [],
    # Without keys on the server, clients on its own machine need none.
    "api": [{"apiKey": []}, {"adminKey": []}, {}],
    "admin": [{"adminKey": []}],
}
_SCHEMES = {
    "apiKey": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "adminKey": {"type": "http", "scheme": "bearer", "description": "An admin key."},
}


def build_openapi(app: FastAPI, settings: ApiSettings) -> dict[str, Any]:
    """Return the OpenAPI document of the application."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, methods in document["paths"].items():
        for method, entry in methods.items():
            _describe(entry, _OPERATIONS[method, path])
    models: set[type[BaseModel]] = {answers.Error}
    for operation in _OPERATIONS.values():
        models |= {
            model
            for model in (operation.answer, operation.body, operation.chunk)
            if isinstance(model, type)
        }
    _, definitions = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template=_REFERENCE,
    )
    schemas = definitions["$defs"]
    for name in ("ChatBody", "CompletionBody"):
        schemas[name]["properties"]["n"]["maximum"] = settings.max_sequences_per_prompt
    document["components"] = {"schemas": schemas, "securitySchemes": _SCHEMES}
    return document


def _describe(entry: dict[str, Any], operation: _Operation) -> None:
    if operation.body is not None:
        entry["requestBody"] = {
            "required": True,
            "content": {"application/json": _content(operation.body)},
        }
    if isinstance(operation.answer, str):
        content: dict[str, Any] = {operation.answer: {"schema": {"type": "string"}}}
    else:
        content = {"application/json": _content(operation.answer)}
    description = "The answer."
    if operation.chunk is not None:
        content["text/event-stream"] = _content(operation.chunk)
        description = (
            "The answer; with `stream: true` server-sent events, each with one such object, or an "
            "error, as its data; the last one has `[DONE]`."
        )
    responses: dict[str, Any] = {"200": {"description": description, "content": content}}
    statuses = {*operation.errors, *_OF_ANY} | (set() if operation.key is None else {401})
    for status in sorted(statuses):
        responses[str(status)] = {
            "description": _ERRORS[status],
            "content": {"application/json": _content(answers.Error)},
        }
    entry["responses"] = responses
    entry["security"] = _SECURITY[operation.key]


def _content(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}
