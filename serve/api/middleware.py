"""What every request goes through before the routes: ids and counts, failures, its body."""

import asyncio
import re

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.access import is_below_interface, is_open
from serve.api.context import make_id
from serve.api.errors import ApiError, log_failure, to_api_error
from serve.api.metrics import Metrics
from serve.api.settings import ApiSettings

_CLIENT_GONE = 499
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TOKEN = re.compile(r"[\w-]{1,32}", re.ASCII)


class RequestMiddleware:
    """Outermost layer: give each request an id and count its response.

    `HEAD` is answered as `GET` without the body, and a slash at the end of a path means nothing;
    the interface has both in its own hands.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for key, value in scope["headers"] if key == b"x-request-id"]
        is_fit = bool(given) and _REQUEST_ID.fullmatch(given[0]) is not None
        header = (b"x-request-id", given[0] if is_fit else make_id("req").encode())
        status = _CLIENT_GONE
        is_head = False
        if not is_below_interface(scope["path"]):
            is_head = scope["method"] == "HEAD"
            path = scope["path"].rstrip("/") or "/"
            scope = {**scope, "path": path, "method": "GET" if is_head else scope["method"]}

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], header]}
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            route = scope.get("route")
            self._metrics.count_response(getattr(route, "path", "other"), status)


class FailureMiddleware:
    """Answer what nothing else has caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False

        async def send_noted(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except ClientDisconnect:
            pass
        except Exception as error:
            if is_started:
                log_failure(error)
            else:
                await to_api_error(error).response()(scope, receive, send)


class BodyMiddleware:
    """Take in each request's whole body, within limits of size and time, before anything works.

    That holds for every path. Those that no key protects have a limit together, too.
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._limit = settings.max_body_bytes
        self._timeout_s = settings.body_timeout_s
        self._max_keyless_bytes = settings.max_keyless_bodies * settings.max_body_bytes
        self._keyless_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        is_keyless = is_open(scope["path"])
        try:
            try:
                await self._read(scope, receive, body, is_keyless=is_keyless)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            whole: bytes | None = bytes(body)
        finally:
            if is_keyless:
                self._keyless_bytes -= len(body)
            del body

        async def receive_whole() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message = {"type": "http.request", "body": whole, "more_body": False}
            whole = None
            return message

        await self._app(scope, receive_whole, send)

    async def _read(
        self, scope: Scope, receive: Receive, body: bytearray, *, is_keyless: bool
    ) -> None:
        headers = dict(scope["headers"])
        _check_encoding(headers.get(b"content-encoding", b"").decode("latin-1"))
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > self._limit:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    piece = message.get("body", b"")
                    body += piece
                    if is_keyless:
                        self._keyless_bytes += len(piece)
                    if len(body) > self._limit:
                        raise self._too_large()
                    if self._keyless_bytes > self._max_keyless_bytes:
                        raise ApiError(
                            "Too many requests without a key are arriving; try again later.",
                            status=503,
                            code="overloaded",
                            headers={"Retry-After": "5", "Connection": "close"},
                        )
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            raise ApiError(
                f"The request body did not arrive within {self._timeout_s:g} s.",
                status=408,
                code="body_timeout",
                headers={"Connection": "close"},
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            f"The request body is longer than {self._limit} bytes.",
            status=413,
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _check_encoding(encoding: str) -> None:
    if encoding.strip().lower() in ("", "identity"):
        return
    name = repr(encoding) if _TOKEN.fullmatch(encoding) else "of this kind"
    raise ApiError(
        f"Content-Encoding {name} is not supported; send the body as it is.",
        status=415,
        code="unsupported_content_encoding",
        headers={"Accept-Encoding": "identity"},
    )
