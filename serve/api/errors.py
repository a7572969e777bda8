"""The one shape of every error: `{"error": {"message", "type", "param", "code"}}`."""

import json
import logging
import traceback
from collections.abc import Mapping
from pathlib import PurePath

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from decoding import ParameterError
from serve.backends.protocol import (
    AdapterConflictError,
    AdapterLoadError,
    AdapterNotFoundError,
    BackendUnavailableError,
    QueueFullError,
)
from text.chat_template import ChatTemplateError

_LOG = logging.getLogger("proa.api")
_MAX_MESSAGE_CHARS = 1000


class ApiError(Exception):
    """A request that ends in an error.

    Args:
        message: what is wrong and what is allowed; no prompts, paths or keys.
        status: HTTP status.
        param: the field, as the client spelt it.
        code: short name that a program can compare with.
        headers: further response headers.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """Return the JSON value of the response."""
        kind = "invalid_request_error"
        if self.status >= 500:
            kind = "service_unavailable_error" if self.status == 503 else "server_error"
        elif self.status in (401, 403):
            kind = "authentication_error" if self.status == 401 else "permission_error"
        message = self.message
        if len(message) > _MAX_MESSAGE_CHARS:
            message = message[: _MAX_MESSAGE_CHARS - 3] + "..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the HTTP response."""
        return Response(
            encode_json(self.body()),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


class GenerationFailedError(Exception):
    """The backend ended a sequence with an error."""


def encode_json(value: object) -> bytes:
    """Return compact JSON in UTF-8. Non-finite numbers and lone surrogates are our own bugs."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode()


def to_api_error(error: BaseException) -> ApiError:
    """Return the error that the client sees for an exception; unknown ones are logged."""
    match error:
        case ApiError():
            return error
        case ParameterError():
            return ApiError(str(error), param=error.param, code="invalid_value")
        case ChatTemplateError():
            return ApiError(str(error), param="messages", code="invalid_value")
        case AdapterNotFoundError():
            return ApiError("There is no such adapter.", status=404, code="adapter_not_found")
        case AdapterConflictError():
            return ApiError(str(error), status=409, code="adapter_conflict")
        case AdapterLoadError():
            return ApiError(
                f"An adapter cannot be loaded any more: {error}",
                status=503,
                code="adapter_unavailable",
            )
        case QueueFullError():
            retry_after_s = max(1, error.retry_after_s)
            return ApiError(
                "The server is full; try again later.",
                status=503,
                code="queue_full",
                headers={"Retry-After": str(retry_after_s)},
            )
        case BackendUnavailableError():
            return ApiError(
                "The server is not accepting requests.",
                status=503,
                code="unavailable",
                headers={"Retry-After": "5"},
            )
        case HTTPException():
            return _from_http_exception(error)
    log_failure(error)
    return ApiError("The server failed to answer this request.", status=500, code="internal_error")


def _from_http_exception(error: HTTPException) -> ApiError:
    messages = {
        404: "There is no such endpoint.",
        405: "The endpoint does not accept this method.",
    }
    codes = {404: "not_found", 405: "method_not_allowed"}
    return ApiError(
        messages.get(error.status_code, "The request is invalid."),
        status=error.status_code,
        code=codes.get(error.status_code),
        headers=error.headers,
    )


def log_failure(error: BaseException) -> None:
    """Log where an unexpected exception came from.

    Its text is left out because it may quote a prompt.
    """
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    places = " > ".join(f"{PurePath(f.filename).name}:{f.lineno}" for f in frames)
    _LOG.error("request failed: %s at %s", type(error).__name__, places or "unknown place")


async def handle_error(request: Request, error: Exception) -> Response:
    """Exception handler of the application."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        allowed = {"Allow": ", ".join(_find_methods(request))}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=allowed)
        error = HTTPException(405, headers=allowed)
    return to_api_error(error).response()


def _find_methods(request: Request) -> list[str]:
    """Return the methods of a path, which several routes may share."""
    found = {"OPTIONS"}
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found | {"HEAD"} if "GET" in found else found)
