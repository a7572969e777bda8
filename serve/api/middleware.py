"""Outermost layer: request ids, response counts, and the last resort for exceptions."""

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import log_failure, to_api_error
from serve.api.identity import accept_request_id
from serve.api.metrics import Metrics

_CLIENT_GONE = 499


class RequestMiddleware:
    """Give each request an id, count its response and answer what nothing else has caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for key, value in scope["headers"] if key == b"x-request-id"]
        header = (b"x-request-id", accept_request_id(given[0] if given else None).encode())
        status = _CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception as error:
            if status == _CLIENT_GONE:
                await to_api_error(error).response()(scope, receive, send_with_id)
            else:
                log_failure(error)
        finally:
            route = scope.get("route")
            self._metrics.count_response(getattr(route, "path", "other"), status)
