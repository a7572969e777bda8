"""Pages of other origins: which of them a browser lets read the answers."""

from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import ApiError

_MAX_AGE_S = 600
_METHODS = "GET, HEAD, POST, DELETE"
_READABLE = "X-Request-Id, Retry-After"


class CorsMiddleware:
    """Answer a browser's question before a request, and say which origins may read the answers.

    The question comes without a key and needs none. Answers include errors and streams.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_allowed = origin in self._origins
        is_question = scope["method"] == "OPTIONS" and "access-control-request-method" in headers

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start" and self._origins:
                answer = MutableHeaders(scope=message)
                answer.add_vary_header("Origin")
                if is_allowed:
                    answer["Access-Control-Allow-Origin"] = origin or ""
                    answer["Access-Control-Expose-Headers"] = _READABLE
            await send(message)

        if is_question:
            wanted = headers.get("access-control-request-headers", "")
            await _answer_question(wanted, is_allowed=is_allowed)(scope, receive, send_allowed)
        else:
            await self._app(scope, receive, send_allowed)


def _answer_question(wanted: str, *, is_allowed: bool) -> Response:
    if not is_allowed:
        return ApiError(
            "Pages of this origin may not use the server; --allowed-origin names those that may.",
            status=403,
            code="origin_not_allowed",
        ).response()
    headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": str(_MAX_AGE_S)}
    if wanted:
        headers["Access-Control-Allow-Headers"] = wanted
    return Response(status_code=204, headers=headers)
